"""The chaos benchmark: real runs with faults, and that what is checked after them would be noticed."""

from __future__ import annotations

import _thread
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import ConfigError
from fleetune.server.journal import FILE, Accepted, Closed, Record, read_records
from fleetune.tools.bench.chaos.chaos import Result, run_seeds, summary
from fleetune.tools.bench.chaos.check import Findings, check
from fleetune.tools.bench.chaos.fleet import Course, Fleet
from fleetune.tools.bench.chaos.plan import DEVICES, Fault, Kind, Plan, plan_of
from fleetune.tools.bench.chaos.proxy import Proxy, flip, is_bulk
from fleetune.tools.bench.transfer.noop import JOB, lora_shapes
from fleetune.tools.network import Network
from support.lacking import lacking

PLAN = Plan(seed=0, rounds=2, shapes=lora_shapes(2, 640), quorum=3, checkpoint_rounds=1, faults=())


@pytest.fixture(scope="module")
def root() -> None:
    if os.geteuid() != 0:
        lacking("networks and mounts need root")
    for name in ("ip", "tc", "mosquitto", "nsenter", "setpriv"):
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            lacking(f"{name} is not installed (apt-get install iproute2 mosquitto util-linux)")


def left_over(folder: Path) -> list[str]:
    """Networks of this process, and mounts in a folder."""
    spaces = [path.name for path in Path("/run/netns").glob(f"ftc{os.getpid()}*")]
    bridges = [path.name for path in Path("/sys/class/net").glob(f"ftc{os.getpid()}*")]
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if f" {folder}/" in line]
    return [*spaces, *bridges, *mounts]


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kill-device", "kill-aggregator", "full-aggregator"])
def test_a_fleet_comes_to_its_end_whatever_goes_wrong(root: None, tmp_path: Path, kind: str) -> None:
    seed = next(seed for seed in range(1000) if [fault.kind for fault in plan_of(seed).faults] == [kind])
    (result,) = run_seeds([seed], tmp_path)
    assert not result.failed, str(result)
    assert [fault.kind for fault, _ in result.course.fired] == [kind]
    assert list(tmp_path.iterdir()) == []
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("kind", ["kill-aggregator", "kill-broker"])
def test_a_quorum_goes_on_without_a_dead_device_whoever_else_dies(root: None, tmp_path: Path, kind: Kind) -> None:
    faults = (Fault(kind, "d2", 1, 0.05), Fault("lose-device", "d2", 1, 0.3))  # nobody tells of the second
    with (
        closing(Network(tuple(DEVICES))) as network,
        Fleet(replace(PLAN, quorum=2, faults=faults), tmp_path, network) as fleet,
    ):
        course = fleet.run()
        assert (course.completed, course.ended) == (True, ()), (tmp_path / "aggregator.log").read_text()
        assert course.seconds < 30
        assert list(check(tmp_path, replace(PLAN, quorum=2))) == []


def test_nothing_is_left_of_a_run_that_is_broken_off(root: None, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        closing(Network(tuple(DEVICES))) as network,
        Fleet(PLAN, tmp_path, network) as fleet,
    ):
        threading.Timer(1.5, _thread.interrupt_main).start()
        fleet.run()
    assert left_over(tmp_path) == []


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="only root may") as caught:
        Network(("d1",))
    assert "sudo" in caught.value.remedy


# --- what is checked ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(root: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run without faults leaves on disk."""
    folder = tmp_path_factory.mktemp("chaos")
    place = folder / "run"
    place.mkdir()
    with closing(Network(tuple(DEVICES))) as network, Fleet(PLAN, place, network) as fleet:
        course = fleet.run()
        assert course.completed
        assert course.ended == ()
        shutil.copytree(place, folder / "kept")
    return folder / "kept"


@pytest.fixture
def kept(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "kept"))


def spoil(kept: Path, change: Callable[[list[Record]], None]) -> Findings:
    journal = kept / "aggregator" / FILE
    records = list(read_records(journal))
    change(records)
    journal.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    return check(kept, PLAN)


def last_accepted(records: list[Record]) -> int:
    """Where the last update with tensors is."""
    return max(n for n, r in enumerate(records) if isinstance(r, Accepted) and r.manifest.payload is not None)


def test_a_run_without_faults_has_nothing_to_find(kept: Path) -> None:
    assert list(check(kept, PLAN)) == []


def test_a_lost_update_is_found(kept: Path) -> None:
    findings = spoil(kept, lambda records: records.__delitem__(last_accepted(records)))
    assert "was acknowledged, and is not in the journal" in findings.lost[0]
    assert any("the global tensors: not what the updates give" in line for line in findings.wrong)


def test_an_update_that_counts_twice_is_found(kept: Path) -> None:
    def double(records: list[Record]) -> None:
        number = last_accepted(records)
        records.insert(number, records[number])

    findings = spoil(kept, double)
    assert len(findings.doubled) == 1
    assert "counts 2 times" in findings.doubled[0]
    assert any("the global tensors: not what the updates give" in line for line in findings.wrong)


def test_an_update_that_stands_in_for_another_is_found(kept: Path) -> None:
    def swap(records: list[Record]) -> None:
        number = last_accepted(records)
        mine, other = records[number], records[number - 1]
        assert isinstance(mine, Accepted)
        assert isinstance(other, Accepted)
        records[number] = msgspec.structs.replace(mine, start=other.start)

    findings = spoil(kept, swap)
    assert any("the journal has other tensors than were sent" in line for line in findings.wrong)


def test_a_round_that_closed_too_soon_is_found(kept: Path) -> None:
    def leave_out(records: list[Record]) -> None:
        number = max(n for n, record in enumerate(records) if isinstance(record, Closed))
        gone = records.pop(number - 1)
        assert isinstance(gone, Accepted)
        closed = records[number - 1]
        assert isinstance(closed, Closed)
        others = [device for device in closed.devices if device != gone.manifest.device]
        records[number - 1] = msgspec.structs.replace(closed, devices=others)

    assert any("closed without d" in line for line in spoil(kept, leave_out).lost)


def test_wrong_global_tensors_are_found_wherever_they_are(kept: Path) -> None:
    file = kept / "aggregator" / JOB / "globals" / "2.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = sorted(tensors)[0]
    tensors[name].flat[0] = np.nextafter(tensors[name].flat[0], np.float32(np.inf))
    safetensors.numpy.save_file(tensors, file)
    given = kept / "d2.given"
    given.write_bytes(given.read_bytes()[:-1] + b"!")
    (kept / "d3.given").unlink()
    assert check(kept, PLAN).wrong == [
        "version 2: the global tensors: not what the updates give",
        "d2: began with other bytes than the announced ones",
        "d3: answered, and began no round",
    ]


def test_the_figures_say_what_failed_and_how_to_see_it_again(tmp_path: Path) -> None:
    dead = Fault("kill-device", "d1", 1, 0.1)
    good = Result(plan_of(5), Course(True, 3.0, ((dead, 2.0),), (), 0), Findings())
    bad = Result(plan_of(7), Course(False, 90.0, (), ("d1 ended with 1: why",), 0), Findings(lost=["an update"]))
    document = summary([good, bad], tmp_path)
    values = {item.name: (item.value, item.met) for item in document.figures}
    assert values["runs that came to their end"] == (1, False)
    assert values["acknowledged updates lost"] == (1, False)
    assert values["updates counted twice"] == (0, True)
    assert values["processes that ended by themselves"] == (1, False)
    assert any("seed 7" in note and "d1 ended with 1: why" in note for note in document.notes)
    assert any(note.startswith("to see them again: ") and "chaos 7;" in note for note in document.notes)


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_dozen_seeds_meet_every_kind_and_a_seed_is_always_the_same() -> None:
    assert len({plan_of(seed).faults[0].kind for seed in range(36, 48)}) == 11
    assert [plan_of(seed) for seed in range(50)] == [plan_of(seed) for seed in range(50)]


def publish(topic: bytes, payload: bytes) -> bytes:
    body = len(topic).to_bytes(2, "big") + topic + b"\0\7" + b"\5\2\0\0\2\x58" + payload  # with a message expiry
    length = bytes([len(body) & 127 | 128, len(body) >> 7]) if len(body) > 127 else bytes([len(body)])
    return b"\x32" + length + body


@pytest.mark.parametrize(("topic", "bulk"), [
    (b"ft/1/lab/up/d1/run-job-3/m", True),
    (b"ft/1/lab/up/d1/run-job-3/12", True),
    (b"ft/1/lab/g/job/current", True),
    (b"ft/1/lab/g/job/" + b"ab" * 32 + b"/0", True),
    (b"ft/1/lab/g/job/" + b"ab" * 32 + b"/r/7", True),
    (b"ft/1/lab/up/d1/need", False),
    (b"ft/1/lab/dn/d1/ack", False),
    (b"ft/1/lab/st/d1", False),
])  # fmt: skip
def test_only_chunks_and_manifests_are_garbled(topic: bytes, bulk: bool) -> None:
    assert is_bulk(publish(topic, b"x")) is bulk


def test_only_the_payload_is_flipped() -> None:
    packet = publish(b"ft/1/lab/up/d1/run-job-3/0", bytes(200))
    for seed in range(50):
        garbled = flip(packet, Random(seed))  # noqa: S311
        assert garbled != packet
        assert (len(garbled), garbled[:-200]) == (len(packet), packet[:-200])


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        yield server


@pytest.mark.parametrize("habit", ["twice", "swap", "flip"])
def test_a_proxy_does_what_it_is_told_and_nothing_else(listener: socket.socket, habit: str) -> None:
    proxy = Proxy(BrokerAddress(*listener.getsockname()), (habit,), 1)  # type: ignore[arg-type]
    sent = [publish(b"ft/1/lab/up/d1/u/%d" % n, bytes([n]) * 50) for n in range(100)]
    with closing(proxy), socket.create_connection((proxy.address.host, proxy.address.port)) as client:
        client.sendall(b"".join(sent))
        broker, _ = listener.accept()
        arrived, deadline = b"", time.monotonic() + 10
        broker.settimeout(0.5)
        while time.monotonic() < deadline:
            try:
                arrived += broker.recv(65536)
            except TimeoutError:
                break
        broker.close()
    times = [arrived.count(packet) for packet in sent]
    (done,) = proxy.garbled.values()
    assert 0 < done < 30
    if habit == "twice":
        assert (times.count(1), times.count(2)) == (100 - done, done)
    elif habit == "swap":
        assert times == [1] * 100
        assert sum(a > b for a, b in pairwise(map(arrived.index, sent))) == done
    else:
        assert (times.count(1), times.count(0)) == (100 - done, done)
        assert len(arrived) == sum(map(len, sent))
