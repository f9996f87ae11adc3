"""The emulator is a processor like the board's, and no better one."""

from __future__ import annotations

import json
import signal

import pytest

from emulated.device import Device

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

DOT_PRODUCT = """\
import ctypes, mmap, struct

# sdot v0.4s, v0.16b, v0.16b; ret: optional before ARMv8.4, absent from ARMv8.0
page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(struct.pack("<II", 0x4E809400, 0xD65F03C0))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""

DESCRIPTION = """\
import json, platform, sys
from pathlib import Path
print(json.dumps({
    "machine": platform.machine(),
    "parts": [line.split()[-1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "CPU part" in line],
    "prefix_in_root": sys.prefix.startswith(sys.argv[1]),
}))
"""


def test_an_instruction_that_the_processor_lacks_kills_the_process(device: Device) -> None:
    done = device.run("-c", DOT_PRODUCT)
    wanted = -signal.SIGILL if device.env["QEMU_CPU"] == "cortex-a57" else 0
    assert done.returncode == wanted, done.stderr


def test_python_sees_the_board_and_not_this_machine(device: Device) -> None:
    done = device.run("-c", DESCRIPTION, device.python.parents[2])
    found = json.loads(done.stdout)
    part = {"cortex-a57": "0xd07", "cortex-a76": "0xd0b"}[device.env["QEMU_CPU"]]
    assert found["machine"] == "aarch64"
    assert found["parts"] == [part] * 4
    assert found["prefix_in_root"]
