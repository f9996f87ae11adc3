"""What an emulated board needs of this machine."""

from __future__ import annotations

from fleetune.edge.protocol.errors import ConfigError
from fleetune.tools.emulator.image import check_foreign
from fleetune.tools.hil.emulated import check_programs
from support.lacking import lacking


def need_emulator() -> None:
    """Skip the test, or fail it in CI, where a board cannot be emulated."""
    try:
        check_programs()
        check_foreign()
    except ConfigError as error:
        lacking(f"{error.what}: {error.remedy}")
