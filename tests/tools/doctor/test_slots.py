"""The slots of an Orin's root file system."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fleetune.tools.doctor.slots import check_slots

GUID = "781e084c-a330-417c-b678-38e696380cb9"
NORMAL, STUCK = b"\x07\0\0\0\0\0\0\0", b"\x07\0\0\0\xff\0\0\0"


def board(folder: Path, a: bytes, b: bytes) -> Path:
    place = folder / "sys/firmware/efi/efivars"
    place.mkdir(parents=True)
    (place / f"RootfsStatusSlotA-{GUID}").write_bytes(a)
    (place / f"RootfsStatusSlotB-{GUID}").write_bytes(b)
    return folder


def test_a_slot_that_the_firmware_gave_up_is_named_with_what_resets_it(tmp_path: Path) -> None:
    check = check_slots(board(tmp_path, NORMAL, STUCK))
    assert check is not None
    assert check.verdict == "note"
    assert check.found.startswith("A 0x00, B 0xFF: ")
    command = check.fix.partition("; ")[2].partition("; or ")[0].replace("/sys/", f"{tmp_path}/sys/")
    subprocess.run(["/bin/sh", "-c", command], check=True)
    check = check_slots(tmp_path)
    assert check is not None
    assert check.verdict == "ok"
    assert (tmp_path / f"sys/firmware/efi/efivars/RootfsStatusSlotB-{GUID}").read_bytes() == NORMAL


@pytest.mark.parametrize("value", [b"", b"\x07\0\0\0"])
def test_a_variable_without_a_value_says_nothing(tmp_path: Path, value: bytes) -> None:
    assert check_slots(board(tmp_path, value, value)) is None


def test_a_board_without_slots_has_no_such_check(tmp_path: Path) -> None:
    assert check_slots(tmp_path) is None
