"""A board that is none: it says yes to everything, or nothing at all."""

from __future__ import annotations

import attr
from labgrid.driver import Driver
from labgrid.driver.commandmixin import CommandMixin
from labgrid.factory import target_factory
from labgrid.protocol import CommandProtocol


@target_factory.reg_driver
@attr.s(eq=False)
class StandInDriver(CommandMixin, Driver, CommandProtocol):  # type: ignore[misc]
    bindings = {}  # noqa: RUF012 (labgrid's)
    silent = attr.ib(default=False)

    def run(self, cmd: str, **_: object) -> tuple[list[str], list[str], int]:
        if self.silent:
            raise TimeoutError("the board does not answer")
        return (["active"] if "is-active" in cmd else []), [], 0

    def run_check(self, cmd: str, **_: object) -> list[str]:
        return self.run(cmd)[0]

    def get_status(self) -> int:
        return 1
