"""The journal: appended records survive a restart; a torn one is dropped, a damaged one named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.errors import RunFolderError
from fleetune.edge.protocol.messages import Announcement, UpdateManifest
from fleetune.server.job import Job
from fleetune.server.journal import FILE, Accepted, Announced, Closed, Finished, Journal, Record, Started, read_records

ANNOUNCEMENT = Announcement(
    fleet="lab", run="r", job="fedms", version=1, method="fedms", stage="global", round=1, rounds=5, backbone="b",
    quantisation="nf4", settings={"depth": 2, "learning_rate": 1e-3, "mix": "logits"}, expires=1e9,
)  # fmt: skip
UPDATE = UpdateManifest(
    fleet="lab", device="nano-1", update="r-fedms-1", run="r", job="fedms", version=1, backbone="b", samples=9,
    metrics={"loss": 0.5, "stopped_early": False},
)  # fmt: skip
JOB = Job(
    id="fedms", method="fedms", backbone="b", quantisation="nf4", shapes={"gate.A": (3, 8), "head.bias": (2,)},
    rounds={"global": 6}, settings={"depth": 2, "learning_rate": 1.0, "mix": "logits", "fast": False},
)  # fmt: skip
RECORDS: list[Record] = [
    Started("r", "lab", (JOB,)), Announced(ANNOUNCEMENT),
    Accepted(UPDATE, 12.5), Closed("fedms", 1, ["nano-1"], 13.5), Finished("fedms"),
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
    return journal.records


def test_records_survive_a_restart_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "run", RECORDS[:2])
    journal = Journal(tmp_path / "run")
    assert journal.records == RECORDS[:2]
    for record in RECORDS[2:]:
        journal.append(record)
    assert journal.records == RECORDS
    journal.close()
    assert reopen(tmp_path / "run") == RECORDS
    assert read_records(tmp_path / "run" / FILE) == RECORDS


def test_a_record_is_in_the_file_before_append_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for count, record in enumerate(RECORDS, start=1):
        journal.append(record)
        assert read_records(tmp_path / FILE) == RECORDS[:count]
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
        Journal(tmp_path)
    assert "backup" in caught.value.remedy
    assert (tmp_path / FILE).read_bytes() == b"\n".join(lines)


# --- tensors beside the records -----------------------------------------------------------------------------


def test_an_updates_tensors_are_kept(tmp_path: Path) -> None:
    tensors = {"head.bias": np.array([0.5, -1.25], np.float32)}
    data = Codec.named("f16").encode(tensors)
    manifest = UpdateManifest(
        fleet="lab", device="nano-1", update="r-fedms-1", run="r", job="fedms", version=1, backbone="b", samples=1,
        metrics={}, payload=chunks.describe(data, "f16"),
    )  # fmt: skip
    journal = Journal(tmp_path)
    journal.save_update(manifest, data)
    journal.close()
    journal = Journal(tmp_path)
    found = journal.load_update(manifest)
    assert set(found) == {"head.bias"}
    np.testing.assert_array_equal(found["head.bias"], tensors["head.bias"])


def test_an_update_without_tensors_has_none(tmp_path: Path) -> None:
    assert Journal(tmp_path).load_update(UPDATE) == {}


def test_globals_and_broadcasts_are_kept_by_job_and_version(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for job, value in (("one", 1.0), ("two", 2.0)):
        for number in (0, 1):
            journal.save_globals(job, number, {"x": np.full(2, value + number / 10, np.float32)})
            journal.save_broadcast(job, number, f"{job} {number}".encode())
    journal.close()
    journal = Journal(tmp_path)
    np.testing.assert_array_equal(journal.load_globals("two", 1)["x"], np.full(2, 2.1, np.float32))
    assert journal.load_broadcast("one", 1) == b"one 1"
    assert journal.load_broadcast("one", 7) is None


def test_no_half_written_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.save_broadcast("one", 0, b"old")

    def failing(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        journal.save_broadcast("one", 0, b"new and longer")
    monkeypatch.undo()
    assert journal.load_broadcast("one", 0) == b"old"
    assert [file.name for file in (tmp_path / "one" / "broadcasts").iterdir()] == ["0.bin"]
