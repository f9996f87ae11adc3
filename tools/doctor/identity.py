"""Who this device is, and until when."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from fleetune.edge.protocol.errors import FleetuneError, MessageError
from fleetune.edge.protocol.identity.clock import MAX_SKEW
from fleetune.edge.protocol.identity.credential import check_current
from fleetune.edge.protocol.identity.folder import TLS_FILE, read_identity
from fleetune.tools.doctor.host import Check

IDENTITY = 43
"""Exit code of the check."""

_OVERDUE_AFTER = 3 / 4
"""Share of a credential's life after which it should have been renewed."""


def check_identity(folder: Path) -> Check:
    """Whether the device's identity counts, and for how long."""
    try:
        identity = read_identity(folder)
        credential = identity.credential
        check_current(credential, identity.trust, time.time())
    except MessageError as error:
        return Check("identity", "failure", error.what, f"{error.remedy} (`fleetune enroll`)", IDENTITY)
    except FleetuneError as error:
        return Check("identity", "failure", error.what, error.remedy, IDENTITY)
    until = datetime.fromtimestamp(credential.expires).astimezone()
    found = f"{credential.name} of the fleet {credential.fleet}, until {until:%Y-%m-%d %H:%M}"
    if time.time() < credential.begins - MAX_SKEW:
        fix = "set the clock; the agent goes by the aggregator's until then"
        return Check("identity", "note", f"{found}; by this device's clock it has not begun", fix)
    overdue = credential.begins + _OVERDUE_AFTER * (credential.expires - credential.begins)
    if time.time() > overdue:
        fix = "see that the agent runs, and `fleetune fleet serve`"
        return Check("identity", "note", f"{found}; it should have been renewed by now", fix)
    if not (folder / TLS_FILE).exists():
        fix = "none, if the broker is on this machine; else enrol it again"
        return Check("identity", "note", f"{found}; without a certificate for TLS", fix)
    return Check("identity", "ok", found)
