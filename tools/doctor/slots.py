"""The slots of an Orin's root file system: one that its firmware has given up never starts again by itself."""

from __future__ import annotations

from pathlib import Path

from fleetune.edge.protocol.files import read_bytes
from fleetune.tools.doctor.host import Check

_FOLDER = "sys/firmware/efi/efivars"
_VARIABLE = "RootfsStatusSlot{}-781e084c-a330-417c-b678-38e696380cb9"
"""Four bytes of attributes, then the status (NVIDIA, edk2-nvidia, NVIDIAConfiguration.h)."""

_ATTRIBUTES = b"\7\0\0\0"
_NORMAL, _UNBOOTABLE = 0x00, 0xFF


def check_slots(root: Path = Path("/")) -> Check | None:
    """What the firmware thinks of each slot; None where there are none."""
    statuses = dict[str, int]()
    for slot in "AB":
        try:
            value = read_bytes(root / _FOLDER / _VARIABLE.format(slot), 16)
        except OSError:  # no such firmware, or not for this user
            continue
        if len(value) >= len(_ATTRIBUTES) + 1:
            statuses[slot] = value[len(_ATTRIBUTES)]
    if not statuses:
        return None
    told = ", ".join(f"{slot} 0x{status:02X}" for slot, status in statuses.items())
    stuck = [slot for slot, status in statuses.items() if status == _UNBOOTABLE]
    if not stuck:
        return Check("slots", "ok", told)
    variable = f"/{_FOLDER}/{_VARIABLE.format(stuck[0])}"
    written = "".join(f"\\{byte:o}" for byte in (*_ATTRIBUTES, _NORMAL, 0, 0, 0))
    return Check(
        "slots",
        "note",
        f"{told}: the firmware has given up slot {' and '.join(stuck)}, also for a new image",
        f"as root: chattr -i {variable}; printf '{written}' > {variable}; or flash the board with --erase",
    )
