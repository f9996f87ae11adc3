"""TLS to the broker: certificates on both sides, none older than TLS 1.3."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fleetune.edge.protocol.errors import IdentityError
from fleetune.edge.protocol.identity.clock import MAX_SKEW
from fleetune.edge.protocol.identity.folder import ROOTS_FILE, TLS_FILE, check_private

_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME: boards that woke up in the past judge by another clock than the system's."""


def client_context(folder: Path) -> ssl.SSLContext:
    """What a member of a fleet connects with: it shows its certificate, and wants one that ends at the fleet's roots.

    Validity in time is not checked here but by :func:`out_of_date`.

    Args:
        folder: With ``tls.pem`` and ``roots.pem``.

    Raises:
        IdentityError: A file is missing, or holds something else.
        KeyExposedError: Others may read the key.
    """
    own, roots = folder / TLS_FILE, folder / ROOTS_FILE
    for file, what in ((own, "the key and certificate of this machine"), (roots, "certificates of the roots")):
        if not file.is_file():
            raise IdentityError(f"{file} is missing: {what}", "enrol this machine, or copy it there")
    check_private(own)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= _NO_CHECK_TIME
    try:
        context.load_verify_locations(roots)
        context.load_cert_chain(own, password="")  # or OpenSSL would ask on the terminal
    except (ssl.SSLError, ValueError) as error:
        raise IdentityError(
            f"{own}, {roots}: {error}", "write them in PEM: the key first, then its certificate and those above it"
        ) from error
    return context


def enrolment_context() -> ssl.SSLContext:
    """What a device connects with before it belongs to a fleet.

    Nobody is authenticated: what is said there is authenticated by the token, and this only hides it from listeners.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def out_of_date(certificate: Mapping[str, Any], passed: float) -> str:
    """Why a certificate does not count any more; empty if it does, or if there is none.

    Args:
        certificate: What ``ssl.SSLSocket.getpeercert`` returns: nothing where nobody is authenticated.
        passed: Unix time that has passed for sure. A clock that is merely wrong must not keep a device from asking.
    """
    if not certificate:
        return ""
    expires = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    if passed > expires + MAX_SKEW:
        end, today = (datetime.fromtimestamp(when, timezone.utc) for when in (expires, passed))
        return f"it has expired on {end:%Y-%m-%d}, and {today:%Y-%m-%d} has passed for sure"
    return ""
