"""A board's seed, looked at before the board is touched."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from fleetune.edge.protocol.errors import ConfigError, EnrolmentError
from fleetune.edge.protocol.files import read_bytes
from fleetune.edge.protocol.identity.enrolment import MAX_TOKEN, Token
from fleetune.profiles.fleet import FleetDevice
from fleetune.tools.firstboot.seed import FLEET_FILE, MAX_FILE, SEED_FILE, SOON_S, TOKEN_FILE, read_seed


def check_seed(folder: Path, device: FleetDevice | None = None) -> str:
    """See that a seed is whole, still counts, and is for this device.

    Args:
        folder: Of the seed.
        device: For whom it has to be; None for anybody.

    Returns:
        SHA-256 of its token: another seed is another one.

    Raises:
        ConfigError: It is not, with what to do.
    """
    again = f"make it: `fleetune flash seed --form folder{f' --device {device.id}' if device else ''} --renew`"
    for name in (SEED_FILE, FLEET_FILE, TOKEN_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} is no seed that could be used: {name} is missing", again)
    seed = read_seed(read_bytes(folder / SEED_FILE, MAX_FILE), str(folder / SEED_FILE))
    raw = read_bytes(folder / TOKEN_FILE, MAX_TOKEN)
    try:
        token = Token.parse(raw.decode("ascii", "replace"))
    except EnrolmentError as error:
        raise ConfigError(f"{folder / TOKEN_FILE}: {error.what}", again) from error
    if device is not None and {seed.device, token.device} != {device.id}:
        raise ConfigError(f"{folder} is the seed of {seed.device}, not of {device.id}", again)
    if device is not None and seed.serial is not None and seed.serial != device.serial:
        raise ConfigError(f"{folder} is for the board {seed.serial}, {device.id} is {device.serial or 'any'}", again)
    if token.expires < time.time() + SOON_S:
        raise ConfigError(f"the token in {folder} counts no more", again)
    return hashlib.sha256(raw).hexdigest()
