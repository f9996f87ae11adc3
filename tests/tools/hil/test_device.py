"""A board that answers, but not what it was asked: stand-ins for what a real one says on a bad day."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.tools.hil.device import DeviceUnderTest


@dataclass
class Strategy:
    """A board whose console says one thing, whatever the command."""

    says: list[str]
    code: int = 0
    power: Any = None
    console: Any = None

    @property
    def command(self) -> Strategy:
        return self

    def run(self, *_: str, **__: float) -> tuple[list[str], list[str], int]:
        return self.says, [], self.code

    def transition(self, status: str) -> None:
        pass


@pytest.mark.parametrize("says", [[], [""], ["active", "nano login:"], ["active", "17½"]])
def test_a_board_that_says_something_else_is_named_with_what_it_says(says: list[str]) -> None:
    board = DeviceUnderTest("nano-1", Strategy(says), frozenset())
    with pytest.raises(RunFailedError, match="nano-1 was asked for its time") as caught:
        board.restore()
    assert repr("\n".join(says)) in caught.value.what
    assert not board.is_known


def test_what_a_command_said_before_it_failed_is_repeated() -> None:
    board = DeviceUnderTest("nano-1", Strategy(["sh: systemctl: not found"], code=127), frozenset())
    with pytest.raises(RunFailedError, match="ended with 127: sh: systemctl: not found"):
        board.restart_agent()
