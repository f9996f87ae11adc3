"""A board that is none: it says yes to everything, or nothing at all."""

from __future__ import annotations

import time
from typing import ClassVar

import attr
from labgrid.driver import Driver
from labgrid.driver.commandmixin import CommandMixin
from labgrid.factory import target_factory
from labgrid.protocol import CommandProtocol, DigitalOutputProtocol, PowerProtocol
from labgrid.strategy import Strategy

from fleetune.tools.hil.strategy import FleetuneStrategy


@target_factory.reg_driver
@attr.s(eq=False)
class StandInDriver(CommandMixin, Driver, CommandProtocol):  # type: ignore[misc]
    bindings = {}  # noqa: RUF012 (labgrid's)
    silent = attr.ib(default=False)
    hangs = attr.ib(default=False)

    def run(self, cmd: str, **_: object) -> tuple[list[str], list[str], int]:
        while self.hangs:  # in short steps: where another thread gets a signal, a sleeping main thread sleeps on
            time.sleep(0.1)
        if self.silent:
            raise TimeoutError("the board does not answer")
        return (["active"] if "is-active" in cmd else []), [], 0

    def run_check(self, cmd: str, **_: object) -> list[str]:
        return self.run(cmd)[0]

    def get_status(self) -> int:
        return 1


@target_factory.reg_driver
@attr.s(eq=False)
class LabStrategy(FleetuneStrategy):
    """A lab's own."""


@target_factory.reg_driver
@attr.s(eq=False)
class ForeignStrategy(Strategy):  # type: ignore[misc]
    """One of another project."""

    bindings = {}  # noqa: RUF012 (labgrid's)


@attr.s(eq=False)
class _Recorded(Driver):  # type: ignore[misc]
    """What was done to it, in the order in which it was done to any of them."""

    bindings = {}  # noqa: RUF012 (labgrid's)
    DONE: ClassVar[list[str]] = []

    def done(self, what: str) -> None:
        self.DONE.append(f"{self.name or type(self).__name__}: {what}")


@target_factory.reg_driver
@attr.s(eq=False)
class StandInPowerDriver(_Recorded, PowerProtocol):  # type: ignore[misc]
    def on(self) -> None:
        self.done("on")

    def off(self) -> None:
        self.done("off")

    def cycle(self) -> None:
        self.done("cycle")


@target_factory.reg_driver
@attr.s(eq=False)
class StandInSwitchDriver(_Recorded, DigitalOutputProtocol):  # type: ignore[misc]
    def get(self) -> bool:
        return False

    def set(self, status: bool) -> None:
        self.done("closed" if status else "open")
