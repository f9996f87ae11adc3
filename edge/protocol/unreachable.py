"""Why there is no connection, in words that help: found by one more attempt, step by step."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import BrokerUnreachableError, FleetuneError, IdentityError, install_hint
from fleetune.edge.protocol.identity.clock import Clock
from fleetune.edge.protocol.identity.tls import out_of_date

_WITHIN = 2.0
"""Seconds for each step."""

_REFUSALS = {
    "CERTIFICATE_REVOKED": (
        "this machine's certificate is revoked",
        "enrol it again with a new token, if it belongs to the fleet",
    ),
    "CERTIFICATE_EXPIRED": ("this machine's certificate has expired", "enrol it again"),
    "UNKNOWN_CA": ("this machine's certificate is of another authority", "enrol it with the fleet's authority"),
    "PROTOCOL_VERSION": ("it does not speak TLS 1.3", "use a broker that does"),
    "UNSUPPORTED_PROTOCOL": ("it does not speak TLS 1.3", "use a broker that does"),
    "WRONG_VERSION_NUMBER": ("it does not speak TLS there", "name the port where it does"),
    "CERTIFICATE_REQUIRED": ("it wants a certificate from this machine", "enrol it, and use --identity"),
}
"""What a broker says, by OpenSSL's name of the alert, what it means, and its remedy."""


def why_not(address: BrokerAddress, context: Callable[[], ssl.SSLContext], clock: Clock) -> FleetuneError:
    """The error of a broker that cannot be used.

    Args:
        address: The broker.
        context: Makes what TLS connects with.
        clock: What the broker's certificate is judged by.
    """
    try:
        with socket.create_connection((address.host, address.port), timeout=_WITHIN) as plain:
            if not address.tls:
                return _unreachable(address, "it accepts connections but does not answer")
            with context().wrap_socket(plain, server_hostname=address.host) as secured:
                if why := out_of_date(secured.getpeercert() or {}, clock.at_least):
                    what = f"the certificate of the broker at {address}: {why}"
                    return IdentityError(what, "give the broker a new one: `fleetune fleet rotate broker`")
                secured.recv(1)  # in TLS 1.3 a certificate that is refused shows only now
    except ssl.SSLCertVerificationError as error:
        return IdentityError(
            f"the broker at {address} shows a certificate that does not count: {error.verify_message}",
            "use the host name that its certificate is for, and the roots of the fleet's authority",
        )
    except ssl.SSLError as error:
        reason = str(error.reason or error)
        alert = next((name for name in _REFUSALS if name in reason), "")
        what, remedy = _REFUSALS.get(alert, (f"TLS fails: {reason}", "see the broker's log"))
        return IdentityError(f"the broker at {address}: {what}", remedy)
    except FleetuneError as error:
        return error
    except TimeoutError:
        return _unreachable(address, "it accepts connections but does not answer")
    except OSError as error:
        return _unreachable(address, str(error))
    return _unreachable(address, "it hangs up")


def _unreachable(address: BrokerAddress, why: str) -> BrokerUnreachableError:
    return BrokerUnreachableError(
        f"no broker answers at {address}: {why}",
        f"check the address, or start a broker: Mosquitto, or `fleetune broker` ({install_hint('server')})",
    )
