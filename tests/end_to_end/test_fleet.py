"""A small fleet of real processes, from the first announcement to the last."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import safetensors.numpy

from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import Shapes
from fleetune.edge.protocol.codec.entropy import decompress
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import MAX_PAYLOAD
from fleetune.edge.protocol.modelfile import FILE
from fleetune.edge.protocol.topics import Topics
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.limits import TIME_MARGIN
from fleetune.edge.resources.planner import candidates
from fleetune.edge.resources.workload import Workload
from fleetune.server.broker import free_port
from fleetune.server.journal import Accepted, Announced, Closed, Finished, Journal, Started, read_records

ROUNDS = ("--global-rounds", "2", "--personal-rounds", "1", "--sal-start", "3")
STAGES = ["prepare", "global", "global", "prepare", "personal", "evaluate"]


def stages(records: list[Any]) -> list[str]:
    return [record.announcement.stage for record in records if isinstance(record, Announced)]


def answers(records: list[Any]) -> list[tuple[str, int]]:
    return sorted((r.manifest.device, r.manifest.version) for r in records if isinstance(r, Accepted))


def shapes_of(fleet: Any) -> Shapes:
    """Of every tensor of the run's job."""
    (started,) = [r for r in fleet.records() if isinstance(r, Started)]
    return started.jobs[0].shapes  # type: ignore[no-any-return]


def final_globals(folder: Path) -> dict[str, Any]:
    journal = Journal(folder)
    closed = [r.version for r in read_records(journal.path) if isinstance(r, Closed)][-1]
    found = journal.load_globals("fedms", closed)
    journal.close()
    return found


def run_to_the_end(fleet: Any, *more: str) -> None:
    serve = fleet.serve(*ROUNDS, *more)
    for device in fleet.data:
        fleet.agent(device)
    assert serve.wait() == 0, serve.output


def test_a_fleet_trains_over_each_broker(make_fleet: Any, any_broker: str) -> None:
    fleet = make_fleet(any_broker)
    run_to_the_end(fleet)
    records = fleet.records()
    assert stages(records) == STAGES
    numbers = [r.announcement.round for r in records if isinstance(r, Announced)]
    assert numbers == [0, 1, 2, 2, 3, 3]  # what is prepared or evaluated is no round of training
    versions = [r.announcement.version for r in records if isinstance(r, Announced)]
    assert answers(records) == sorted((device, version) for device in ("big", "small") for version in versions)
    last = [r.manifest.metrics for r in records if isinstance(r, Accepted)][-1]
    assert {"test_global", "test_local", "test_mixture", "peak_mib", "cpu_s"} <= last.keys()
    assert isinstance(records[-1], Finished)


def test_what_a_finished_run_leaves_is_exported_and_scores_what_was_measured(make_fleet: Any, embedded: str) -> None:
    from fleetune.tools.export.engine import batches

    fleet = make_fleet(embedded)
    run_to_the_end(fleet, "--epochs", "8")
    device = next((fleet.folder / "big" / "runs").glob(f"*/fedms/{FILE}"))
    aggregator = fleet.folder / "aggregator" / "fedms" / FILE
    assert str(aggregator) in fleet.started[0].output
    evaluated = [r.manifest for r in fleet.records() if isinstance(r, Accepted) and r.manifest.device == "big"][-1]
    pack = Pack.open(fleet.pack)
    data = read_dataset(fleet.data["big"], pack)
    test = data.indices("test")
    for file, expert in ((device, "mixture"), (aggregator, "global")):
        out = fleet.folder / f"{expert}.onnx"
        export = fleet.start(
            *("export", str(file), "--pack", str(fleet.pack), "--expert", expert, "--out", str(out)),
            *("--data", str(fleet.data["big"])),
        )
        assert export.wait() == 0, export.output
        assert "100.0%" in export.output
        running = onnxruntime.InferenceSession(out)
        assert running.get_modelmeta().custom_metadata_map["fleetune.run"] == evaluated.run
        logits = np.concatenate([running.run(["logits"], some)[0] for some in batches(data, pack, test)])
        score = float((logits.argmax(axis=1) == data.labels[test]).mean())
        assert score == evaluated.metrics[f"test_{expert}"]


def test_a_device_sends_only_the_blocks_that_its_budget_lets_it_train(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    pack = Pack.open(fleet.pack)
    data = read_dataset(fleet.data["small"], pack)
    workload = Workload.of(data, pack.manifest, epochs=20, batch=4, max_depth=3)  # training outweighs all else
    plans = candidates(msgspec.json.decode(fleet.costs.read_bytes(), type=Costs), workload)
    cheapest = {depth: min(plan.cpu_s for plan in plans if plan.depth == depth) for depth in (1, 2)}
    budget = (cheapest[1] + cheapest[2]) / 2 * (1 + TIME_MARGIN)
    fleet.write({"big": ("1GiB", 100.0), "small": ("1GiB", budget)})
    run_to_the_end(fleet, "--epochs", "20")
    updates = [r for r in fleet.records() if isinstance(r, Accepted)]
    first = {update.manifest.device: update for update in updates if update.into == 1}
    journal, shapes = Journal(fleet.folder / "aggregator"), shapes_of(fleet)
    blocks = {
        device: {name.split(".")[1] for name in journal.load_update(update, shapes) if name.startswith("blocks.")}
        for device, update in first.items()
    }
    journal.close()
    assert blocks == {"big": {"0", "1", "2"}, "small": {"2"}}
    assert first["small"].manifest.metrics["plan_bound_by"] == "cpu"


def test_a_block_is_the_mean_over_the_devices_that_trained_it_weighted_by_samples(
    make_fleet: Any, embedded: str
) -> None:
    fleet = make_fleet(embedded)
    run_to_the_end(fleet)
    journal, shapes = Journal(fleet.folder / "aggregator"), shapes_of(fleet)
    first = [r for r in fleet.records() if isinstance(r, Accepted) and r.into == 1]
    result = journal.load_globals("fedms", 1)
    tensors = [journal.load_update(update, shapes) for update in first]
    journal.close()
    weights = [update.manifest.samples for update in first]
    assert sorted(weights) == [10, 12]
    for name, mean in result.items():
        expected = sum(w * t[name].astype(np.float64) for w, t in zip(weights, tensors, strict=True)) / sum(weights)
        np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_only_the_gates_adapter_goes_up_in_the_second_stage(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    run_to_the_end(fleet)
    journal, shapes = Journal(fleet.folder / "aggregator"), shapes_of(fleet)
    personal = [r.announcement.version for r in fleet.records() if isinstance(r, Announced)][4]
    sent = [r for r in fleet.records() if isinstance(r, Accepted) and r.into == personal]
    names = {name for update in sent for name in journal.load_update(update, shapes)}
    journal.close()
    assert len(sent) == 2
    assert names == {"gate.A", "gate.B"}


def test_the_same_seed_gives_the_same_expert(make_fleet: Any, embedded: str) -> None:
    experts = []
    for name in ("one", "two"):
        fleet = make_fleet(embedded, name)
        run_to_the_end(fleet, "--job", "fedms")
        fleet.stop()
        experts.append(final_globals(fleet.folder / "aggregator"))
    for name, tensor in experts[0].items():
        np.testing.assert_allclose(tensor, experts[1][name], atol=1e-5)


def test_the_backbone_stays_as_it_was_packed(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    before = Pack.open(fleet.pack).weights_sha256()
    run_to_the_end(fleet)
    assert Pack.open(fleet.pack).weights_sha256() == before


def test_a_killed_aggregator_goes_on_in_the_middle_of_the_round(make_fleet: Any, mosquitto: str) -> None:
    fleet = make_fleet(mosquitto)
    first = fleet.serve(*ROUNDS)
    fleet.agent("big")
    small = fleet.agent("small")
    fleet.wait_for(lambda records: stages(records)[-1:] == ["global"])
    small.kill()  # so that the round stays open, with the answer of one device at most
    fleet.wait_for(lambda records: "big" in {device for device, _ in answers(records)})
    first.kill()
    before = fleet.records()
    second = fleet.serve(*ROUNDS)
    fleet.agent("small")
    assert second.wait() == 0, second.output
    records = fleet.records()
    assert records[: len(before)] == before
    assert stages(records) == STAGES
    assert len(answers(records)) == len(set(answers(records))) == 2 * len(STAGES)


def test_asynchronous_rounds_wait_for_nobody_and_lose_no_update(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    serve = fleet.serve("--global-rounds", "4", "--personal-rounds", "1", "--sal-start", "1", "--buffer", "1")
    for device in fleet.data:
        fleet.agent(device)
    assert serve.wait() == 0, serve.output
    updates = [r for r in fleet.records() if isinstance(r, Accepted) and r.manifest.payload is not None]
    late = [r for r in updates if r.staleness]
    assert late, serve.output
    assert all(r.into > r.manifest.version for r in late)
    assert sum(r.late for r in fleet.records() if isinstance(r, Closed)) == len(late)
    assert re.search(r", staleness [1-9]", serve.output)


def test_a_killed_device_takes_part_again(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    serve = fleet.serve(*ROUNDS)
    fleet.agent("big")
    victim = fleet.agent("small")
    fleet.wait_for(lambda records: "global" in stages(records))
    victim.kill()
    fleet.agent("small")
    assert serve.wait() == 0, serve.output
    assert len(set(answers(fleet.records()))) == 2 * len(STAGES)


def test_a_device_that_was_flashed_anew_takes_part_again(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    serve = fleet.serve(*ROUNDS)
    fleet.agent("big")
    for _ in range(2):  # so that its boot counter has moved on
        victim = fleet.agent("small")
        fleet.wait_until((fleet.folder / "small" / "counters.json").exists)
        victim.kill()
    shutil.rmtree(fleet.folder / "small")
    fleet.agent("small")
    assert serve.wait() == 0, serve.output
    assert len(set(answers(fleet.records()))) == 2 * len(STAGES)


def test_a_second_run_starts_anew_on_the_same_devices(make_fleet: Any, any_broker: str) -> None:
    fleet = make_fleet(any_broker)
    run_to_the_end(fleet)
    fleet.started[-1].kill()
    fleet.agent("small")  # one device goes on, one has restarted in between
    again = fleet.serve(*ROUNDS, "--state", str(fleet.folder / "again"))
    assert again.wait() == 0, again.output
    first, second = (final_globals(fleet.folder / name) for name in ("aggregator", "again"))
    assert {"gate.A", "gate.B", "head.bias"} <= first.keys()
    for name, tensor in first.items():  # a private expert left over from the first run would show
        np.testing.assert_allclose(tensor, second[name], atol=1e-5)


def test_a_run_goes_on_after_another_one_has_had_the_devices(make_fleet: Any, any_broker: str) -> None:
    fleet = make_fleet(any_broker)
    first = fleet.serve(*ROUNDS)
    for device in fleet.data:
        fleet.agent(device)
    fleet.wait_for(lambda records: "global" in stages(records))
    first.kill()  # and what the devices answer now has nowhere to go
    between = fleet.serve(*ROUNDS, "--state", str(fleet.folder / "between"), "--job", "standalone")
    assert between.wait() == 0, between.output
    again = fleet.serve(*ROUNDS)
    assert again.wait() == 0, again.output
    assert stages(fleet.records()) == STAGES


def test_a_fleet_has_one_aggregator_and_the_first_one_stays(make_fleet: Any, any_broker: str) -> None:
    fleet = make_fleet(any_broker)
    first = fleet.serve(*ROUNDS)
    fleet.agent("big")
    fleet.wait_until(lambda: "waits for small" in first.output)
    second = fleet.serve(*ROUNDS, "--state", str(fleet.folder / "again"))
    fleet.wait_until(lambda: "another aggregator leads the fleet lab" in second.output)
    fleet.agent("small")
    assert first.wait() == 0, first.output
    assert second.wait() == 0, second.output  # its turn came when the first one left


def test_a_broker_that_restarts_in_the_middle_of_a_round_stops_nobody(make_fleet: Any, tmp_path: Path) -> None:
    port = free_port()
    fleet = make_fleet(f"mqtt://127.0.0.1:{port}")
    broker = fleet.start("broker", "--port", str(port))
    serve = fleet.serve(*ROUNDS, "--epochs", "60")
    agents = [fleet.agent(device) for device in fleet.data]
    for stage in ("global", "personal"):
        fleet.wait_for(lambda records, stage=stage: stage in stages(records))
        broker.kill()
        time.sleep(2)  # the devices finish their round meanwhile
        broker = fleet.start("broker", "--port", str(port))
    assert serve.wait() == 0, serve.output
    assert stages(fleet.records()) == STAGES
    for command in (serve, *agents):
        assert "is lost; it comes back by itself" in command.output
        assert "Traceback" not in command.output
    assert [agent.process.poll() for agent in agents] == [None, None]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rank", "3", r"adapters of rank 4, the pack .*other has 3"),
        ("--weights", "int8", r"weights in the format nf4, the pack .*other has int8"),
    ],
)
def test_a_device_with_another_pack_declines_and_can_be_mended(
    make_fleet: Any, embedded: str, tiny_bert: Path, tmp_path: Path, option: str, value: str, message: str
) -> None:
    fleet = make_fleet(embedded)
    serve = fleet.serve(*ROUNDS)
    big = fleet.agent("big")
    other = tmp_path / "other"
    write = ("pack", str(tiny_bert), "--out", str(other), "--rank", "4", "--max-length", "16", option, value)
    assert fleet.start(*write).wait() == 0
    wrong = fleet.agent("small", "--pack", str(other))
    assert serve.wait() == 19
    assert re.search(message, serve.output)
    assert "declined" in wrong.output
    wrong.process.terminate()
    assert wrong.wait() == 0
    serve = fleet.serve(*ROUNDS)
    fleet.agent("small")
    assert serve.wait() == 0, serve.output
    assert big.process.poll() is None


def test_a_job_that_suits_no_device_does_not_end_them(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    fleet.data["small"].write_text(fleet.data["small"].read_text().replace('"label": 1', '"label": 2'))
    agents = {device: fleet.agent(device) for device in fleet.data}
    serve = fleet.serve(*ROUNDS)
    assert serve.wait() == 19
    assert "small: it has labels beyond the 2 classes of the job" in serve.output
    assert str(fleet.data["small"]) not in serve.output  # where, and what it says there, stays on the device
    assert re.search(rf"{fleet.data['small']}, lines? .*: field label: 2 is out of range", agents["small"].output)
    assert "start another run" in serve.output
    mended = fleet.serve(*ROUNDS, "--classes", "3", "--state", str(fleet.folder / "mended"))
    assert mended.wait() == 0, mended.output
    assert [agent.process.poll() for agent in agents.values()] == [None, None]


def test_an_agent_waits_for_a_broker_that_comes_later(make_fleet: Any) -> None:
    port = free_port()
    fleet = make_fleet(f"mqtt://127.0.0.1:{port}")
    agents = [fleet.agent(device) for device in fleet.data]
    for agent in agents:
        fleet.wait_until(lambda agent=agent: "waits for one" in agent.output)
    fleet.start("broker", "--port", str(port))
    serve = fleet.serve(*ROUNDS)
    assert serve.wait() == 0, serve.output
    assert [agent.process.poll() for agent in agents] == [None, None]


def test_an_abandoned_run_does_not_stand_in_the_way_of_the_next(make_fleet: Any, any_broker: str) -> None:
    fleet = make_fleet(any_broker)
    first = fleet.serve(*ROUNDS)
    agents = {device: fleet.agent(device) for device in fleet.data}
    fleet.wait_for(lambda records: "global" in stages(records))
    first.kill()  # its announcement stays with the broker, and the tensors that it names are nowhere
    state = fleet.folder / "again"
    second = fleet.serve(*ROUNDS, "--state", str(state), "--job", "standalone", "--job", "fedms")
    fleet.wait_until(lambda: "standalone: train" in second.output)
    agents["small"].kill()
    shutil.rmtree(fleet.folder / "small")
    fleet.agent("small")  # hears of both runs at once
    assert second.wait() == 0, second.output


def test_a_run_is_not_changed_by_starting_it_with_other_options(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    run_to_the_end(fleet)
    before = fleet.records()
    changed = fleet.serve("--global-rounds", "9", "--personal-rounds", "1", "--sal-start", "2", "--classes", "3")
    assert changed.wait(20) == 18
    assert "fedms: global rounds 2 (now 9), classes 2 (now 3), SAL's start 3 (now 2)" in changed.output
    other = fleet.serve(*ROUNDS, "--job", "standalone")
    assert other.wait(20) == 18
    assert "jobs fedms (now standalone)" in other.output
    assert fleet.records() == before


def test_a_state_folder_belongs_to_one_process(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    fleet.serve(*ROUNDS)
    fleet.agent("big")
    fleet.wait_until((fleet.folder / "big" / "counters.json").exists)
    for second in (fleet.serve(*ROUNDS), fleet.agent("big")):
        assert second.wait(20) == 18
        assert "is in use by another process" in second.output
        assert "Traceback" not in second.output


def test_a_deadline_that_passes_is_said_and_nothing_is_lost(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    serve = fleet.serve(*ROUNDS, "--deadline", "1")
    fleet.agent("big")
    small = fleet.agent("small")
    fleet.wait_for(lambda records: "prepare" in stages(records))
    small.kill()
    fleet.wait_until(lambda: "the deadline has passed with 1 of the 2 answers" in serve.output)
    assert "waits for small" in serve.output
    fleet.agent("small")
    assert serve.wait() == 0, serve.output


def test_a_finished_run_ends_at_once_when_it_is_started_again(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    run_to_the_end(fleet)
    before = fleet.records()
    assert fleet.serve(*ROUNDS).wait(20) == 0
    assert fleet.records() == before


def test_a_budget_below_one_block_is_refused_with_what_is_missing(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    fleet.write({"big": ("1GiB", 100.0), "small": ("20MiB", 100.0)})
    serve = fleet.serve(*ROUNDS)
    fleet.agent("big")
    small = fleet.agent("small")
    assert serve.wait() == 19
    assert "small: budget: memory" in serve.output
    assert "MiB more than the 20 MiB given" in small.output
    assert "Traceback" not in small.output
    assert small.process.poll() is None


def test_a_device_without_room_for_its_cache_trains_all_the_same_and_says_so(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    fleet.write({"big": ("1GiB", 100.0), "small": ("1GiB", 100.0)}, small="0.001MiB")
    serve = fleet.serve(*ROUNDS)
    agents = {device: fleet.agent(device) for device in fleet.data}
    assert serve.wait() == 0, serve.output
    metrics = {r.manifest.device: r.manifest.metrics for r in fleet.records() if isinstance(r, Accepted)}
    assert metrics["big"]["plan_cache"] == "f16"
    assert metrics["big"]["cache_missing_mib"] == 0
    written = sum(file.stat().st_size for file in (fleet.folder / "big" / "cache").rglob("*") if file.is_file())
    assert 0 < written <= metrics["big"]["plan_cache_mib"] * 1.03 * (1 << 20)  # rounded to a KiB
    assert metrics["small"]["plan_cache"] == "none"
    assert metrics["small"]["cache_missing_mib"] > 0.005
    assert not (fleet.folder / "small" / "cache").exists()
    planned = agents["small"].output.count("plans depth")  # twice if the broker still announced an earlier test's run
    assert agents["small"].output.count("no room for the prefix cache") == planned >= 1
    assert "no room for the prefix cache" not in agents["big"].output


def test_training_that_diverges_fails_the_round_and_both_sides_say_why(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    serve = fleet.serve(*ROUNDS, "--learning-rate", "3e38")
    agents = {device: fleet.agent(device) for device in fleet.data}
    assert serve.wait() == 19
    assert re.search(r"(big|small): the loss is not finite at step 2 of the round", serve.output)
    assert answers(fleet.records()) == [("big", 0), ("small", 0)]  # the preparation
    for device, agent in agents.items():
        fleet.wait_until(lambda agent=agent: "the loss is not finite at step 2 of the round" in agent.output)
        assert re.search(rf"\({fleet.data[device]}, lines ", agent.output)
        assert str(fleet.data[device]) not in serve.output
        assert "Traceback" not in agent.output
    again = fleet.serve(*ROUNDS, "--state", str(fleet.folder / "again"))
    assert again.wait() == 0, again.output


def test_a_budget_above_the_machine_is_refused(make_fleet: Any, embedded: str) -> None:
    fleet = make_fleet(embedded)
    shipped = resources.files("fleetune.profiles").joinpath("raspberry-pi-5.yaml").read_text(encoding="utf-8")
    profile = fleet.folder / "large.yaml"
    profile.write_text(re.sub(r"(?m)^memory: .*$", "memory: 65536GiB", shipped))
    fleet.write({"big": ("60000GiB", 100.0)}, profile=str(profile))
    big = fleet.agent("big")
    assert big.wait() == 14
    assert f"{60000 << 10} MiB are given, but this machine has" in big.output


def tensors(payload: bytes) -> dict[str, Any]:
    """What is in a payload as it travels: safetensors, compressed."""
    return safetensors.numpy.load(decompress(payload, MAX_PAYLOAD))


def test_payloads_travel_as_safetensors(make_fleet: Any, embedded: str) -> None:
    fleet, topics = make_fleet(embedded), Topics("lab")
    listener = Link(BrokerAddress.parse(embedded), "listener", subscriptions=[topics.broadcast_chunk("+", "+", "+")])
    listener.connect()
    run_to_the_end(fleet)
    down = [(*topics.split(e.topic)[2:], e.payload) for e in listener.events(1.0) if isinstance(e, Received)]
    listener.close()
    announced = [r.announcement for r in fleet.records() if isinstance(r, Announced)]
    told = [announcement.changes.sha256 for announcement in announced if announcement.changes is not None]
    assert [(sha256, index) for sha256, index, _ in down] == [(sha256, "0") for sha256 in told]
    assert [set(tensors(data)) & {"head.weight", "gate.A"} for *_, data in down] == [
        *({"head.weight"}, {"head.weight"}, {"gate.A"}),  # what each round of training has changed, once for all
    ]
    folder = fleet.folder / "aggregator" / "fedms"
    up = (folder / "updates" / "1.bin").read_bytes()
    for record in (r for r in fleet.records() if isinstance(r, Accepted) and r.into == 1):
        payload = record.manifest.payload
        part = up[record.start : record.start + payload.size]
        assert hashlib.sha256(part).hexdigest() == payload.sha256
        assert "head.weight" in tensors(part)
    assert "head.weight" in safetensors.numpy.load_file(folder / "globals" / "1.safetensors")
