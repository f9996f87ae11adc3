"""What the farm says before anything long is begun, and what it calls as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.protocol.errors import ConfigError
from fleetune.tools.cli import main
from fleetune.tools.hil.farm import as_planned


@pytest.mark.parametrize("option", ["--boards=0", "--boards=17", "--rate=0"])
def test_a_number_out_of_range_is_refused(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["hil", "farm", option])
    assert ended.value.code == ConfigError.exit_code
    assert option.partition("=")[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("trained", "planned"), [([[1], [3]], True), ([[1, 1], [3, 2]], False), ([[1], []], False)])
def test_each_device_has_to_train_the_depth_that_was_planned(trained: list[list[int]], planned: bool) -> None:
    devices: dict[str, Any] = {
        name: {"plan": {"depth": depth}, "rounds": [{"depth": one} for one in depths]}
        for name, depth, depths in zip(("nano-1", "nano-2"), (1, 3), trained, strict=True)
    }
    assert as_planned({"devices": devices}) is planned
