"""What one asks an aggregator about: devices, rounds, and which updates it has.

SQLite beside the journal. The journal is the truth and this is an index of it: it notes up to which byte it has read
the journal, so that whatever a power cut takes from it is read again, and a file that is lost is made anew.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, FileAccessError
from fleetune.edge.protocol.messages import Announcement, Count, Presence, Time
from fleetune.server.journal import (
    Accepted,
    Announced,
    Closed,
    Finished,
    Journal,
    Quarantined,
    Readmitted,
    Record,
    Refused,
    Typical,
    read_records,
)

log = logging.getLogger(__name__)

Kind = TypeVar("Kind")

FILE = "aggregator.sqlite"

_BOUNDS = f"PRAGMA hard_heap_limit = {64 << 20}"
"""Bytes that SQLite takes at most: a row that is damaged may ask for any number."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS journal (read INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS devices (
    id TEXT PRIMARY KEY, state TEXT NOT NULL DEFAULT '', detail TEXT NOT NULL DEFAULT '', boot INTEGER,
    kit TEXT NOT NULL DEFAULT '', first_seen REAL, last_seen REAL, accepted INTEGER NOT NULL DEFAULT 0,
    late INTEGER NOT NULL DEFAULT 0, refused INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS updates (
    device TEXT, id TEXT, job TEXT NOT NULL, into_version INTEGER NOT NULL, start INTEGER NOT NULL, record BLOB,
    PRIMARY KEY (device, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS updates_of_a_round ON updates (job, into_version);
CREATE TABLE IF NOT EXISTS rounds (
    job TEXT, version INTEGER, announcement BLOB NOT NULL, closed REAL, answers INTEGER NOT NULL DEFAULT 0,
    late INTEGER NOT NULL DEFAULT 0, means BLOB, typical BLOB, PRIMARY KEY (job, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS quarantine (
    device TEXT PRIMARY KEY, strikes INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS finished (job TEXT PRIMARY KEY) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class DeviceRow:
    """What is known of a device.

    Attributes:
        id: Its id.
        state: Where it stood when it was last heard of, or that it is revoked.
        detail: What it was doing.
        boot: Starts of its agent.
        kit: Version of Fleetune.
        first_seen: Unix time; absent if only its updates were.
        last_seen: Unix time.
        accepted: Updates that counted in the round that they answered.
        late: Updates that counted in a later one.
        refused: Updates that were refused by this aggregator.
        reason: Why the last of them was.
        quarantined: Why it is kept out of the run; empty if it is not.
    """

    id: str
    state: str
    detail: str
    boot: Count | None
    kit: str
    first_seen: Time | None
    last_seen: Time | None
    accepted: Count
    late: Count
    refused: Count
    reason: str
    quarantined: str


@dataclass(frozen=True)
class RoundRow:
    """What is known of a round.

    Attributes:
        announcement: As it was announced.
        closed: Unix time; absent while it is open.
        answers: Devices that answered it in time.
        late: Updates of earlier rounds that it took in.
        means: Mean of every figure over its answers.
        typical: What was typical of its updates.
    """

    announcement: Announcement
    closed: float | None
    answers: int
    late: int
    means: dict[str, float]
    typical: Typical | None = None


class _Position(msgspec.Struct):
    read: Count


class _Job(msgspec.Struct):
    job: str


class _Record(msgspec.Struct):
    record: bytes


class _Strikes(msgspec.Struct):
    device: str
    strikes: Count


class _Reason(msgspec.Struct):
    device: str
    reason: str


class _Round(msgspec.Struct):
    announcement: bytes
    closed: Time | None
    answers: Count
    late: Count
    means: bytes | None
    typical: bytes | None


class Store:
    """An SQLite database.

    Args:
        path: Its file, made if it is not there; ``:memory:`` for none.
        only_look: Whether to change nothing; the file must be there.

    Raises:
        sqlite3.DatabaseError: The file is not such a database.
    """

    def __init__(self, path: Path | str, *, only_look: bool = False) -> None:
        self._behind: list[Record] = []
        if only_look:
            self._database = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None)
            self._database.execute(_BOUNDS)
            return
        self._database = sqlite3.connect(path, isolation_level=None)
        # Written ahead, but not synced: what a power cut takes is in the journal.
        try:
            with _named("its schema"):
                for line in (_BOUNDS, "PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL"):
                    self._database.execute(line)
                self._database.executescript(_SCHEMA)
                self._database.execute("SELECT typical FROM rounds LIMIT 0")  # an older one lacks it, and is made anew
                if not self._rows("SELECT read FROM journal", _Position):
                    self._database.execute("INSERT INTO journal VALUES (0)")
        except sqlite3.DatabaseError:
            self._database.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    # --- the journal's records ----------------------------------------------------------------------------------

    @property
    def read(self) -> int:
        """Bytes of the journal that are in here."""
        return self._rows("SELECT read FROM journal", _Position)[0].read

    def add(self, records: Iterable[Record], read: int) -> None:
        """Take records of the journal; while the disk is full they wait in memory.

        Args:
            records: Those that follow the ones before.
            read: Bytes of the journal up to their end.
        """
        self._behind += records
        if self._write(lambda: self._add_all(self._behind, read)):
            self._behind.clear()

    def catch_up(self, records: Iterable[Record], read: int) -> None:
        """The same at a start, which goes by what is in here.

        Raises:
            sqlite3.OperationalError: There is no room for them.
        """
        with _named("a page"):
            self._write(lambda: self._add_all(records, read), at_once=True)

    def _add_all(self, records: Iterable[Record], read: int) -> None:
        for record in records:
            self._add(record)
        self._database.execute("UPDATE journal SET read = ?", (read,))

    def _add(self, record: Record) -> None:
        execute = self._database.execute
        if isinstance(record, Announced):
            announcement = record.announcement
            execute(
                "INSERT OR REPLACE INTO rounds (job, version, announcement) VALUES (?, ?, ?)",
                (announcement.job, announcement.version, msgspec.json.encode(announcement)),
            )
        elif isinstance(record, Accepted):
            manifest = record.manifest
            done = execute(
                "INSERT OR IGNORE INTO updates VALUES (?, ?, ?, ?, ?, ?)",
                (
                    *(manifest.device, manifest.update, manifest.job),
                    record.into,
                    record.start,
                    msgspec.json.encode(record),
                ),
            )
            late = int(manifest.version != record.into)
            execute("INSERT OR IGNORE INTO devices (id) VALUES (?)", (manifest.device,))
            execute(
                "UPDATE devices SET accepted = accepted + ?, late = late + ? WHERE id = ?",
                (done.rowcount * (1 - late), done.rowcount * late, manifest.device),
            )
        elif isinstance(record, Closed):
            means = msgspec.json.encode(record.means)
            typical = None if record.typical is None else msgspec.json.encode(record.typical)
            execute(
                "UPDATE rounds SET closed = ?, answers = ?, late = ?, means = ?, typical = ? "
                "WHERE job = ? AND version = ?",
                (record.closed, len(record.devices), record.late, means, typical, record.job, record.version),
            )
        elif isinstance(record, Finished):
            execute("INSERT OR IGNORE INTO finished VALUES (?)", (record.job,))
        elif isinstance(record, Refused):
            execute(
                "INSERT INTO quarantine (device, strikes) VALUES (?, 1) "
                "ON CONFLICT (device) DO UPDATE SET strikes = strikes + 1",
                (record.device,),
            )
        elif isinstance(record, Quarantined):
            execute("UPDATE quarantine SET reason = ? WHERE device = ?", (record.reason, record.device))
            execute("INSERT OR IGNORE INTO devices (id) VALUES (?)", (record.device,))
        elif isinstance(record, Readmitted):
            execute("DELETE FROM quarantine WHERE device = ?", (record.device,))

    def has_update(self, device: str, update: str) -> bool:
        """Whether an update was accepted."""
        query = "SELECT 1 FROM updates WHERE device = ? AND id = ?"
        if self._database.execute(query, (device, update)).fetchone() is not None:
            return True
        waiting = (record.manifest for record in self._behind if isinstance(record, Accepted))
        return any((manifest.device, manifest.update) == (device, update) for manifest in waiting)

    def accepted(self, job: str, version: int) -> Iterator[Accepted]:
        """What was accepted into a round that is in no checkpoint, in that order."""
        query = "SELECT record FROM updates WHERE job = ? AND into_version = ? AND record IS NOT NULL ORDER BY start"
        for row in self._rows(query, _Record, job, version):
            yield _decode(row.record, Accepted)

    def forget(self, job: str, version: int) -> None:
        """Of the updates of rounds up to this one, know only that they were accepted."""
        query = "UPDATE updates SET record = NULL WHERE job = ? AND into_version <= ? AND record IS NOT NULL"
        self._write(lambda: self._database.execute(query, (job, version)))

    def jobs(self) -> list[str]:
        """Jobs that were announced."""
        return [row.job for row in self._rows("SELECT DISTINCT job FROM rounds ORDER BY job", _Job)]

    def rounds(self, job: str) -> list[RoundRow]:
        """The rounds of a job, oldest first."""
        query = "SELECT announcement, closed, answers, late, means, typical FROM rounds WHERE job = ? ORDER BY version"
        return [
            RoundRow(
                _decode(row.announcement, Announcement),
                row.closed,
                row.answers,
                row.late,
                _decode(row.means, dict[str, float]) if row.means else {},
                _decode(row.typical, Typical) if row.typical else None,
            )
            for row in self._rows(query, _Round, job)
        ]

    def is_finished(self, job: str) -> bool:
        """Whether a job has no more rounds."""
        return self._database.execute("SELECT 1 FROM finished WHERE job = ?", (job,)).fetchone() is not None

    # --- the registry -------------------------------------------------------------------------------------------

    def see(self, presences: Iterable[Presence], now: float) -> None:
        """Take the newest presence of some devices."""
        query = (
            "INSERT INTO devices (id, state, detail, boot, kit, first_seen, last_seen) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET state = excluded.state, "
            "detail = excluded.detail, boot = excluded.boot, kit = excluded.kit, "
            "first_seen = COALESCE(first_seen, excluded.first_seen), last_seen = excluded.last_seen"
        )
        rows = [(p.name, p.state, p.detail, p.boot, p.kit, now, now) for p in presences]
        self._write(lambda: self._database.executemany(query, rows))

    def shut_out(self, devices: Iterable[str]) -> None:
        """Show devices as revoked, until they are enrolled again and say where they stand."""
        rows = [(device,) for device in devices]
        query = "UPDATE devices SET state = 'revoked', detail = '' WHERE id = ?"
        self._write(lambda: self._database.executemany(query, rows))

    def refuse(self, device: str, reason: str) -> None:
        """Count an update that was refused."""
        query = (
            "INSERT INTO devices (id, refused, reason) VALUES (?, 1, ?) "
            "ON CONFLICT (id) DO UPDATE SET refused = refused + 1, reason = excluded.reason"
        )
        self._write(lambda: self._database.execute(query, (device, reason)))

    def strikes(self) -> dict[str, int]:
        """Device → its updates that were refused for cause, if any were since it was last let in."""
        return {row.device: row.strikes for row in self._rows("SELECT device, strikes FROM quarantine", _Strikes)}

    def quarantined(self) -> dict[str, str]:
        """Device that is kept out of the run → why."""
        query = "SELECT device, reason FROM quarantine WHERE reason <> ''"
        return {row.device: row.reason for row in self._rows(query, _Reason)}

    def devices(self) -> list[DeviceRow]:
        """Every device that was ever seen."""
        query = (
            "SELECT id, state, detail, boot, kit, first_seen, last_seen, accepted, late, refused, devices.reason AS "
            "reason, COALESCE(quarantine.reason, '') AS quarantined FROM devices LEFT JOIN quarantine ON device = id "
            "ORDER BY id"
        )
        return self._rows(query, DeviceRow)

    def _rows(self, query: str, kind: type[Kind], *values: object) -> list[Kind]:
        """The rows that a query finds, by the names of their columns.

        Raises:
            sqlite3.DatabaseError: They are damaged: SQLite takes any type in any column.
        """
        with _named("a row"):
            cursor = self._database.execute(query, values)
            names = [column[0] for column in cursor.description]
            return msgspec.convert([dict(zip(names, row, strict=True)) for row in cursor], list[kind])  # type: ignore[valid-type]

    def _write(self, change: Callable[[], object], *, at_once: bool = False) -> bool:
        """Change something, all of it or nothing; False while there is no room, unless it has to be at once.

        Nothing that cannot be had again is lost with it: records are in the journal, and devices speak again.
        """
        try:
            self._database.execute("BEGIN IMMEDIATE")
            change()
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if at_once:
                raise
            log.warning("%s lags behind the journal: %s", FILE, error)
            return False
        finally:
            if self._database.in_transaction:  # SQLite ends one by itself after some failures, and not after others
                self._database.execute("ROLLBACK")
        return True


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Name what is damaged; SQLite's words may quote it, and one size of a row that is damaged may be all memory.

    Raises:
        sqlite3.DatabaseError: Something is.
    """
    try:
        yield
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise sqlite3.DatabaseError(f"{what} is damaged: {error}") from error
    except MemoryError as error:
        raise sqlite3.DatabaseError(f"{what} is damaged: it asks for more memory than there may be") from error


def _decode(raw: bytes, kind: type[Kind]) -> Kind:
    """What a row holds as JSON.

    Raises:
        sqlite3.DatabaseError: It is damaged, which the database cannot know.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except (TypeError, *UNDECODABLE) as error:
        raise sqlite3.DatabaseError(f"a row is damaged: {str(error)[:200]}") from error


def open_store(journal: Journal) -> Store:
    """The store of a journal, up to date with it; one that is damaged or ahead is made anew.

    Raises:
        RunFolderError: A record of the journal is damaged.
        FileAccessError: There is no room for it.
    """
    path = journal.folder / FILE
    try:
        store = Store(path)
        if store.read <= journal.size:
            store.catch_up(read_records(journal.path, store.read), journal.size)
            return store
        log.warning("%s is ahead of the journal; it is made anew", path)
        store.close()
    except sqlite3.DatabaseError as error:
        log.warning("%s: %s; it is made anew from the journal", path, error)
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    try:
        store = Store(path)
        store.catch_up(read_records(journal.path), journal.size)
    except sqlite3.OperationalError as error:
        raise FileAccessError(f"{path}: {error}", "make room there, then start again") from error
    return store
