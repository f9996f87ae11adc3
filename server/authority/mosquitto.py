"""What Mosquitto needs to serve a fleet: its configuration, who may do what, its certificate, and who was revoked.

The limits are those of ``mosquitto.conf`` beside the aggregator; what is added here lets in whoever shows a
certificate, under the certificate's name, and nobody else.
"""

from __future__ import annotations

import os
import signal
from importlib import resources
from pathlib import Path

from fleetune.edge.protocol.files import write_atomic
from fleetune.edge.protocol.identity.folder import write_private
from fleetune.edge.protocol.topics import PROTOCOL
from fleetune.server.authority.authority import Authority

CONFIG, ACL, ENROLMENT_ACL, REVOKED, PID = "mosquitto.conf", "acl", "enrolment.acl", "revoked.pem", "mosquitto.pid"
CERTIFICATE, KEY, ROOTS = "broker.pem", "broker.key", "roots.pem"

_LIMITS_BEGIN = "allow_anonymous true"
"""Line of ``mosquitto.conf`` after which come its limits."""

_LISTENERS = """

# --- who may come in ---------------------------------------------------------------------------------------------
per_listener_settings true
pid_file {folder}/{PID}

# Members of the fleet {fleet}: the name in the certificate is the user.
listener {port}
cafile {folder}/{ROOTS}
certfile {folder}/{CERTIFICATE}
keyfile {folder}/{KEY}
crlfile {folder}/{REVOKED}
tls_version tlsv1.3
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {folder}/{ACL}

# Devices that have a token and no certificate yet. What they say is authenticated by the token; it may be closed, by
# removing these lines, while no device is enrolled.
listener {enrolment_port}
certfile {folder}/{CERTIFICATE}
keyfile {folder}/{KEY}
tls_version tlsv1.3
allow_anonymous true
max_connections 64
acl_file {folder}/{ENROLMENT_ACL}
"""

_ACL = """\
# %u is the name in a certificate. A device writes to topics of its own, and reads what is for all or for itself.
pattern write {root}/up/%u/#
pattern write {root}/st/%u
pattern write {root}/st/%u/id
pattern read {root}/g/#
pattern read {root}/dn/%u/#
pattern read {root}/agg/#
pattern read {root}/ca/trust
# What a device says to itself, to see that messages come through: `fleetune doctor`.
pattern read {root}/up/%u/echo

user aggregator
topic readwrite {root}/g/#
topic readwrite {root}/agg/#
topic read {root}/st/#
topic read {root}/up/#
topic write {root}/dn/#

user authority
topic readwrite {root}/ca/trust
topic read {root}/st/+/id
topic read {root}/up/+/renew
topic read {root}/enroll/+/request
topic write {root}/enroll/+/reply
topic write {root}/dn/+/renew
topic write {root}/dn/+/renewed
"""

_ENROLMENT_ACL = """\
# %c is the client id: here the id of a token.
pattern write {root}/enroll/%c/request
pattern read {root}/enroll/%c/reply
"""

_DENIED = """
user {name}
topic deny #
"""


def write_broker(authority: Authority, folder: Path) -> None:
    """Write all that a broker of the fleet needs.

    Args:
        authority: The fleet's.
        folder: Where to write it.

    Raises:
        OSError: It cannot be written.
    """
    key, certificate = authority.certify_broker()
    write_private(folder / KEY, key)
    write_atomic(folder / CERTIFICATE, certificate)
    limits = (resources.files("fleetune.server") / "mosquitto.conf").read_text(encoding="utf-8").splitlines()
    kept = limits[limits.index(_LIMITS_BEGIN) + 1 :]
    names = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, str)}
    listeners = _LISTENERS.format(
        **names,
        folder=Path(authority.site.installed or folder).resolve(),
        fleet=authority.fleet,
        port=authority.site.port,
        enrolment_port=authority.site.enrolment_port,
    )
    write_atomic(folder / CONFIG, ("\n".join(kept).strip() + listeners).encode())
    write_atomic(folder / ENROLMENT_ACL, _ENROLMENT_ACL.format(root=_root(authority)).encode())
    write_revocations(authority, folder)


def write_revocations(authority: Authority, folder: Path) -> None:
    """Write who is revoked, for certificates that come (the list) and for connections that are there (the ACL).

    Whoever got something since, or a token for it, has its rights again.

    Raises:
        OSError: It cannot be written.
    """
    rows = authority.ledger.members()
    current = {row.name for row in rows if row.revoked is None} | {token.device for token in authority.ledger.tokens()}
    denied = sorted({row.name for row in rows if row.revoked is not None} - current)
    acl = _ACL.format(root=_root(authority)) + "".join(_DENIED.format(name=name) for name in denied)
    write_atomic(folder / ROOTS, "".join(authority.trust.roots).encode())
    write_atomic(folder / REVOKED, authority.revocations())
    write_atomic(folder / ACL, acl.encode())


def reload_broker(folder: Path) -> bool:
    """Have a Mosquitto of this machine that was started from this folder read the files again.

    Returns:
        Whether it was told; not if there is none, or if it is somebody else's.
    """
    try:
        process = int((folder / PID).read_text(encoding="utf-8"))
        name = Path(f"/proc/{process}/comm").read_text(encoding="utf-8").strip()
    except (FileNotFoundError, ValueError):
        return False
    if name != "mosquitto":
        return False
    try:
        os.kill(process, signal.SIGHUP)
    except PermissionError:
        return False
    return True


def _root(authority: Authority) -> str:
    return f"ft/{PROTOCOL}/{authority.fleet}"
