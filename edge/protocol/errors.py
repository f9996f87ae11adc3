"""Every failure that a user can meet, with its exit code and its remedy.

A command prints ``error: <what happened>`` and ``remedy: <what to do>`` on standard error and exits with the
code of the class; `docs/exit-codes.md` has a section for each code.
"""

from __future__ import annotations

import re

import msgspec

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What ``msgspec.json.decode`` raises for bytes that are not the JSON that was asked for."""

_AT = re.compile(r" - at `\$\.?(?P<field>[^`]*)`$")


def field_and_reason(error: Exception) -> tuple[str, str]:
    """What msgspec found wrong: the field's path, empty where there is none, and the reason."""
    message = str(error)
    at = _AT.search(message)
    return (at["field"], message[: at.start()]) if at else ("", message)


def install_hint(extra: str) -> str:
    """How to install an extra."""
    return f"pip install '.[{extra}]' in a clone of Fleetune"


class FleetuneError(Exception):
    """Base of all errors that Fleetune raises on purpose.

    Args:
        what: What happened, naming the file, the field and the value where there are any.
        remedy: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what} ({self.remedy})"

    @property
    def public(self) -> str:
        """What may leave the device: the whole of it, unless a class keeps something back."""
        return str(self)


class ConfigError(FleetuneError):
    """A file or an option that a user wrote does not fit its schema."""

    exit_code = 10


class AssetError(FleetuneError):
    """A backbone or data set is missing, or its bytes are not the ones that were pinned."""

    exit_code = 11


class UnsupportedBackboneError(FleetuneError):
    """The backbone's architecture or weights are not ones that Fleetune can pack."""

    exit_code = 12


class PackError(FleetuneError):
    """A pack is incomplete, altered, or made for another version of Fleetune."""

    exit_code = 13


class BudgetError(FleetuneError):
    """No plan fits the device's budget, not even one active block."""

    exit_code = 14


class BrokerUnreachableError(FleetuneError):
    """Nothing answers at the broker's address, or it went away and stayed away."""

    exit_code = 15


class BrokerProtocolError(FleetuneError):
    """The broker answers, but refuses MQTT 5 or this client."""

    exit_code = 16


class DataError(FleetuneError):
    """A device's data file does not fit its schema or the pack.

    Args:
        public: The reason without file, line or value, for the network; by default only that there is one.
    """

    exit_code = 17

    def __init__(self, what: str, remedy: str, *, public: str = "its data do not fit") -> None:
        super().__init__(what, remedy)
        self._public = public

    @property
    def public(self) -> str:
        """The reason, without anything of the data."""
        return f"{self._public} (the device's own log says where)"


class RunFolderError(FleetuneError):
    """A run's folder holds something that this command must not touch."""

    exit_code = 18


class RunFailedError(FleetuneError):
    """A process of the run ended early, or the fleet did not finish in time."""

    exit_code = 19


class FileAccessError(FleetuneError):
    """A file or folder cannot be read or written."""

    exit_code = 21


class ModelError(FleetuneError):
    """A model file is damaged, of another schema, or was trained on another pack."""

    exit_code = 22


class AuthorityError(FleetuneError):
    """A fleet's authority exists already, or is not where it should be."""

    exit_code = 23


class EnrolmentError(FleetuneError):
    """A token has expired, was used, or belongs to somebody else; or nobody answers."""

    exit_code = 24


class KeyExposedError(FleetuneError):
    """Others than its owner may read a private key."""

    exit_code = 25


class IdentityError(FleetuneError):
    """This machine has no identity, or one that does not count: of another fleet or authority, expired, or revoked."""

    exit_code = 26


class ClockError(FleetuneError):
    """The clock shows a time that has passed for sure."""

    exit_code = 27


class DuplicateDeviceError(ConfigError):
    """Two devices of a fleet file have one id."""

    exit_code = 28


class SignatureError(FleetuneError):
    """A pack, a release or an image is not signed, was altered, or was signed by somebody else."""

    exit_code = 29


class PrivacyError(FleetuneError):
    """A job would tell more of a device's data than the device's owner allows."""

    exit_code = 46


class MessageError(FleetuneError):
    """Bytes from the network are not a message of this protocol, or exceed its limits.

    Args:
        reason: A short code that the other side sees, such as ``payload-too-large``.
    """

    exit_code = 20

    def __init__(self, what: str, remedy: str, *, reason: str) -> None:
        super().__init__(what, remedy)
        self.reason = reason
