"""``fleetune status``: what a person sees of an aggregator's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.edge.protocol.messages import Announcement, Presence, UpdateManifest
from fleetune.server.journal import Accepted, Announced, Closed, Journal, Quarantined, Record, Refused
from fleetune.server.privacy import Guarantee
from fleetune.server.store import FILE, open_store


def announced(version: int) -> Announced:
    return Announced(
        Announcement(
            fleet="lab", run="r", job="fedms", version=version, method="fedms", stage="global", round=version, rounds=9,
            backbone="b", quantisation="nf4", settings={"depth": 2}, issued=0.0, expires=0.0,
        )
    )  # fmt: skip


def accepted(device: str, version: int, into: int) -> Accepted:
    manifest = UpdateManifest(
        fleet="lab", device=device, update=f"u-{version}", run="r", job="fedms", version=version, issued=0.0,
        backbone="b",
        samples=1, metrics={},
    )  # fmt: skip
    return Accepted(manifest, 5.0, into, into - version)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "aggregator")
    records: list[Record] = [
        announced(1), accepted("nano-1", 1, 1), Closed("fedms", 1, ["nano-1"], 10.0, 0, {"val": 0.75}),
        announced(2), accepted("nano-2", 1, 2), Refused("nano-3", "wrong-shape", 11.0),
        Quarantined("nano-3", "wrong-shape", 11.0),
    ]  # fmt: skip
    journal.append(*records)
    store = open_store(journal)
    store.see([Presence("nano-1", "idle", 3, "0.1.0", detail="waits: no room")], 7.0)
    store.refuse("nano-2", "not-finite")
    store.see([Presence("nano-3", "idle", 1, "0.1.0", detail="fine\nnano-9  idle \x1b[2J\u202e")], 7.0)
    store.close()
    journal.close()
    return tmp_path / "aggregator"


def status(state: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleetune.tools.cli", "status", "--state", str(state), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_devices_and_rounds_are_shown(state: Path) -> None:
    done = status(state)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line]
    assert rows[1][:2] == ["nano-1", "idle"]
    assert rows[1][-8:] == ["3", "1", "0", "0", "-", "waits:", "no", "room"]
    assert rows[2][0] == "nano-2"
    assert rows[2][-5:] == ["0", "1", "1", "not-finite", "-"]
    assert rows[3][:4] == ["nano-3", "idle,", "quarantined:", "wrong-shape"]
    assert rows[5][:5] == ["fedms", "global", "1", "2", "1"]
    assert rows[5][-1] == "0.750"
    assert "open" in rows[6]


def test_what_a_device_says_is_one_line_and_moves_no_cursor(state: Path) -> None:
    shown = status(state).stdout
    assert "fine\\nnano-9  idle \\x1b[2J\\u202e" in shown
    assert not any(line.startswith("nano-9") for line in shown.splitlines())
    assert shown.isascii()


def test_all_of_it_comes_as_json(state: Path) -> None:
    found = json.loads(status(state, "--json").stdout)
    assert [device["late"] for device in found["devices"]] == [0, 1, 0]
    assert [device["quarantined"] for device in found["devices"]] == ["", "", "wrong-shape"]
    assert [(row["version"], row["answers"], row["means"]) for row in found["rounds"]] == [
        (1, 1, {"val": 0.75}),
        (2, 0, {}),
    ]


def test_only_the_newest_rounds_are_shown(state: Path) -> None:
    assert "0.750" not in status(state, "--rounds", "1").stdout


def test_a_folder_of_something_else_is_refused(tmp_path: Path, state: Path) -> None:
    done = status(tmp_path)
    assert done.returncode == 10
    assert str(tmp_path / FILE) in done.stderr
    for file in state.glob(f"{FILE}*"):
        file.unlink()
    (state / FILE).write_bytes(b"no database at all" * 100)
    done = status(state)
    assert done.returncode == 10
    assert "Traceback" not in done.stderr


def test_how_private_the_devices_were_is_shown(state: Path) -> None:
    assert "ε" not in status(state).stdout
    assert json.loads(status(state, "--json").stdout)["privacy"] == {}
    guarantee = Guarantee({"model": 3.5, "device": 3.75, "aggregator": 41.0}, 1e-5, 0.5, 0.5, 0.02, 9, 9, 20.0)
    journal = Journal(state)
    journal.save_guarantee("fedms", guarantee)
    journal.close()
    assert f"fedms: {guarantee.in_words()}" in status(state).stdout
    assert json.loads(status(state, "--json").stdout)["privacy"]["fedms"]["epsilon"]["device"] == 3.75
    (state / "fedms" / "privacy.json").write_bytes(b"{")
    done = status(state)
    assert done.returncode == 10
    assert "privacy.json" in done.stderr
