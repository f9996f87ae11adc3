"""What the aggregator reads from its own disk, and what `fleetune status` shows of it."""

from __future__ import annotations

import contextlib
import io
import sqlite3
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from fleetune.edge.protocol.errors import ConfigError, FleetuneError, MessageError, RunFolderError
from fleetune.edge.protocol.messages import Presence
from fleetune.server.globals import Globals
from fleetune.server.journal import (
    FILE,
    Accepted,
    Announced,
    Closed,
    Finished,
    Journal,
    Quarantined,
    Readmitted,
    Record,
    Refused,
    Started,
    read_records,
)
from fleetune.server.quarantine import Quarantine
from fleetune.server.registry import Registry
from fleetune.server.run import identify
from fleetune.server.store import FILE as STORE_FILE
from fleetune.server.store import Store, open_store
from fleetune.tools.cli import build_parser
from fuzz.documents import ANNOUNCEMENT, DATA, JOB, SHAPES, TENSORS, UPDATE
from fuzz.mutations import from_seeds, mutate_bytes, mutate_json, mutate_tensors, of_lines
from fuzz.target import MIB, Target

RECORDS: list[Record] = [
    Started("r", "lab", (JOB,)),
    Announced(ANNOUNCEMENT),
    Accepted(UPDATE, 12.5, 3),
    Refused("nano-2", "not-finite", 13.0),
    Quarantined("nano-2", "not-finite", 13.0),
    Closed("fedms", 3, ["nano-1"], 20.0, 0, {"val": 0.5}),
    Readmitted("nano-2", 21.0),
    Finished("fedms"),
]
JOURNAL = b"".join(msgspec.json.encode(record) + b"\n" for record in RECORDS)


def journal(data: bytes, folder: Path) -> None:
    (folder / FILE).write_bytes(data)
    found = Journal(folder)
    try:
        list(read_records(found.path))
        started = found.started()
        identify(started, folder, "lab", (JOB,))
        store = open_store(found)
        try:
            registry = Registry(frozenset())
            Quarantine(found, store, registry, 3)
            registry.losses()
            for job in store.jobs():
                store.is_finished(job)
                for row in store.rounds(job):
                    for record in store.accepted(job, row.announcement.version):
                        with contextlib.suppress(FileNotFoundError):
                            found.load_update(record, SHAPES)
            store.devices()
            found.append(Finished("fedms"))
        finally:
            store.close()
    finally:
        found.close()


def _checkpoint() -> bytes:
    globals_ = Globals("int4")
    globals_.add(dict(TENSORS))
    globals_.tell(("blocks.",))
    return globals_.checkpoint()


def checkpoint(data: bytes, folder: Path) -> None:
    place = folder / "fedms" / "checkpoints"
    place.mkdir(parents=True)
    (place / "3.safetensors").write_bytes(data)
    (place / "x.safetensors").write_bytes(data)
    found = Journal(folder)
    try:
        version, kept = found.load_checkpoint("fedms", 1 << 20)
        assert version == 3
        globals_ = Globals("int4", kept)
        assert Globals("int4", globals_.checkpoint()).tensors.keys() == globals_.tensors.keys()
        globals_.tell(("",))
        globals_.add({name: tensor for name, tensor in TENSORS.items() if name not in globals_.tensors})
    finally:
        found.close()


def payload(data: bytes, folder: Path) -> None:
    (folder / "fedms" / "updates").mkdir(parents=True)
    (folder / "fedms" / "updates" / "3.bin").write_bytes(data)
    found = Journal(folder)
    try:
        for start in (0, 5, 1 << 50):
            with contextlib.suppress(RunFolderError):
                for tensor in found.load_update(Accepted(UPDATE, 1.0, 3, 0, start), SHAPES).values():
                    assert np.isfinite(tensor).all()
        found.load_update(Accepted(UPDATE, 1.0, 3), SHAPES)
    finally:
        found.close()


def _store() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / STORE_FILE)
        store.add(RECORDS, len(JOURNAL))
        store.see([Presence("nano-1", "idle", 3, "0.1.0", detail="waits")], 7.0)
        store.refuse("nano-1", "not-finite")
        store._database.execute("PRAGMA journal_mode = DELETE")
        store.close()
        return (Path(folder) / STORE_FILE).read_bytes()


PARSER = build_parser()


def status(data: bytes, folder: Path) -> None:
    (folder / STORE_FILE).write_bytes(data)
    for more in ([], ["--json"]):
        args = PARSER.parse_args(["status", "--state", str(folder), *more])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            args.run(args)
        assert all(char.isprintable() or char == "\n" for char in out.getvalue())


def store(data: bytes, folder: Path) -> None:
    """The aggregator makes a damaged index anew, from the journal."""
    (folder / FILE).write_bytes(JOURNAL)
    (folder / STORE_FILE).write_bytes(data)
    found = Journal(folder)
    try:
        with contextlib.suppress(sqlite3.DatabaseError):  # in a page that a start does not look at
            opened = open_store(found)
            opened.devices()
            opened.close()
    finally:
        found.close()


RUN = (RunFolderError, FleetuneError)
TARGETS = [
    Target(
        "journal",
        from_seeds([JOURNAL], of_lines(mutate_json), of_lines(mutate_json), mutate_bytes),
        journal,
        RUN,
        slow=True,
    ),
    Target("checkpoint", from_seeds([_checkpoint()], of_lines(mutate_json), mutate_bytes), checkpoint, (MessageError,)),
    Target("update's payload", from_seeds([DATA], mutate_bytes, mutate_tensors), payload, (RunFolderError,)),
    Target("status", from_seeds([_store()], mutate_bytes), status, (ConfigError,), memory=4 * MIB),
    Target("store", from_seeds([_store()], mutate_bytes), store, (FleetuneError,), memory=4 * MIB, slow=True),
]
