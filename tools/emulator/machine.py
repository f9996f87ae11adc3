"""The emulated board: a Cortex-A57 with the memory of a Jetson Nano, as ``qemu-system-aarch64 -M virt`` has it."""

from __future__ import annotations

import base64
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.tools.emulator.channel import Channel
from fleetune.tools.emulator.image import Image
from fleetune.tools.ext4 import put_files
from fleetune.tools.programs import find_program, run_program

HOST = "10.0.2.2"
"""Where the board finds the machine that emulates it."""

CONSOLE = "console.log"

_DISK_MIB = 4096
_PATIENCE_S = 10.0
_MONITOR, _AGENT = "monitor", "agent"


@dataclass(frozen=True)
class Answer:
    """What a program on the board came to.

    Attributes:
        code: Its exit status.
        out: What it printed.
        err: What it complained about.
    """

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Machine:
    """A board that runs.

    Attributes:
        folder: Its disk, its sockets, and ``console.log``.
        process: QEMU.
    """

    folder: Path
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """See that it still runs.

        Raises:
            RunFailedError: It does not.
        """
        if self.process.poll() is not None:
            said = (self.folder / "qemu.log").read_text(encoding="utf-8", errors="replace").strip()[-300:]
            raise RunFailedError(f"QEMU ended with {self.process.returncode}: {said}", f"see {self.folder}")

    def wait_up(self, timeout_s: float) -> None:
        """Wait until programs can be run on it.

        Raises:
            RunFailedError: It does not come up in time.
        """
        ends = time.monotonic() + timeout_s
        while time.monotonic() < ends:
            self.check()
            try:
                with Channel(self.folder / _AGENT, 5.0) as channel:
                    channel.wake()
                    return
            except OSError:  # not yet
                time.sleep(1.0)
        raise RunFailedError(
            f"the board did not come up in {timeout_s:.0f} s", f"see {self.folder / CONSOLE}, what it said last"
        )

    def run(self, *command: str, timeout_s: float = 120.0) -> Answer:
        """Run a program on the board, as root, to its end.

        Raises:
            RunFailedError: There is no such program, or it does not end in time.
            OSError: The board does not answer.
        """
        with Channel(self.folder / _AGENT, timeout_s) as channel:
            channel.wake()
            number = channel.ask("guest-exec", path=command[0], arg=list(command[1:]), **{"capture-output": True})
            ends = time.monotonic() + timeout_s
            while time.monotonic() < ends:
                state = channel.ask("guest-exec-status", pid=number["pid"])
                if state["exited"]:
                    out, err = (
                        base64.b64decode(state.get(name, "")).decode("utf-8", "replace")
                        for name in ("out-data", "err-data")
                    )
                    return Answer(state.get("exitcode", -state.get("signal", 0)), out, err)
                time.sleep(0.2)
        raise RunFailedError(f"{command[0]} did not end in {timeout_s:.0f} s on the board", f"see {self.folder}")

    def cut_power(self) -> None:
        """Cut the power, and put it on again: what was not written to the disk is gone."""
        with Channel(self.folder / _MONITOR, _PATIENCE_S) as channel:
            channel.greet()
            channel.ask("system_reset")

    def stop(self) -> None:
        """Cut the power for good."""
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def make_disk(image: Image, folder: Path, files: dict[str, Path] | None = None) -> Path:
    """A disk of 4 GiB for one board, with the image's file system at its beginning.

    Args:
        image: It stays as it is.
        folder: For the disk.
        files: Path on the board → file that is put there, with its mode.

    Raises:
        ConfigError: A program is missing.
        RunFailedError: The disk cannot be written.
    """
    disk = folder / "disk.img"
    remedy = f"see that {folder} has room"
    run_program(["cp", "--sparse=always", "--reflink=auto", image.rootfs, disk], remedy)
    if files:
        put_files(disk, files)
    with disk.open("r+b") as stream:
        stream.truncate(_DISK_MIB << 20)
    return disk


@contextmanager
def machine(image: Image, folder: Path, disks: Sequence[Path], *, memory_mib: int = 2048) -> Iterator[Machine]:
    """Start a board; it stops with the block, whatever happens in it.

    Args:
        image: Its kernel.
        folder: For its sockets and its console.
        disks: Its disks; it starts from the first.
        memory_mib: Its memory.

    Raises:
        ConfigError: QEMU is missing.
    """
    program = find_program("qemu-system-aarch64", "qemu-system-arm")
    command = [
        *(program, "-M", "virt", "-cpu", "cortex-a57", "-smp", str(min(4, os.cpu_count() or 1))),
        *("-m", f"{memory_mib}M", "-display", "none", "-serial", f"file:{CONSOLE}"),
        *("-kernel", str(image.kernel.resolve()), "-initrd", str(image.initrd.resolve())),
        *("-append", "root=/dev/vda rw console=ttyAMA0 net.ifnames=0 psi=1 panic=10"),
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
        *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,path={_AGENT},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
        *("-qmp", f"unix:{_MONITOR},server=on,wait=off"),
    ]
    for number, disk in enumerate(disks):
        command += ["-drive", f"if=none,id=disk{number},format=raw,file={str(disk.resolve()).replace(',', ',,')}"]
        command += ["-device", f"virtio-blk-pci,drive=disk{number}"]
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    running = Machine(folder, process)
    try:
        yield running
    finally:
        running.stop()
