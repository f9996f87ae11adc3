"""A labgrid driver that speaks to the emulated board through the agent that QEMU has in it: no prompt, no pager."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import attr
from labgrid.driver import Driver
from labgrid.driver.commandmixin import CommandMixin
from labgrid.factory import target_factory
from labgrid.protocol import CommandProtocol
from labgrid.step import step

from fleetune.tools.emulator.guest import Guest


@target_factory.reg_driver
@attr.s(eq=False)
class GuestAgentDriver(CommandMixin, Driver, CommandProtocol):
    """Runs commands, as root.

    Args:
        socket (str): QEMU's end of the port ``org.qemu.guest_agent.0``
        boot_timeout (int, default=300): seconds that the board has to come up
    """

    # None to QEMUDriver: labgrid lets one driver at a time have its console, and would switch this one off for another.
    bindings: ClassVar[dict[str, str]] = {}
    priorities = {CommandProtocol: 20}  # noqa: RUF012 (labgrid's)

    socket: str = attr.ib(validator=attr.validators.instance_of(str))
    boot_timeout: int = attr.ib(default=300, validator=attr.validators.instance_of(int))

    @property
    def _guest(self) -> Guest:
        path = Path(self.target.env.config.resolve_path(self.socket))
        return Guest(path, path.with_name("console.log"))

    def on_activate(self) -> None:
        """Wait until the board is up."""
        self._guest.wait_up(self.boot_timeout)

    def _run(
        self, cmd: str, *, timeout: float = 30.0, codec: str = "utf-8", decodeerrors: str = "strict"
    ) -> tuple[list[str], list[str], int]:
        del codec, decodeerrors  # what is no UTF-8 is replaced
        answer = self._guest.run("/bin/sh", "-c", cmd, timeout_s=timeout)
        return answer.stdout.splitlines(), answer.stderr.splitlines(), answer.returncode

    @Driver.check_active
    @step(args=["cmd"], result=True)
    def run(
        self, cmd: str, *, timeout: float = 30.0, codec: str = "utf-8", decodeerrors: str = "strict"
    ) -> tuple[list[str], list[str], int]:
        """Run a command: its lines of output, its lines of complaint, its exit status."""
        return self._run(cmd, timeout=timeout, codec=codec, decodeerrors=decodeerrors)

    @Driver.check_active
    @step(args=["cmd"], result=True)
    def run_check(
        self, cmd: str, *, timeout: float = 30.0, codec: str = "utf-8", decodeerrors: str = "strict"
    ) -> list[str]:
        """Run a command that has to end well: its lines of output."""
        out: list[str] = self._run_check(cmd, timeout=timeout, codec=codec, decodeerrors=decodeerrors)
        return out

    @step()
    def get_status(self) -> int:
        """1, as labgrid has it for a shell that is there."""
        return 1
