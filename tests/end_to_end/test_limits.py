"""What a device does when it is too hot, or when others hold its memory: real agents, control groups and processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleetune.edge.protocol.errors import FileAccessError
from fleetune.edge.protocol.messages import encode
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.probes.limitedgroup import LimitedGroup
from fleetune.profiles.measured import Measured
from fleetune.profiles.profile import read_profile, write_profile
from fleetune.server.journal import Accepted
from fleetune.tools.bench.training.plan import hog
from support.trees import thermal_zone

ROUNDS = ("--global-rounds", "2", "--personal-rounds", "1", "--sal-start", "3")
GROUP_MIB = 320


@pytest.fixture
def group() -> Iterator[LimitedGroup]:
    """A control group with little memory."""
    try:
        group = LimitedGroup(GROUP_MIB)
    except FileAccessError as error:
        pytest.skip(f"needs a control group of its own: {error}")
    with group:
        yield group


@pytest.fixture
def zone(tmp_path: Path) -> Path:
    """The folder of a thermal zone that throttles from 97 °C."""
    return thermal_zone(tmp_path / "sensors", temperature_c=98, limit_c=97)


def test_a_device_that_throttles_waits_until_it_is_cooler_and_says_so(
    make_fleet: Any, embedded: str, zone: Path, tmp_path: Path
) -> None:
    fleet = make_fleet(embedded)
    serve = fleet.serve(*ROUNDS, "--deadline", "1")
    fleet.agent("big")
    small = fleet.agent("small", "--sensors", str(tmp_path / "sensors"))
    hot = "waits: CPU-therm is at 98 °C and throttles from 97; goes on at 92"
    fleet.wait_until(lambda: hot in small.output)
    fleet.wait_until(lambda: f"waits for small (idle: {hot})" in serve.output)
    assert [r.manifest.device for r in fleet.records() if isinstance(r, Accepted)] == ["big"]
    (zone / "temp").write_text("91000\n")
    assert serve.wait() == 0, serve.output


def test_costs_of_another_power_mode_are_measured_again(make_fleet: Any, embedded: str, tmp_path: Path) -> None:
    fleet = make_fleet(embedded)
    known = msgspec.json.decode(fleet.costs.read_bytes(), type=Costs)
    other = tmp_path / "costs.json"
    other.write_bytes(encode(msgspec.structs.replace(known, power_mode="9 cores, 918 MHz")))
    small = fleet.agent("small", "--costs", str(other))
    fleet.wait_until(lambda: "waits for a round" in small.output)
    assert "measured with power mode 9 cores, 918 MHz, this is " in small.output
    found = msgspec.json.decode((fleet.folder / "small" / "costs.json").read_bytes(), type=Costs)
    assert found.power_mode == known.power_mode
    again = fleet.agent("big")
    fleet.wait_until(lambda: "waits for a round" in again.output)
    assert "measures what training costs" not in again.output


def test_a_device_takes_its_costs_from_its_profile(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    costs = msgspec.json.decode(fleet.costs.read_bytes(), type=Costs)
    measured = Measured(
        taken="2026-01-31T12:00:00Z", device="a board", kernel="6", memory_mib=4000, backbone="tiny", costs=costs
    )
    profile = msgspec.structs.replace(read_profile("raspberry-pi-5"), name="cam", measured=(measured,))
    write_profile(fleet.folder / "cam.yaml", profile)
    fleet.write({"big": ("1GiB", 100.0), "small": ("1GiB", 100.0)}, profile="./cam.yaml")
    empty = fleet.folder / "none.json"
    empty.write_bytes(encode(msgspec.structs.replace(costs, kit="0.0.1")))
    small = fleet.agent("small", "--costs", str(empty))
    fleet.wait_until(lambda: "waits for a round" in small.output)
    assert "measured with kit 0.0.1" in small.output
    assert f"knows what training costs here from {len(costs.trials)} trials before" in small.output
    assert "measures what training costs" not in small.output


def test_a_round_waits_for_memory_that_others_hold_and_says_how_much(
    group: LimitedGroup, make_fleet: Any, embedded: str
) -> None:
    fleet = make_fleet(embedded)
    serve = fleet.serve(*ROUNDS, "--deadline", "1")
    fleet.agent("big")
    with hog(250, group, seconds=1.0) as neighbour:
        small = fleet.agent("small")
        group.add(small.process.pid)
        fleet.wait_until(lambda: re.search(r"waits: budget: memory: one active block needs \d+ MiB", small.output))
        fleet.wait_until(lambda: "waits for small (idle: waits: budget: memory" in serve.output)
        neighbour.kill()
    assert serve.wait() == 0, serve.output
    assert small.process.poll() is None
    assert not group.oom_kills


def test_a_neighbour_that_takes_memory_in_mid_round_costs_no_update(
    group: LimitedGroup, make_fleet: Any, embedded: str
) -> None:
    fleet = make_fleet(embedded)
    small = fleet.agent("small")
    group.add(small.process.pid)
    fleet.agent("big")
    serve = fleet.serve(*ROUNDS, "--epochs", "1200")  # longer than the neighbour needs to come
    fleet.wait_until(lambda: "global, 1 of" in serve.output)
    with hog(250, group, seconds=1.0):
        fleet.wait_until(lambda: "memory is short by" in small.output or "for want of memory" in small.output)
    assert serve.wait() == 0, serve.output
    updates = [r.manifest for r in fleet.records() if isinstance(r, Accepted) and r.manifest.device == "small"]
    first = next(update for update in updates if update.version == 1)
    assert first.metrics["eased"] >= 1
    assert first.payload is not None
    assert small.process.poll() is None
    assert not group.oom_kills
