"""A private job of real processes: what the aggregator gets to know, and what it says of it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fleetune[server]'")

from fleetune.edge.agent.privacy import RESOURCES, Spent
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.model import Model
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.modelfile import FILE
from fleetune.server.accountant import epsilon
from fleetune.server.journal import Accepted, Announced, Closed, Journal

NOISE = 0.5
JOB = (
    *("--global-rounds", "2", "--personal-rounds", "1", "--sal-start", "2"),
    *("--dp-noise", str(NOISE), "--report-accuracy"),
)
COUNTED = {"bytes_up", "bytes_down", "boot"}


def test_a_private_job_tells_noise_and_resources_alone_and_says_what_that_comes_to(
    make_fleet: Any, embedded: str
) -> None:
    fleet = make_fleet(embedded)
    first = fleet.serve(*JOB)
    limits = ("--dp-min-noise", "0.5", "--dp-max-updates", "3")  # an owner's, which just suffice
    fleet.agent("big", "--codec", "f32", *limits)
    fleet.agent("small", "--codec", "f32")
    fleet.wait_for(lambda records: sum(isinstance(record, Closed) for record in records) >= 2)
    first.kill()  # what was given away before is not forgotten
    serve = fleet.serve(*JOB)
    assert serve.wait() == 0, serve.output
    records = fleet.records()

    depths = [r.announcement.settings["depth"] for r in records if isinstance(r, Announced)]
    assert set(depths) == {2}  # a schedule that follows accuracies has none to follow
    accepted = [r for r in records if isinstance(r, Accepted)]
    stages = {r.announcement.version: r.announcement.stage for r in records if isinstance(r, Announced)}
    journal = Journal(fleet.folder / "aggregator")
    for record in accepted:
        manifest, stage = record.manifest, stages[record.manifest.version]
        assert (manifest.samples, manifest.noise) == (1, NOISE)
        told = manifest.metrics.keys() - COUNTED
        reported = {name for name in told if name.startswith("test")}
        assert told - reported <= RESOURCES
        # It is asked for, and who has set a limit does not tell it all the same.
        assert bool(reported) == (stage == "evaluate" and manifest.device == "small")
        sent = journal.load_update(record, records[0].jobs[0].shapes)
        layout = Layout.of(Pack.open(fleet.pack).manifest, 2)
        names = {"global": layout.names(2, "B"), "personal": ["gate.B"]}.get(stage, [])
        assert set(sent) == set(names)
        assert all(tensor.all() for tensor in sent.values())  # no value without noise
    journal.close()

    said = json.loads((fleet.folder / "aggregator" / "fedms" / "privacy.json").read_text())
    assert (said["rounds"], said["most_updates"], said["fewest_devices"]) == (3, 3, 2)
    assert said["epsilon"]["aggregator"] == pytest.approx(epsilon(3 / NOISE**2, 1e-5), abs=1e-3)
    assert said["epsilon"]["model"] == pytest.approx(epsilon(3 / NOISE**2 / 2, 1e-5), abs=1e-3)
    assert "ε = " in serve.output
    for device in ("big", "small"):
        spent = msgspec.json.decode((fleet.folder / device / "privacy.json").read_bytes(), type=Spent)
        assert [job.updates for job in spent.jobs.values()] == [3]


def test_the_model_of_a_private_job_has_the_seeds_a_and_answers(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    serve = fleet.serve("--global-rounds", "1", "--personal-rounds", "1", "--sal-start", "2", "--dp-epsilon", "20")
    for device in fleet.data:
        fleet.agent(device)
    assert serve.wait() == 0, serve.output
    file, pack = fleet.folder / "aggregator" / "fedms" / FILE, Pack.open(fleet.pack)
    found = Model.read(file, pack).global_
    initial = Expert.initial(Layout.of(pack.manifest, 2), seed=0)
    for name in found.layout.names(2):
        if name.endswith(".A"):
            np.testing.assert_array_equal(found.tensors[name], initial.tensors[name])
        else:
            assert (found.tensors[name] != initial.tensors[name]).any()
    predict = fleet.start("predict", str(file), "--pack", str(fleet.pack), "--data", str(fleet.data["big"]))
    assert predict.wait() == 0, predict.output
