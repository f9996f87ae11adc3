"""A board trains what this machine trains, within the memory that it has predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fleetune.edge.pack.pack import Pack
from fleetune.profiles.measured import Measured
from fleetune.server.broker import embedded_broker, free_port
from fleetune.server.journal import Closed
from fleetune.tools.firstboot.seed import FLEET_FILE
from fleetune.tools.hil.device import DeviceUnderTest
from fleetune.tools.hil.plugin import Measure, Serve
from fleetune.tools.hil.suite.jobs import DONE_WITHIN_S, model
from fleetune.tools.places import AGENT
from fleetune.tools.processes import processes
from fleetune.tools.rig import SMALL, Job, Rig

_MIB = 1 << 20
_EXACT = ("--codec", "f32")
"""In four bits a last digit may decide to which of 16 values a number is rounded."""


def test_what_it_has_measured_is_within_what_it_declares(
    fleet_device: DeviceUnderTest, rig: Rig, pack: Pack, measured: Measured, measure: Measure
) -> None:
    declared = rig.fleet.device(fleet_device.name).profile
    assert measured.costs.pack == pack.sha256
    assert declared.memory is not None
    assert max(trial.peak_mib for trial in measured.costs.trials) < declared.memory.mib
    total = int(fleet_device.run("grep MemTotal /proc/meminfo").split()[1]) / 1024
    assert total <= declared.memory.mib
    measure("memory", total, "MiB")
    measure("trials", len(measured.costs.trials), "")
    deepest = max(measured.costs.trials, key=lambda trial: (trial.depth, trial.micro_batch))
    measure(f"step of {deepest.micro_batch} samples at depth {deepest.depth}", deepest.step_s, "s")
    if deepest.watts is not None:
        measure("power", deepest.watts, "W")


def test_its_memory_peaks_where_it_has_predicted(
    fleet_device: DeviceUnderTest, pack: Pack, aggregator: Serve, measure: Measure
) -> None:
    """At three depths, the shallowest first: a peak is of a process's whole life."""
    fleet_device.restart_agent()
    shares = dict[int, float]()
    for depth in range(1, min(3, pack.manifest.blocks) + 1):
        job = aggregator(*SMALL, "--max-depth", str(depth), "--sal-start", str(depth))
        metrics = job.wait_for_update(DONE_WITHIN_S).metrics
        assert metrics["plan_depth"] == depth
        peak, predicted = float(metrics["peak_mib"]), float(metrics["plan_peak_mib"])
        shares[depth] = peak / predicted
        measure(f"peak at depth {depth}", peak, "MiB")
        measure(f"predicted at depth {depth}", predicted, "MiB")
        measure(f"round at depth {depth}", float(metrics["seconds"]), "s")
    group = f"/sys/fs/cgroup/system.slice/{AGENT}"
    measure("peak of its group", int(fleet_device.run(f"cat {group}/memory.peak")) / _MIB, "MiB")
    waited = fleet_device.run(f"sed -n 's/^some.*total=//p' {group}/memory.pressure")
    measure("waited for memory", int(waited) / 1e6, "s")
    assert all(0.92 <= share <= 1.08 for share in shares.values()), shares


def test_it_trains_what_this_machine_trains(
    fleet_device: DeviceUnderTest, rig: Rig, aggregator: Serve, measure: Measure, tmp_path: Path
) -> None:
    common = ["--fleet", str(rig.folder / FLEET_FILE), "--pack", str(rig.pack)]
    with embedded_broker(free_port()) as address, processes() as running:
        common += ["--broker", str(address)]
        agent = ["--id", fleet_device.name, "--data", str(rig.samples), "--state", str(tmp_path / "agent"), *_EXACT]
        running.start("agent", tmp_path / "agent.log", ["agent", *common, *agent])
        here = Job("aggregator", tmp_path / "aggregator", tmp_path / "aggregator.log", running)
        running.start(here.name, here.log, ["serve", *common, *SMALL, *_EXACT, "--state", str(here.state)])
        with fleet_device.agent_with(*_EXACT):
            there = aggregator(*SMALL, *_EXACT)
            there.wait(DONE_WITHIN_S)
        here.wait(DONE_WITHIN_S)
    assert any(isinstance(record, Closed) for record in there.records())
    found, wanted = model(there), model(here)
    assert found.keys() == wanted.keys()
    errors = {name: float(np.abs(found[name] - wanted[name]).max()) for name in wanted}
    measure("largest difference", max(errors.values()), "")
    assert max(errors.values()) <= 1e-3
