"""The states of a board, as a labgrid strategy: off, in recovery mode, up, provisioned."""

from __future__ import annotations

import enum
import time
from typing import Any

import attr
from labgrid.driver import ShellDriver
from labgrid.exceptions import NoDriverFoundError
from labgrid.factory import target_factory
from labgrid.step import step
from labgrid.strategy import Strategy, StrategyError
from labgrid.strategy.common import never_retry

from fleetune.tools.firstboot.board import PROVISIONED
from fleetune.tools.places import AGENT, STATE
from fleetune.tools.waiting import wait_until

_LOOK_EVERY_S, _KEY_S, _HELD_S = 2.0, 0.3, 2.0
_ANSWERS_WITHIN_S = 120
"""A board that boots may take its time."""


class Status(enum.Enum):
    """Of a board."""

    unknown = 0
    off = 1
    recovery = 2
    up = 3
    provisioned = 4


@target_factory.reg_driver
@attr.s(eq=False)
class FleetuneStrategy(Strategy):
    """Brings a flashed board into a state.

    ``up``: programs can be run on it. ``provisioned``: its first boot is over, and its agent runs. ``recovery``: a
    Jetson waits on USB to be flashed; it needs a driver for a digital output named ``recovery``, which connects FC REC
    to GND. A board without a driver for its power is taken as it is, and is never off.

    Args:
        provision_timeout (int, default=1800): seconds that a first boot and its measurements may take
        wake_console (bool, default=True): whether a shell on a serial console is woken before it is spoken to
    """

    bindings = {  # noqa: RUF012 (labgrid's)
        "power": {"PowerProtocol", None},
        "command": "CommandProtocol",
        "console": {"ConsoleProtocol", None},
    }

    provision_timeout: int = attr.ib(default=1800, validator=attr.validators.instance_of(int))
    wake_console: bool = attr.ib(default=True, validator=attr.validators.instance_of(bool))
    status: Status = attr.ib(default=Status.unknown)

    @never_retry
    @step(args=["status"])
    def transition(self, status: Status | str, *, step: Any) -> None:
        """Bring the board into a state.

        Raises:
            StrategyError: It does not get there; tests that want this board are skipped from now on.
        """
        wanted = status if isinstance(status, Status) else Status[status]
        if wanted == Status.unknown:
            raise StrategyError(f"can not transition to {wanted}")
        if wanted == self.status:
            step.skip("nothing to do")
            return
        if wanted == Status.off:
            self._switch_off()
        elif wanted == Status.recovery:
            self._enter_recovery()
        elif wanted == Status.up:
            self._come_up()
        else:
            if self.status != Status.up:
                self._come_up()
            self._wait_provisioned()
        self.status = wanted

    @never_retry
    @step(args=["status"])
    def force(self, status: Status | str) -> None:
        """Believe that the board is in a state already."""
        wanted = status if isinstance(status, Status) else Status[status]
        if wanted in (Status.up, Status.provisioned):
            self.open_shell(self.command)
        self.status = wanted

    @step()
    def cut_power(self) -> None:
        """Cut the power, put it on again, and wait until the board is up.

        Raises:
            StrategyError: Nobody here can.
        """
        if self.power is None:
            raise StrategyError(f"{self.target.name} has no driver for its power")
        self.target.deactivate(self.command)
        self.target.activate(self.power)
        self.power.cycle()
        self.open_shell(self.command)
        self.status = Status.up

    @step(args=["image"])
    def write_card(self, image: str) -> None:
        """Write an image to the card of a board that is off, through an SD multiplexer.

        Args:
            image: File; labgrid's USBStorageDriver writes it.

        Raises:
            StrategyError: The board is not off, or has no multiplexer.
        """
        if self.status != Status.off:
            raise StrategyError(f"{self.target.name} is {self.status.name}: its card is only written while it is off")
        multiplexer, storage = self._driver("USBSDMuxDriver"), self._driver("USBStorageDriver")
        multiplexer.set_mode("host")
        try:
            storage.write_image(image)
        finally:
            multiplexer.set_mode("dut")

    def _driver(self, kind: str, name: str | None = None) -> Any:
        try:
            return self.target.get_driver(kind, name=name)
        except NoDriverFoundError as error:
            raise StrategyError(f"{self.target.name}: {error}") from error

    def _switch_off(self) -> None:
        self.target.deactivate(self.command)
        if self.power is None:
            raise StrategyError(f"{self.target.name} has no driver for its power")
        self.target.activate(self.power)
        self.power.off()

    def _enter_recovery(self) -> None:
        switch = self._driver("DigitalOutputProtocol", "recovery")
        self._switch_off()
        switch.set(True)
        try:
            self.power.on()
            time.sleep(_HELD_S)
        finally:
            switch.set(False)

    def _come_up(self) -> None:
        if self.power is not None:
            self.target.activate(self.power)
            self.power.on()
        self.open_shell(self.command)
        self.command.run("true", timeout=_ANSWERS_WITHIN_S)

    def open_shell(self, shell: Any) -> None:
        """Activate a driver for commands.

        Whoever had a serial console before may have left a pager open there, or half a line: it is interrupted, asked
        to quit, and the line is cleared, which a login prompt does not mind.
        """
        if self.wake_console and isinstance(shell, ShellDriver):
            self.target.activate(self.console)
            for key in (b"\x03", b"q", b"\x15"):
                self.console.write(key)
                time.sleep(_KEY_S)
        self.target.activate(shell)

    def _wait_provisioned(self) -> None:
        def state() -> str:
            said = f"test -e /{STATE}/{PROVISIONED} && systemctl is-active {AGENT}"
            out, _, _ = self.command.run(said, timeout=_ANSWERS_WITHIN_S)
            return out[0].strip() if out else "not provisioned"

        def late() -> StrategyError:
            return StrategyError(
                f"{self.target.name} was not provisioned in {self.provision_timeout} s (its agent: {state()}): "
                f"journalctl -u fleetune-firstboot -u {AGENT} on it says why"
            )

        wait_until(lambda: state() == "active", self.provision_timeout, late, every_s=_LOOK_EVERY_S)
