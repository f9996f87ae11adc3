"""What an update takes from what systemd says of the agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.tools.update.services import Health, Systemd


@pytest.mark.parametrize(
    ("said", "health"),
    [
        ("ActiveState=active\nStatusText=waits for a round\nNRestarts=0\nJob=", "up"),
        ("ActiveState=active\nStatusText=waits for a round\nNRestarts=0", "up"),
        ("ActiveState=active\nStatusText=waits for a round\nNRestarts=0\nJob=372", "starting"),
        ("ActiveState=deactivating\nStatusText=\nNRestarts=0\nJob=372", "starting"),
        ("ActiveState=activating\nStatusText=measures: 3 of 20\nNRestarts=0\nJob=372", "starting"),
        ("ActiveState=activating\nStatusText=waits for the broker\nNRestarts=0\nJob=372", "waits"),
        ("ActiveState=activating\nStatusText=\nNRestarts=3\nJob=", "down"),
        ("ActiveState=failed\nStatusText=\nNRestarts=0\nJob=", "down"),
    ],
)
def test_an_agent_is_up_once_systemd_has_started_it(
    said: str, health: Health, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemctl"  # this machine's own has no agent
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert Systemd().health() == health
