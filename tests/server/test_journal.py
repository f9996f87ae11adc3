"""The journal: appended records survive a restart; a torn one is dropped, a damaged one named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.errors import RunFolderError
from fleetune.edge.protocol.messages import Announcement, UpdateManifest
from fleetune.server.job import Job
from fleetune.server.journal import (
    FILE,
    Accepted,
    Announced,
    Closed,
    Finished,
    Journal,
    Record,
    Started,
    Typical,
    read_records,
)

ANNOUNCEMENT = Announcement(
    fleet="lab", run="r", job="fedms", version=1, method="fedms", stage="global", round=1, rounds=5, backbone="b",
    quantisation="nf4", settings={"depth": 2, "learning_rate": 1e-3, "mix": "logits"}, issued=0.0, expires=1e9,
)  # fmt: skip
UPDATE = UpdateManifest(
    fleet="lab", device="nano-1", update="r-fedms-1", run="r", job="fedms", version=1, issued=0.0,
    backbone="b", samples=9,
    metrics={"loss": 0.5, "stopped_early": False},
)  # fmt: skip
JOB = Job(
    id="fedms", method="fedms", backbone="b", quantisation="nf4", shapes={"gate.A": (3, 8), "head.bias": (2,)},
    rounds={"global": 6}, settings={"depth": 2, "learning_rate": 1.0, "mix": "logits", "fast": False},
)  # fmt: skip
RECORDS: list[Record] = [
    Started("r", "lab", (JOB,)), Announced(ANNOUNCEMENT),
    Accepted(UPDATE, 12.5, into=1, norm=0.1),
    Closed("fedms", 1, ["nano-1"], 13.5, 2, {"loss": 0.5}, Typical(0.1, 9)), Finished("fedms"),
]  # fmt: skip


def write(folder: Path, records: list[Record]) -> bytes:
    journal = Journal(folder)
    for record in records:
        journal.append(record)
    journal.close()
    return (folder / FILE).read_bytes()


def reopen(folder: Path) -> list[Record]:
    journal = Journal(folder)
    journal.close()
    return list(read_records(journal.path))


def test_records_survive_a_restart_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "run", RECORDS[:2])
    journal = Journal(tmp_path / "run")
    assert journal.started() == RECORDS[0]
    tail = journal.size
    for record in RECORDS[2:]:
        journal.append(record)
    assert list(read_records(journal.path, tail)) == RECORDS[2:]
    journal.close()
    assert reopen(tmp_path / "run") == RECORDS


def test_records_that_belong_together_are_appended_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(*RECORDS)
    assert journal.size == (tmp_path / FILE).stat().st_size
    journal.close()
    assert reopen(tmp_path) == RECORDS


def test_a_journal_without_a_run_has_not_started(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.started() is None
    assert journal.size == 0
    journal.close()


def test_a_folder_in_use_is_refused_until_it_is_let_go(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(RunFolderError, match="in use"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_a_record_is_in_the_file_before_append_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for count, record in enumerate(RECORDS, start=1):
        journal.append(record)
        assert list(read_records(tmp_path / FILE)) == RECORDS[:count]
    journal.close()


def test_a_record_is_forced_onto_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    real, forced = os.fsync, list[bytes]()

    def watched(descriptor: int) -> None:
        real(descriptor)
        forced.append((tmp_path / FILE).read_bytes())

    monkeypatch.setattr(os, "fsync", watched)
    for record in RECORDS:
        journal.append(record)
    journal.close()
    assert [content.count(b"\n") for content in forced] == [1, 2, 3, 4, 5]


def test_a_record_that_means_nothing_yet_is_forced_onto_the_disk_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    real, forced = os.fsync, list[bytes]()

    def watched(descriptor: int) -> None:
        real(descriptor)
        forced.append((tmp_path / FILE).read_bytes())

    monkeypatch.setattr(os, "fsync", watched)
    journal.append(RECORDS[0], sync=False)
    assert forced == []
    assert reread(journal) == RECORDS[:1]
    journal.append(RECORDS[1])
    assert [content.count(b"\n") for content in forced] == [2]
    journal.close()


def test_records_that_cannot_be_written_are_not_there_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.append(*RECORDS[:2])

    def failing(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        journal.append(*RECORDS[2:])
    monkeypatch.undo()
    assert reread(journal) == RECORDS[:2]
    journal.append(*RECORDS[3:])
    journal.close()
    assert reopen(tmp_path) == [*RECORDS[:2], *RECORDS[3:]]


def reread(journal: Journal) -> list[Record]:
    return list(read_records(journal.path))


KILLED = """
import os, signal, sys
from pathlib import Path
from fleetune.server.journal import Finished, Journal
journal = Journal(Path(sys.argv[1]))
for number in range(3):
    journal.append(Finished(f"job-{number}"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_records_survive_a_kill(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert reopen(tmp_path) == [Finished("job-0"), Finished("job-1"), Finished("job-2")]


def test_a_new_folder_has_an_empty_journal(tmp_path: Path) -> None:
    assert reopen(tmp_path / "a" / "b") == []
    assert reopen(tmp_path / "a" / "b") == []


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 400))
def test_a_record_that_was_cut_off_is_dropped_and_the_next_one_is_readable(tmp_path: Path, cut: int) -> None:
    folder = tmp_path / str(cut)
    raw = write(folder, RECORDS)
    cut = min(cut, len(raw))
    os.truncate(folder / FILE, len(raw) - cut)
    whole = raw[: len(raw) - cut].count(b"\n")
    assert reopen(folder) == RECORDS[:whole]
    write(folder, [Finished("again")])
    assert reopen(folder) == [*RECORDS[:whole], Finished("again")]


def test_a_torn_record_of_zeros_is_dropped(tmp_path: Path) -> None:
    raw = write(tmp_path, RECORDS)
    (tmp_path / FILE).write_bytes(raw + b"\0" * 100)
    assert reopen(tmp_path) == RECORDS
    assert (tmp_path / FILE).read_bytes() == raw


@pytest.mark.parametrize("damage", [
    b"", b"{", b"\0\0\0", b"[]", b'{"type":"dreamt"}',
    b'{"type":"finished","job":5}', b'{"type":"finished","job":"\xff"}',
])  # fmt: skip
def test_a_damaged_record_in_the_middle_is_named_by_its_line_and_nothing_is_changed(
    damage: bytes, tmp_path: Path
) -> None:
    lines = write(tmp_path, RECORDS).split(b"\n")
    lines[2] = damage
    (tmp_path / FILE).write_bytes(b"\n".join(lines))
    with pytest.raises(RunFolderError, match=f"{tmp_path / FILE}, line 3") as caught:
        reopen(tmp_path)
    assert "backup" in caught.value.remedy
    assert (tmp_path / FILE).read_bytes() == b"\n".join(lines)


def test_a_damaged_record_behind_the_part_that_is_known_is_named_by_where_it_lies(tmp_path: Path) -> None:
    raw = write(tmp_path, RECORDS[:3])
    known = raw.index(b"\n") + 1
    (tmp_path / FILE).write_bytes(raw.replace(b'"type":"accepted"', b'"type":"rejected"'))
    with pytest.raises(RunFolderError, match=f"line 2 after byte {known}"):
        list(read_records(tmp_path / FILE, known))


# --- updates ----------------------------------------------------------------------------------------------------


SHAPES = {"head.bias": (2,)}


def sent(device: str, value: float, *, version: int = 1, codec: str = "f16") -> tuple[Accepted, bytes]:
    """An update, into version 1."""
    data = Codec.named(codec).encode({"head.bias": np.array([value, -value], np.float32)})
    manifest = msgspec.structs.replace(
        UPDATE, device=device, update=f"r-fedms-{version}", version=version, payload=chunks.describe(data, codec)
    )
    return Accepted(manifest, 12.5, into=1, staleness=1 - version), data


def values(journal: Journal, records: list[Accepted]) -> list[float]:
    found = [journal.load_update(record, SHAPES) for record in records]
    assert all(tensors.keys() == {"head.bias"} for tensors in found)
    return [float(tensors["head.bias"][0]) for tensors in found]


def test_updates_and_their_tensors_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    first = journal.accept([sent("a", 0.5), sent("b", 1.5, codec="int8+zlib")])
    second = journal.accept([sent("c", 2.5, version=0, codec="f32")])
    assert values(journal, [*first, *second]) == pytest.approx([0.5, 1.5, 2.5], rel=1e-3)
    journal.close()
    journal = Journal(tmp_path)
    kept = [record for record in reread(journal) if isinstance(record, Accepted)]
    assert kept == [*first, *second]
    assert [(record.manifest.device, record.staleness) for record in kept] == [("a", 0), ("b", 0), ("c", 1)]
    assert values(journal, kept[::-1]) == pytest.approx([2.5, 1.5, 0.5], rel=1e-3)
    journal.close()


def test_an_update_without_tensors_is_kept_among_the_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.load_update(Accepted(UPDATE, 12.5, into=1), SHAPES) == {}
    kept = journal.accept([(Accepted(UPDATE, 12.5, into=1), b"")])
    assert not (tmp_path / "fedms").exists()
    kept += journal.accept([sent("a", 0.5), (Accepted(UPDATE, 12.5, into=1), b""), sent("b", 1.5)])
    journal.close()
    journal = Journal(tmp_path)
    assert reread(journal) == kept
    assert journal.load_update(kept[0], SHAPES) == journal.load_update(kept[2], SHAPES) == {}
    assert values(journal, [kept[1], kept[3]]) == [0.5, 1.5]
    journal.close()


def test_tensors_are_on_disk_before_the_records_that_speak_of_them_and_both_before_accept_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    real, forced = os.fsync, list[tuple[str, int]]()

    def watched(descriptor: int) -> None:
        real(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        forced.append((path.name, path.stat().st_size))

    monkeypatch.setattr(os, "fsync", watched)
    kept = journal.accept([sent("a", 0.5), sent("b", 1.5)])
    size = sum(len(data) for _, data in (sent("a", 0.5), sent("b", 1.5)))
    assert ("1.bin", size) in forced
    assert "updates" in [name for name, _ in forced]  # the new name too
    assert forced[-1] == (FILE, journal.size)
    assert forced.index(("1.bin", size)) < len(forced) - 1
    assert len(kept) == 2
    journal.close()


@pytest.mark.parametrize("cut", [1, 40])
def test_tensors_that_a_power_cut_left_without_a_record_do_no_harm(cut: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    first = journal.accept([sent("a", 0.5)])
    (file,) = tmp_path.rglob("1.bin")
    file.write_bytes(file.read_bytes() + sent("b", 1.5)[1][:-cut])  # and here the power was cut
    journal.close()
    journal = Journal(tmp_path)
    second = journal.accept([sent("c", 2.5)])
    assert values(journal, [*first, *second]) == [0.5, 2.5]
    journal.close()


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_updates_are_kept_whole_or_not_at_all(stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails at the n-th time that something is forced onto it."""
    journal = Journal(tmp_path)
    real, calls = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        journal.accept([sent("a", 0.5), sent("b", 1.5)])
    monkeypatch.undo()
    assert reread(journal) == []
    kept = journal.accept([sent("b", 1.5), sent("c", 2.5)])
    assert values(journal, kept) == [1.5, 2.5]
    journal.close()
    assert reopen(tmp_path) == kept


# --- checkpoints ------------------------------------------------------------------------------------------------


def fill(journal: Journal, versions: range) -> dict[int, Accepted]:
    """Rounds with an update each."""
    kept = {}
    for version in versions:
        record, data = sent("a", version + 0.5, version=version)
        (kept[version],) = journal.accept([(msgspec.structs.replace(record, into=version), data)])
    return kept


def test_the_newest_checkpoint_is_the_one_that_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.load_checkpoint("one", 99) == (-1, b"")
    for version in (8, 9, 10):  # by number, not by name
        journal.save_checkpoint("one", version, b"one %d" % version)
    journal.save_checkpoint("two", 3, b"two")
    journal.close()
    journal = Journal(tmp_path)
    assert journal.load_checkpoint("one", 99) == (10, b"one 10")
    assert journal.load_checkpoint("two", 99) == (3, b"two")
    assert len(list((tmp_path / "one").rglob("*.safetensors"))) == 1
    (tmp_path / "one" / "checkpoints" / "9.safetensors").write_bytes(b"one 9")  # killed before it was let go
    assert journal.load_checkpoint("one", 99) == (10, b"one 10")
    journal.close()


def test_a_checkpoint_lets_go_of_the_updates_that_it_includes(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    kept = fill(journal, range(5))
    size = len(sent("a", 1)[1])
    assert journal.uncheckpointed("fedms", -1) == 5 * size
    assert journal.uncheckpointed("fedms", 2) == 2 * size
    journal.save_checkpoint("fedms", 2, b"checkpoint")
    assert {file.name for file in (tmp_path / "fedms" / "updates").iterdir()} == {"3.bin", "4.bin"}
    assert values(journal, [kept[3], kept[4]]) == [3.5, 4.5]
    assert journal.uncheckpointed("fedms", 2) == 2 * size
    journal.close()


def test_with_a_history_every_rounds_updates_and_global_tensors_stay(tmp_path: Path) -> None:
    journal = Journal(tmp_path, keep_history=True)
    kept = fill(journal, range(3))
    for version in range(3):
        journal.keep_globals("fedms", version, {"x": np.full(2, version, np.float32)})
    journal.save_checkpoint("fedms", 2, b"checkpoint")
    journal.close()
    journal = Journal(tmp_path)
    assert values(journal, list(kept.values())) == [0.5, 1.5, 2.5]
    assert [float(journal.load_globals("fedms", version)["x"][0]) for version in range(3)] == [0, 1, 2]
    journal.close()


def test_without_a_history_global_tensors_are_not_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.keep_globals("fedms", 1, {"x": np.zeros(2, np.float32)})
    journal.close()
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_no_half_written_checkpoint_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    kept = fill(journal, range(2))
    journal.save_checkpoint("fedms", 0, b"old")

    def failing(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        journal.save_checkpoint("fedms", 1, b"new and longer")
    monkeypatch.undo()
    assert journal.load_checkpoint("fedms", 99) == (0, b"old")
    assert values(journal, [kept[1]]) == [1.5]
    assert [file.name for file in (tmp_path / "fedms" / "checkpoints").iterdir()] == ["0.safetensors"]
    journal.close()
