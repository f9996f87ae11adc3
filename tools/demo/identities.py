"""Who is who in a rehearsal on one machine: an authority of its own, and an identity for each process."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from fleetune.edge.protocol.identity.folder import FILE
from fleetune.edge.protocol.identity.signature import sign_file
from fleetune.server.authority.authority import FILE as AUTHORITY_FILE
from fleetune.server.authority.authority import Authority, Site
from fleetune.tools.commands.options import IDENTITY


def make_identities(
    folder: Path, fleet: str, packs: Iterable[Path], aggregator: Path, devices: Iterable[tuple[str, Path]]
) -> None:
    """Make what is not there yet.

    Args:
        folder: Of the authority.
        fleet: Name of the fleet.
        packs: To be signed.
        aggregator: State folder of the aggregator.
        devices: Id and state folder of each device.
    """
    made = (folder / AUTHORITY_FILE).exists()
    with closing(Authority(folder) if made else Authority.make(folder, fleet, Site(("127.0.0.1",)))) as authority:
        publisher = authority.make_member("publisher", folder / "publisher")
        for pack in packs:
            sign_file(pack, publisher, authority.now())
        if not (aggregator / IDENTITY / FILE).exists():
            authority.make_member("aggregator", aggregator / IDENTITY)
        for device, state in devices:
            if not (state / IDENTITY / FILE).exists():
                authority.make_member("device", state / IDENTITY, device)
