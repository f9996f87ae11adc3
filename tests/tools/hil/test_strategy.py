"""What the strategy does to a board's power and pins, on stand-ins that write it down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from labgrid import Environment
from labgrid.strategy import StrategyError

from fleetune.tools.hil import strategy as strategy_module

POWER, SWITCH = {"StandInPowerDriver": {"name": "power"}}, {"StandInSwitchDriver": {"name": "recovery"}}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a board's strategy, of drivers beside the one for commands."""
    monkeypatch.setattr(strategy_module, "_HELD_S", 0.0)

    def made(*drivers: dict[str, Any]) -> Any:
        document = {
            "targets": {"main": {"drivers": [{"StandInDriver": {}}, *drivers, {"FleetuneStrategy": {}}]}},
            "imports": ["fleetune.tools.hil.strategy", "support.standin"],
        }
        file = tmp_path / "environment.yaml"
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        strategy = Environment(str(file)).get_target().get_strategy()
        if strategy.power is not None:
            strategy.power.DONE.clear()
        return strategy

    return made


def test_a_jetson_is_held_in_recovery_mode_while_it_is_switched_on(make: Callable[..., Any]) -> None:
    strategy = make(POWER, SWITCH)
    strategy.transition("recovery")
    assert strategy.power.DONE == ["power: off", "recovery: closed", "power: on", "recovery: open"]
    strategy.transition("provisioned")
    assert strategy.status.name == "provisioned"


def test_without_the_switch_the_power_stays_as_it_is(make: Callable[..., Any]) -> None:
    strategy = make(POWER)
    with pytest.raises(StrategyError):
        strategy.transition("recovery")
    assert strategy.power.DONE == []


def test_a_board_without_power_control_comes_up_and_is_never_off(make: Callable[..., Any]) -> None:
    strategy = make()
    strategy.transition("provisioned")
    with pytest.raises(StrategyError):
        strategy.transition("off")


def test_a_card_is_not_written_while_its_board_is_on(make: Callable[..., Any]) -> None:
    strategy = make(POWER)
    strategy.transition("provisioned")
    with pytest.raises(StrategyError, match="only written while it is off"):
        strategy.write_card("card.img")
