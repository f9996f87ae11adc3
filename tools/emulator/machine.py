"""The emulated board: a Cortex-A57 with the memory of a Jetson Nano, as ``qemu-system-aarch64 -M virt`` has it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.tools.emulator.channel import Channel
from fleetune.tools.emulator.guest import Guest
from fleetune.tools.emulator.image import Image
from fleetune.tools.ext4 import put_files
from fleetune.tools.programs import find_program, run_program

HOST = "10.0.2.2"
"""Where the board finds the machine that emulates it."""

MACHINE, CPU = "virt", "cortex-a57"
BOOT = "root=LABEL=fleetune rw net.ifnames=0 psi=1 panic=10 nokaslr"
"""Words to the kernel, beside where its console is. With random addresses it keeps page tables of its own, whatever the
processor (KPTI), and QEMU then forgets at each system call what it has looked up: a board is 1.6 times as slow."""

CONSOLE, DISK = "console.log", "disk.img"

_DISK_MIB = 4096
_PATIENCE_S = 10.0
_MONITOR, _AGENT = "monitor", "agent"


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

    @property
    def guest(self) -> Guest:
        """The agent in it."""
        return Guest(self.folder / _AGENT, self.folder / CONSOLE)

    def wait_up(self, timeout_s: float) -> None:
        """Wait until programs can be run on it.

        Raises:
            RunFailedError: It does not come up in time, or QEMU has ended.
        """
        self.guest.wait_up(timeout_s, self.check)

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
    disk = folder / DISK
    remedy = f"see that {folder} has room"
    run_program(["cp", "--sparse=always", "--reflink=auto", image.rootfs, disk], remedy)
    if files:
        put_files(disk, files)
    with disk.open("r+b") as stream:
        stream.truncate(_DISK_MIB << 20)
    return disk


def console_command(image: Image, disks: Sequence[Path], *, memory_mib: int) -> list[str]:
    """QEMU's command line for a board whose console is this terminal.

    Raises:
        ConfigError: QEMU is missing.
    """
    return [*_command(image, memory_mib), *peripherals(image, disks, disks[0].with_name(_AGENT)), "-nographic"]


def _command(image: Image, memory_mib: int) -> list[str]:
    program = find_program("qemu-system-aarch64", "qemu-system-arm")
    return [
        *(program, "-M", MACHINE, "-cpu", CPU, "-m", f"{memory_mib}M"),
        *("-kernel", str(image.kernel.resolve()), "-append", f"{BOOT} console=ttyAMA0"),
    ]


def peripherals(image: Image, disks: Sequence[Path], agent: Path) -> list[str]:
    """QEMU's options for what a board has beside its processor, its memory and its console.

    Args:
        image: Its kernel's helper.
        disks: Its disks.
        agent: Socket of the agent in it.
    """
    options = ["-smp", str(min(4, os.cpu_count() or 1)), "-initrd", str(image.initrd.resolve())]
    options += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    options += ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
    options += ["-chardev", f"socket,id=agent,path={_quoted(agent)},server=on,wait=off"]
    options += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    for number, disk in enumerate(disks):
        options += ["-drive", f"if=none,id=disk{number},format=raw,file={_quoted(disk.resolve())}"]
        options += ["-device", f"virtio-blk-pci,drive=disk{number}"]
    return options


def _quoted(path: Path) -> str:
    return str(path).replace(",", ",,")


@contextmanager
def machine(
    image: Image,
    folder: Path,
    disks: Sequence[Path],
    *,
    memory_mib: int = 2048,
    within: Callable[[list[str]], list[str]] = list,
) -> Iterator[Machine]:
    """Start a board; it stops with the block, whatever happens in it.

    Args:
        image: Its kernel.
        folder: For its sockets and its console.
        disks: Its disks; it starts from the first.
        memory_mib: Its memory.
        within: Makes of QEMU's command line the one that starts it elsewhere, such as in a network namespace.

    Raises:
        ConfigError: QEMU is missing.
    """
    command = _command(image, memory_mib) + peripherals(image, disks, Path(_AGENT))
    command += ["-display", "none", "-serial", f"file:{CONSOLE}", "-qmp", f"unix:{_MONITOR},server=on,wait=off"]
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            within(command), cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    running = Machine(folder, process)
    try:
        yield running
    finally:
        running.stop()
