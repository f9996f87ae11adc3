"""A fleet's beginning: its authority, the members that are no devices, and what its broker is run with."""

from __future__ import annotations

from pathlib import Path

from fleetune.server.authority.authority import Authority, Lives, Site
from fleetune.server.authority.mosquitto import write_broker

AGGREGATOR_FOLDER, AUTHORITY_FOLDER, PUBLISHER_FOLDER = "members/aggregator", "members/authority", "members/publisher"
BROKER_FOLDER = "broker"
"""Below the authority's own folder."""


def found(folder: Path, fleet: str, site: Site, lives: Lives | None = None) -> Authority:
    """Make an authority, with all that does not need a device.

    Args:
        folder: Made if it is not there.
        fleet: The fleet's name.
        site: Where its broker is.
        lives: For how long what it issues counts.

    Returns:
        The authority; it has to be closed.

    Raises:
        AuthorityError: There is one.
    """
    authority = Authority.make(folder, fleet, site, lives=lives or Lives())
    authority.make_member("aggregator", folder / AGGREGATOR_FOLDER)
    authority.make_member("authority", folder / AUTHORITY_FOLDER)
    authority.make_member("publisher", folder / PUBLISHER_FOLDER)
    write_broker(authority, folder / BROKER_FOLDER)
    return authority
