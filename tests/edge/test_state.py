"""The agent's folder: what was written is there after a restart, whole; what is damaged is named."""

from __future__ import annotations

import errno
import hashlib
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fleetune.edge.agent.state import State
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import Codec, Tensors
from fleetune.edge.protocol.errors import ConfigError, MessageError, RunFolderError
from fleetune.edge.protocol.messages import UpdateManifest
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.trial import Trial

TRIAL = Trial(
    depth=1,
    micro_batch=2,
    length=8,
    recompute=False,
    base_mib=60.0,
    frozen_mib=60.0,
    peak_mib=70.0,
    step_s=0.05,
    step_cpu_s=0.1,
    forward_s=0.005,
    forward_cpu_s=0.01,
)
COSTS = Costs(pack="p", kit="1", onnxruntime="1", machine="arm", threads=1, power_mode="1 core", trials=(TRIAL,))


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state", "nano-1")


def again(state: State) -> State:
    """The same folder after a restart."""
    state.close()
    return State(state.folder, "nano-1")


def update(name: str, data: bytes = b"", version: int = 1) -> UpdateManifest:
    return UpdateManifest(
        fleet="lab",
        device="nano-1",
        update=name,
        run="r",
        job="fedms",
        version=version,
        issued=0.0,
        backbone="b",
        samples=5,
        metrics={"loss": 0.5, "depth": 2, "stopped_early": False, "bound_by": "cpu"},
        payload=chunks.describe(data, "f16") if data else None,
    )


def stray_files(folder: Path) -> list[str]:
    return [file.name for file in folder.rglob(".*")]


# --- counters, costs ----------------------------------------------------------------------------------------


def test_counters_survive_a_restart(state: State) -> None:
    assert state.counters.boot == 0
    state.counters.boot = 3
    state.counters.bytes_up = 5 << 40
    state.save_counters()
    counters = again(state).counters
    assert (counters.boot, counters.bytes_up) == (3, 5 << 40)


@pytest.mark.parametrize("counters", [
    b'{"runs": [{"id": "../../precious"}]}',
    b'{"runs": [{"id": ""}]}',
    b'{"boot": -1}',
    b'{"boot": 99999999999999999999}',
    b'{"runs": [{"id": "r", "answered": {"../fedms": 1}}]}',
    b" " * (5 << 20),
])  # fmt: skip
def test_counters_that_no_agent_wrote_are_refused_and_lead_nowhere(counters: bytes, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "counters.json").write_bytes(counters)
    (tmp_path / "precious").mkdir()
    with pytest.raises(ConfigError, match=r"counters\.json"):
        State(tmp_path / "state", "nano-1")
    assert (tmp_path / "precious").is_dir()


def test_an_update_whose_file_is_shorter_than_it_says_takes_no_more_memory_than_it_has(state: State) -> None:
    large = msgspec.structs.replace(update("u-1", b"x" * 100), payload=chunks.describe(bytes(60 << 20), "f32"))
    state.put_outbox(large, b"x" * 100)
    state = again(state)
    tracemalloc.start()
    assert state.outbox_data(large) is None
    assert state.lost("r", "fedms") == {}
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    state.close()


def test_an_update_under_another_name_is_refused(state: State) -> None:
    state.put_outbox(update("u-1"), b"")
    folder = state.folder / "outbox"
    (folder / "u-1.update").rename(folder / "u-2.update")
    with pytest.raises(ConfigError, match=r"u-2\.update holds the update u-1"):
        again(state)


def test_two_states_do_not_share_their_counters(tmp_path: Path) -> None:
    first, second = State(tmp_path / "a", "a"), State(tmp_path / "b", "b")
    first.enter("r")
    assert second.counters.runs == []


def test_costs_survive_a_restart(state: State) -> None:
    assert state.read("costs.json", Costs) is None
    state.save("costs.json", COSTS)
    assert again(state).read("costs.json", Costs) == COSTS


def test_the_folder_of_another_device_is_refused(state: State) -> None:
    with pytest.raises(ConfigError, match=f"{state.folder} belongs to the device 'nano-1', not to 'nano-2'"):
        state.close()
        State(state.folder, "nano-2")
    again(state)


def test_a_folder_in_use_is_refused_until_it_is_let_go(state: State) -> None:
    with pytest.raises(RunFolderError, match=f"{state.folder} is in use by another process"):
        State(state.folder, "nano-1")
    again(state)


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b'{"boot": "x", "depth": "x", "pack": 1}',
    b'{"\xff": 1, "runs": [{"id": "\xff"}], "pack": "\xff"}',
]


@pytest.mark.parametrize("raw", DAMAGED)
@pytest.mark.parametrize(("file", "read"), [
    ("counters.json", lambda state: again(state)),
    ("costs.json", lambda state: state.read("costs.json", Costs)),
    ("outbox/u-1.update", lambda state: again(state)),
])  # fmt: skip
def test_a_damaged_file_is_named(file: str, read: Callable[[State], object], raw: bytes, state: State) -> None:
    state.save_counters()
    state.save("costs.json", COSTS)
    state.put_outbox(update("u-1"), b"")
    (state.folder / file).write_bytes(raw)
    with pytest.raises(ConfigError, match=f"{state.folder / file}"):
        read(state)


# --- updates that wait --------------------------------------------------------------------------------------


def waiting(state: State) -> list[tuple[UpdateManifest, bytes]]:
    return [(manifest, state.outbox_data(manifest)) for manifest in state.outbox()]


def test_updates_wait_in_the_order_in_which_they_came(state: State) -> None:
    put = [(update("z", b"first", 8), b"first"), (update("a", b"", 9), b""), (update("m", b"third", 10), b"third")]
    for manifest, data in put:
        state.put_outbox(manifest, data)
        clock = 1e9 - manifest.version  # of a board that wakes up in the past
        os.utime(state.folder / "outbox" / f"{manifest.update}.update", (clock, clock))
    assert waiting(state) == put
    assert waiting(again(state)) == put


def test_a_dropped_update_is_gone(state: State) -> None:
    state.put_outbox(update("u-1", b"data"), b"data")
    state.drop_outbox("u-1")
    assert state.outbox() == []
    assert again(state).outbox() == []
    assert not list((state.folder / "outbox").iterdir())
    state.drop_outbox("u-1")


def test_an_acknowledged_update_waits_no_more_and_stays_until_the_next_is_there(state: State) -> None:
    state.put_outbox(update("u-1", b"data", 1), b"data")
    state.acknowledge("u-1")
    assert (state.outbox(), state.waiting("u-1")) == ([], None)
    state.put_outbox(update("u-2", b"more", 2), b"more")
    assert waiting(state) == [(update("u-2", b"more", 2), b"more")]
    assert waiting(again(state)) == [(update("u-2", b"more", 2), b"more")]
    assert [file.name for file in (state.folder / "outbox").iterdir()] == ["u-2.update"]


def test_an_update_that_nobody_has_is_not_let_go_for_the_next(state: State) -> None:
    state.put_outbox(update("u-1", b"data", 1), b"data")
    state.put_outbox(update("u-2", b"more", 2), b"more")
    state.acknowledge("u-2")
    state.put_outbox(update("u-3", b"last", 3), b"last")
    assert [manifest.update for manifest in again(state).outbox()] == ["u-1", "u-3"]


def test_an_update_that_is_put_anew_after_it_was_acknowledged_is_there(state: State) -> None:
    state.put_outbox(update("u-1", b"data"), b"data")
    state.acknowledge("u-1")
    state.put_outbox(update("u-1", b"anew"), b"anew")
    assert waiting(state) == waiting(again(state)) == [(update("u-1", b"anew"), b"anew")]


def test_after_a_restart_an_acknowledged_update_is_offered_again(state: State) -> None:
    """Rather once too often: the aggregator knows which it has."""
    state.put_outbox(update("u-1", b"data"), b"data")
    state.acknowledge("u-1")
    assert waiting(again(state)) == [(update("u-1", b"data"), b"data")]


def test_updates_of_a_job_are_let_go_together(state: State) -> None:
    other = msgspec.structs.replace(update("v-1"), job="pfedmoe")
    for manifest in (update("u-1"), update("u-2", version=2), other):
        state.put_outbox(manifest, b"")
    state.acknowledge("u-1")
    state.drop_updates("r", "fedms")
    assert state.outbox() == [other]
    assert again(state).outbox() == [other]
    state.drop_updates("r")
    assert not list((state.folder / "outbox").iterdir())


def test_what_an_update_lacks_outlasts_it(state: State) -> None:
    assert state.lost("r", "fedms") == {}
    for number, value in ((9, 0.25), (10, 0.5)):
        _, lost, _ = encoded(value)
        state.put_outbox(update(f"u-{number}", b"data", number), b"data", lost)
        state.acknowledge(f"u-{number}")
    for now in (state, again(state)):
        assert now.lost("r", "fedms")["head.bias"].tolist() == [0.5, 0.5]
        assert now.lost("r", "pfedmoe") == now.lost("s", "fedms") == {}


def test_what_an_update_lacks_is_done_without_if_it_is_damaged(state: State, caplog: pytest.LogCaptureFixture) -> None:
    _, lost, _ = encoded(0.5)
    state.put_outbox(update("u-1", b"data"), b"data", lost)
    file = state.folder / "outbox" / "u-1.update"
    file.write_bytes(file.read_bytes()[:-1])
    state = again(state)
    assert state.lost("r", "fedms") == {}
    assert f"{file}: what it lacks is lost" in caplog.text
    assert waiting(state) == [(update("u-1", b"data"), b"data")]


@pytest.mark.parametrize("stop_at", range(1, 4))
def test_an_update_is_kept_whole_or_not_at_all(stop_at: int, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails at the n-th time that something is forced onto it."""
    real, calls = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    try:
        state.put_outbox(update("u-1", b"data"), b"data")
    except OSError:
        assert stop_at <= 2
    else:
        assert stop_at == 3
    monkeypatch.undo()
    found = waiting(again(state))
    assert found in ([], [(update("u-1", b"data"), b"data")])
    assert found or stop_at <= 2
    assert stray_files(state.folder) == []


def test_the_tensors_of_an_update_may_hold_any_bytes(state: State) -> None:
    data = b"\n{}\n\r\n" + bytes(range(256))
    state.put_outbox(update("u-1", data), data)
    assert waiting(again(state)) == [(update("u-1", data), data)]


def test_an_update_that_waits_is_answered_even_if_the_counters_do_not_say_so(state: State) -> None:
    state.enter("r")
    state.put_outbox(update("u-1", b"data", 7), b"data")  # and now the power is cut
    assert again(state).answered("r", "fedms") == 7


def test_bytes_that_an_update_speaks_of_count_even_if_the_counters_do_not_say_so(state: State) -> None:
    manifest = msgspec.structs.replace(update("u-1"), metrics={"bytes_up": 70, "bytes_down": 5})
    state.counters.bytes_down = 9
    state.save_counters()
    state.put_outbox(manifest, b"")  # and now the power is cut
    counters = again(state).counters
    assert (counters.bytes_up, counters.bytes_down) == (70, 9)


def test_what_was_answered_outlasts_its_update(state: State) -> None:
    state.enter("r").answered["fedms"] = 7  # the aggregator was quicker than the counters
    state.put_outbox(update("u-1", b"data", 7), b"data")
    state.drop_outbox("u-1")
    assert again(state).answered("r", "fedms") == 7


# --- global tensors that came down --------------------------------------------------------------------------


def encoded(value: float) -> tuple[str, bytes, Tensors]:
    """Hash and bytes of global tensors, and what they are."""
    tensors = {"head.bias": np.full(2, value, np.float32)}
    data = Codec.named("f32").encode(tensors)
    return hashlib.sha256(data).hexdigest(), data, tensors


def test_global_tensors_survive_a_restart(state: State) -> None:
    sha256, data, tensors = encoded(0.5)
    assert not state.has_globals(sha256)
    state.save_globals(sha256, data, tensors)
    for now in (state, again(state)):
        assert now.has_globals(sha256)
        assert {name: found.tolist() for name, found in now.load_globals(sha256).items()} == {"head.bias": [0.5, 0.5]}


def test_whoever_reads_global_tensors_may_change_what_it_got(state: State) -> None:
    sha256, data, tensors = encoded(0.5)
    state.save_globals(sha256, data, tensors)
    for _ in range(2):
        found = state.load_globals(sha256)
        assert found.keys() == {"head.bias"}
        found["head.bias"] = found["head.bias"] + 1
        found["gate.A"] = np.zeros(1, np.float32)
    assert state.load_globals(sha256)["head.bias"].tolist() == [0.5, 0.5]


def test_the_initial_global_tensors_differ_in_nothing_from_what_follows_from_the_seed(state: State) -> None:
    assert state.load_globals(None) == {}


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda _raw: b"", lambda raw: raw + b"x",
                                    lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])])  # fmt: skip
def test_global_tensors_whose_bytes_changed_are_refused_and_gone(
    damage: Callable[[bytes], bytes], state: State
) -> None:
    sha256, data, tensors = encoded(0.5)
    state.save_globals(sha256, data, tensors)
    (file,) = (state.folder / "globals").iterdir()
    file.write_bytes(damage(data))
    state = again(state)
    with pytest.raises(MessageError, match=f"{file} is damaged"):
        state.load_globals(sha256)
    assert not state.has_globals(sha256)  # and are asked for again


def test_the_oldest_global_tensors_are_let_go(state: State) -> None:
    hashes = []
    for i in range(10):
        sha256, data, tensors = encoded(i)
        state.save_globals(sha256, data, tensors)
        hashes.append(sha256)
        time.sleep(0.01)
    kept = [i for i in range(10) if state.has_globals(hashes[i])]
    assert kept
    assert len(kept) < 10
    assert kept == list(range(10 - len(kept), 10))


def test_global_tensors_that_every_round_reads_are_not_let_go(state: State) -> None:
    frozen, data, tensors = encoded(-1)
    state.save_globals(frozen, data, tensors)
    for number in range(8):
        time.sleep(0.01)
        assert state.load_globals(frozen)["head.bias"][0] == -1, f"round {number}"
        time.sleep(0.01)
        state.save_globals(*encoded(number))


# --- runs ---------------------------------------------------------------------------------------------------


def test_what_was_answered_in_one_run_is_open_in_another(state: State) -> None:
    assert state.answered("first", "fedms") == -1
    state.enter("first").answered["fedms"] = 7
    state.save_counters()
    state = again(state)
    assert state.answered("first", "fedms") == 7
    assert state.answered("first", "standalone") == -1
    state.enter("second").answered["fedms"] = 0
    assert (state.answered("first", "fedms"), state.answered("second", "fedms")) == (7, 0)


def test_the_oldest_runs_tensors_are_let_go_and_the_newest_stay(state: State) -> None:
    state.put_outbox(update("u-9"), b"")  # of the run "r"
    state.enter("r")
    for number in range(10):
        state.enter(f"run-{9 - number}")  # neither by name nor by clock
        state.store(f"run-{9 - number}", "fedms").save("expert", {"x": np.ones(1, np.float32)})
        state = again(state)
    kept = [number for number in range(10) if state.store(f"run-{number}", "fedms").load("expert") is not None]
    assert kept == [0, 1, 2, 3]
    assert sorted(folder.name for folder in (state.folder / "runs").iterdir()) == [f"run-{n}" for n in kept]
    assert state.outbox() == []


def test_a_run_without_room_for_its_record_is_not_entered(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        state.enter(f"run-{number}")
        state.put_outbox(msgspec.structs.replace(update(f"u-{number}"), run=f"run-{number}"), b"")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            state.enter("run-4")
    monkeypatch.undo()
    assert [manifest.run for manifest in state.outbox()] == [f"run-{number}" for number in range(4)]
    state.enter("run-4")
    assert sorted(manifest.run for manifest in again(state).outbox()) == [f"run-{number}" for number in (1, 2, 3)]


def test_what_is_left_of_a_run_that_was_let_go_takes_no_other_runs_place(state: State) -> None:
    """As when the power is cut between the counters, which know it no more, and its updates."""
    state.put_outbox(update("u-9"), b"")  # of the run "r"
    state.put_outbox(update("u-8"), b"")
    for number in range(4):
        state.enter(f"run-{number}")
        state.put_outbox(msgspec.structs.replace(update(f"u-{number}"), run=f"run-{number}"), b"")
    state = again(again(state))
    assert sorted(manifest.run for manifest in state.outbox()) == [f"run-{number}" for number in range(4)]
    assert not (state.folder / "outbox" / "u-9.update").exists()


# --- a method's private tensors -----------------------------------------------------------------------------


def test_private_tensors_survive_a_restart(state: State) -> None:
    tensors = {
        "gate.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
        "gate.bias": np.zeros(2, np.float32),
    }
    assert state.store("r", "fedms").load("gate") is None
    state.store("r", "fedms").save("gate", tensors)
    found = again(state).store("r", "fedms").load("gate")
    assert found is not None
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_jobs_and_runs_do_not_see_each_others_tensors(state: State) -> None:
    state.store("r", "one").save("gate", {"x": np.ones(1, np.float32)})
    assert state.store("r", "two").load("gate") is None
    assert state.store("s", "one").load("gate") is None


def test_damaged_private_tensors_are_named(state: State) -> None:
    state.store("r", "fedms").save("gate", {"x": np.ones(9, np.float32)})
    file = state.folder / "runs" / "r" / "fedms" / "gate.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"{file} is damaged"):
        state.store("r", "fedms").load("gate")


def test_the_newest_global_tensors_stay_whatever_the_clock_says(state: State) -> None:
    for number in range(6):
        state.save_globals(*encoded(number))
    for file in (state.folder / "globals").iterdir():
        os.utime(file, (time.time() + 365 * 86400,) * 2)  # the clock has gone back a year
    newest = encoded(7)
    state.save_globals(*newest)
    assert again(state).has_globals(newest[0])
