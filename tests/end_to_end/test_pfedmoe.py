"""A fleet whose devices have different backbones: real processes share one extractor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.messages import encode
from fleetune.edge.protocol.modelfile import FILE
from fleetune.edge.resources.costs import measure
from fleetune.server.journal import Accepted, Announced, Closed, Finished, Journal, Started

LACK_OF_DEVICES = 19
ROUNDS = ("--job", "pfedmoe", "--global-rounds", "2", "--personal-rounds", "1", "--epochs", "2")


@pytest.fixture(scope="module")
def costs(sharing_packs: tuple[Pack, Pack], text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What training costs here, for each pack."""
    found, folder = [], tmp_path_factory.mktemp("costs")
    for pack in sharing_packs:
        longest = int(read_dataset(text_data, pack).lengths.max())
        found.append(folder / f"{pack.sha256}.json")
        found[-1].write_bytes(encode(measure(pack, threads=1, longest=longest)))
    return found


def start(fleet: Any, packs: tuple[Pack, Pack], costs: list[Path], *more: str) -> Any:
    fleet.pack = packs[0].path
    serve = fleet.serve(*ROUNDS, *more)
    for device, pack, known in zip(("big", "small"), packs, costs, strict=True):
        fleet.agent(device, "--pack", str(pack.path), "--costs", str(known))
    return serve


def answer(fleet: Any, device: str, pack: Pack, command: str, *more: str) -> str:
    """What a command says about the model file of a device."""
    (file,) = (fleet.folder / device / "runs").glob(f"*/pfedmoe/{FILE}")
    done = fleet.start(command, str(file), "--pack", str(pack.path), *more)
    done.wait()
    return str(done.output)


def test_devices_with_different_backbones_train_one_extractor(
    make_fleet: Any, any_broker: str, sharing_packs: tuple[Pack, Pack], costs: list[Path]
) -> None:
    fleet = make_fleet(any_broker)
    serve = start(fleet, sharing_packs, costs)
    assert serve.wait() == 0, serve.output
    records = fleet.records()
    assert isinstance(records[-1], Finished)
    announced = [record.announcement.stage for record in records if isinstance(record, Announced)]
    assert announced == ["prepare", "train", "train", "train"]
    updates = [record for record in records if isinstance(record, Accepted) and record.into]
    assert sorted(update.manifest.device for update in updates) == ["big"] * 3 + ["small"] * 3
    (started,) = [record for record in records if isinstance(record, Started)]
    shared = sharing_packs[0].manifest.extractor
    assert shared is not None
    shapes = started.jobs[0].shapes
    assert shapes == shared.shapes
    journal = Journal(fleet.folder / "aggregator")
    versions = [record.version for record in records if isinstance(record, Closed)]
    # The extractor is the mean over both devices, each weighted by its samples.
    before = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    first = [update for update in updates if update.into == versions[1]]
    sent = {update.manifest.device: journal.load_update(update, shapes) for update in first}
    samples = {update.manifest.device: update.manifest.samples for update in first}
    after = journal.load_globals("pfedmoe", versions[1])
    journal.close()
    assert set(sent) == {"big", "small"}
    assert samples["big"] > samples["small"]
    total = sum(samples.values())
    for name in shapes:
        mean = sum(samples[device] / total * tensors[name] for device, tensors in sent.items())
        np.testing.assert_allclose(after[name] - before[name], mean, atol=1e-5)
    last = [record.manifest.metrics for record in records if isinstance(record, Accepted)][-1]
    assert {"test_global", "test_local", "test_mixture", "gate_local", "peak_mib", "cpu_s"} <= last.keys()
    predicted = answer(fleet, "small", sharing_packs[1], "predict", "--data", str(fleet.data["small"]))
    assert "mixture: " in predicted
    refused = answer(fleet, "small", sharing_packs[1], "export", "--out", str(fleet.folder / "out.onnx"))
    assert "it has no export" in refused


def test_a_device_without_the_extractor_declines_and_says_what_to_do(
    make_fleet: Any, embedded: str, sharing_packs: tuple[Pack, Pack], costs: list[Path], tiny_bert_pack: Pack
) -> None:
    fleet = make_fleet(embedded)
    fleet.pack = sharing_packs[0].path
    serve = fleet.serve(*ROUNDS)
    agent = fleet.agent("small", "--pack", str(tiny_bert_pack.path))
    fleet.agent("big", "--costs", str(costs[0]))
    assert serve.wait() == LACK_OF_DEVICES, serve.output
    assert "small: the job pfedmoe shares an extractor" in serve.output
    assert "fleetune pack --extractor" in agent.output
    agent.kill()
    mended = fleet.agent("small", "--pack", str(sharing_packs[1].path), "--costs", str(costs[1]))
    again = fleet.serve(*ROUNDS)
    assert again.wait() == 0, again.output + mended.output


def test_the_extractor_of_a_private_job_gets_noise_before_it_leaves(
    make_fleet: Any, embedded: str, sharing_packs: tuple[Pack, Pack], costs: list[Path]
) -> None:
    fleet = make_fleet(embedded)
    serve = start(fleet, sharing_packs, costs, "--dp-noise", "2", "--dp-clip", "0.5")
    assert serve.wait() == 0, serve.output
    (started, *_) = [record for record in fleet.records() if isinstance(record, Started)]
    shapes = started.jobs[0].shapes
    values = sum(math.prod(shape) for shape in shapes.values())
    journal = Journal(fleet.folder / "aggregator")
    updates = [record for record in fleet.records() if isinstance(record, Accepted) and record.into]
    norms = [
        math.sqrt(sum(float(np.vdot(tensor, tensor)) for tensor in journal.load_update(update, shapes).values()))
        for update in updates
    ]
    journal.close()
    assert len(norms) == 6
    assert norms == pytest.approx([2 * 0.5 * math.sqrt(values)] * 6, rel=0.15)  # noise on each value, and codec
    assert all("loss" not in update.manifest.metrics for update in updates)
