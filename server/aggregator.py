"""The aggregator: announces rounds, collects updates, averages them, publishes the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.errors import MessageError, RunFailedError, RunFolderError
from fleetune.edge.protocol.link import BrokerAddress, Connected, Link, Received
from fleetune.edge.protocol.messages import (
    Ack,
    Announcement,
    Frozen,
    Need,
    Payload,
    Presence,
    PresenceState,
    UpdateManifest,
    decode,
    encode,
    open_envelope,
    seal,
)
from fleetune.edge.protocol.modelfile import Card
from fleetune.edge.protocol.topics import Topics, read_number
from fleetune.server.aggregate import PartialSum
from fleetune.server.job import Job
from fleetune.server.journal import Accepted, Announced, Closed, Finished, Journal
from fleetune.server.registry import Registry
from fleetune.server.run import identify
from fleetune.server.strategies import STRATEGIES
from fleetune.server.strategies.base import ClosedRound, Metrics, NextRound, trains
from fleetune.server.uploads import Uploads

log = logging.getLogger(__name__)

_BROADCAST_EXPIRY = 600
"""Seconds that the broker keeps a chunk for a device that is not connected."""

_CLAIM_AFTER = 0.5
"""Seconds in which the broker shows whether another aggregator is there."""

_RIVAL_PATIENCE = 30.0
"""Seconds after which a broker has noticed that a client is gone; the keep-alive is 15."""

_SPEAK_EVERY = 60.0
"""Seconds between two words on what a round waits for."""

_ANNOUNCEMENT_EXPIRY = 24 * 3600
"""Seconds that an announcement counts, from the last time that it was sent."""


@dataclass(frozen=True)
class AggregatorConfig:
    """What the aggregator is started with.

    Attributes:
        fleet: Name of the fleet.
        broker: Where the broker listens.
        state: Folder of the journal; it holds one run.
        jobs: What to train, one after the other.
        devices: Ids of the fleet's devices; empty to take any that connects.
        quorum: Updates without which a round does not close at its deadline.
        deadline_s: Seconds a round may take before it closes with a quorum.
        cards: Job → what the model file of its global expert says of itself; a job without one gets no file.
    """

    fleet: str
    broker: BrokerAddress
    state: Path
    jobs: tuple[Job, ...]
    devices: frozenset[str] = frozenset()
    quorum: int = 1
    deadline_s: float = 600.0
    cards: Mapping[str, Card] = field(default_factory=dict)


@dataclass
class _Open:
    """The round that is open."""

    announcement: Announcement
    plan: NextRound
    accepted: dict[str, UpdateManifest] = field(default_factory=dict)
    deadline: float = 0.0


class Aggregator:
    """One fleet's aggregator.

    Args:
        config: What it is started with.

    Raises:
        RunFolderError: The state folder is in use, damaged, or holds a run of another fleet or with other jobs.
    """

    def __init__(self, config: AggregatorConfig) -> None:
        self._config = config
        self._topics = Topics(config.fleet)
        self._journal = Journal(config.state)
        try:
            self._run = identify(self._journal.started, config.state, config.fleet, config.jobs)
        except RunFolderError:
            self._journal.close()
            raise
        self._registry = Registry(config.devices)
        self._uploads = Uploads()
        self._globals: dict[str, NDArray[np.float32]] = {}
        self._closed: list[ClosedRound] = []
        self._open: _Open | None = None
        self._frozen: Frozen | None = None
        self._version = -1
        self._boot = time.time_ns() // 1_000_000
        self._rival: Presence | None = None
        self._claimed = False
        self._abandoned: set[str] = set()
        self._said: tuple[PresenceState, str] = ("online", "starts")
        self._link = Link(
            config.broker,
            f"{config.fleet}-aggregator-{self._run.run}-{self._boot}",
            subscriptions=[
                self._topics.aggregator_presence,
                self._topics.current("+"),
                self._topics.presence("+"),
                self._topics.upload_chunk("+", "+", "+"),  # and manifests: of two filters that fit, each gets a copy
                self._topics.need("+"),
            ],
            will=(self._topics.aggregator_presence, encode(self._presence("offline", "the connection broke"))),
        )

    def run(self) -> None:
        """Lead every job to its end.

        Raises:
            RunFailedError: Another aggregator leads the fleet, or too few devices are left for a quorum.
        """
        self._link.connect()
        try:
            self._claim_fleet()
            for job in self._config.jobs:
                self._lead(job)
            self._publish("idle", "all jobs are done")
        except RunFailedError as error:
            if self._open is not None:  # devices that come later shall not begin what failed
                self._link.publish(self._topics.current(self._open.announcement.job), b"", retain=True)
            if self._claimed:
                self._publish("failed", str(error))
            raise
        else:
            self._publish("offline", "all jobs are done")
        finally:
            self._link.close()
            self._journal.close()

    def _claim_fleet(self) -> None:
        """Make sure that this is the fleet's only aggregator; one whose machine died is gone after a while."""
        now = time.monotonic()
        look, give_up = now + _CLAIM_AFTER, now + _RIVAL_PATIENCE
        while self._rival is not None or time.monotonic() < look:
            if time.monotonic() > give_up:
                raise self._not_alone()
            before = self._rival
            self._pump(0.1)
            if self._rival is not None and before is None:
                log.warning("another aggregator leads the fleet %s; waits for it to leave", self._config.fleet)
        self._claimed = True
        self._publish("online", "starts")
        for topic in self._abandoned:
            self._link.publish(topic, b"", retain=True)

    def _not_alone(self) -> RunFailedError:
        return RunFailedError(
            f"another aggregator leads the fleet {self._config.fleet}", "stop that one, or give this fleet another name"
        )

    # --- a job --------------------------------------------------------------------------------------------------

    def _lead(self, job: Job) -> None:
        strategy = STRATEGIES[job.method](job)
        if any(isinstance(record, Finished) and record.job == job.id for record in self._journal.records):
            log.info("%s: is done already; name another folder with --state to train anew", job.id)
            return
        self._recover(job)
        self._registry.expect_anew()
        self._wait_for_devices()
        while (plan := strategy.next(self._closed)) is not None:
            if self._open is None:
                self._announce(job, plan, strategy.rounds)
            else:
                self._open.plan = plan
                self._send_announcement(self._open.announcement)
            self._collect(job)
            self._close(job)
        self._journal.append(Finished(job.id))
        self._log_results(job)
        if job.id in self._config.cards:
            log.info("%s: the global expert is in %s", job.id, self._journal.model_path(job.id))
        self._version += 1
        finished = self._announcement(job, NextRound("finished", 0), strategy.rounds, None)
        self._link.publish(self._topics.current(job.id), seal(finished), retain=True)

    def _log_results(self, job: Job) -> None:
        log.info("%s: done, run %s", job.id, self._run.run)
        if not self._closed:
            return
        last = self._closed[-1]
        for device, metrics in last.metrics.items():
            log.info("%s: %s%s", job.id, device, _accuracies(metrics))
        names = {name for metrics in last.metrics.values() for name in metrics if name.startswith("test")}
        means = {name: mean for name in sorted(names) if (mean := last.mean(name)) is not None}
        log.info("%s: mean%s", job.id, _accuracies(means))

    def _recover(self, job: Job) -> None:
        """Rebuild the state of a job from the journal."""
        self._open, self._closed, self._globals, self._frozen, self._version = None, [], {}, None, -1
        for record in self._journal.records:
            if isinstance(record, Announced) and record.announcement.job == job.id:
                announcement = record.announcement
                self._version = announcement.version
                self._frozen = announcement.frozen
                self._open = _Open(announcement, NextRound(announcement.stage, 0))
            elif isinstance(record, Accepted) and record.manifest.job == job.id and self._open:
                self._open.accepted[record.manifest.device] = record.manifest
            elif isinstance(record, Closed) and record.job == job.id and self._open:
                self._closed.append(self._closed_round(self._open))
                self._open = None
        closed = [r.version for r in self._journal.records if isinstance(r, Closed) and r.job == job.id]
        if closed:
            self._globals = self._journal.load_globals(job.id, closed[-1])
            log.info("%s: goes on after version %d", job.id, closed[-1])

    @staticmethod
    def _closed_round(done: _Open) -> ClosedRound:
        metrics = {device: manifest.metrics for device, manifest in sorted(done.accepted.items())}
        return ClosedRound(done.announcement.stage, metrics)

    def _wait_for_devices(self) -> None:
        wanted = len(self._config.devices) or self._config.quorum
        said = ""
        while len(self._registry.ready()) < wanted:
            self._check_quorum()
            missing = ", ".join(sorted(self._config.devices - self._registry.ready())) or "devices"
            detail = f"waits for {missing}: {len(self._registry.ready())} of {wanted} are there"
            self._publish("online", detail)
            if detail != said:
                said = detail
                log.info("%s", detail)
            self._pump(1.0)
            if self._open is not None and set(self._open.accepted) >= self._registry.members():
                return  # after a restart: everyone had answered already

    def _check_quorum(self) -> None:
        if self._config.devices and len(self._registry.members()) < max(1, self._config.quorum):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._registry.losses().items())
            raise RunFailedError(
                f"too few devices are left for a quorum of {self._config.quorum} ({reasons})",
                "mend the devices, start them again, and then the same command: the run goes on where it stopped; "
                "or start another run, with other options and another folder for --state",
            )

    # --- announcing ---------------------------------------------------------------------------------------------

    def _announcement(self, job: Job, plan: NextRound, rounds: int, payload: Payload | None) -> Announcement:
        return Announcement(
            fleet=self._config.fleet,
            run=self._run.run,
            job=job.id,
            version=self._version,
            method=job.method,
            stage=plan.stage,
            round=sum(trains(past.stage) for past in self._closed) + trains(plan.stage),
            rounds=rounds,
            backbone=job.backbone,
            quantisation=job.quantisation,
            settings={**job.settings, "depth": plan.depth},
            expires=time.time() + _ANNOUNCEMENT_EXPIRY,
            payload=payload,
            frozen=self._frozen if plan.frozen else None,
        )

    def _announce(self, job: Job, plan: NextRound, rounds: int) -> None:
        if plan.frozen and self._frozen is None:
            payload = self._store_broadcast(job, plan.frozen)
            assert payload is not None
            self._frozen = Frozen(self._version, payload)
        payload = self._store_broadcast(job, plan.broadcast)
        announcement = self._announcement(job, plan, rounds, payload)
        if self._journal.started is None:
            self._journal.append(self._run)
        self._journal.append(Announced(announcement))
        self._open = _Open(announcement, plan)
        log.info(
            "%s: %s, %d of %d rounds, depth %d", job.id, plan.stage, announcement.round, announcement.rounds, plan.depth
        )
        self._send_announcement(announcement)

    def _store_broadcast(self, job: Job, prefixes: tuple[str, ...]) -> Payload | None:
        """Take the next version, and keep the tensors with these prefixes under it."""
        self._version += 1
        tensors = {name: tensor for name, tensor in self._globals.items() if name.startswith(prefixes)}
        if not prefixes or not tensors:
            return None
        data = Codec.named(job.codec).encode(tensors)
        self._journal.save_broadcast(job.id, self._version, data)
        return chunks.describe(data, job.codec)

    def _send_announcement(self, announcement: Announcement) -> None:
        assert self._open is not None
        self._open.deadline = time.monotonic() + self._config.deadline_s
        fresh = msgspec.structs.replace(announcement, expires=time.time() + _ANNOUNCEMENT_EXPIRY)
        self._link.publish(self._topics.current(announcement.job), seal(fresh), retain=True)
        for number, payload in announcement.payloads.items():
            if number >= announcement.version - 1:  # frozen tensors of an earlier round are with the devices already
                self._send_chunks(announcement.job, number, payload, range(payload.chunks))

    def _send_chunks(self, job: str, number: int, payload: Payload, indices: range | list[int]) -> None:
        data = self._journal.load_broadcast(job, number)
        assert data is not None
        self._link.publish_many(
            ((self._topics.broadcast_chunk(job, number, i), chunks.chunk(data, payload, i)) for i in indices),
            expiry=_BROADCAST_EXPIRY,
        )

    # --- collecting ---------------------------------------------------------------------------------------------

    def _collect(self, job: Job) -> None:
        """Wait until every member has answered, or until the deadline with a quorum."""
        assert self._open is not None
        where = f"{job.id}: {self._open.announcement.stage}, round {self._open.announcement.round}"
        speak, warned = time.monotonic() + _SPEAK_EVERY, False
        while True:
            self._check_quorum()
            waiting = self._registry.members() - set(self._open.accepted)
            answers, quorum = len(self._open.accepted), self._config.quorum
            if not waiting and answers >= quorum:
                return
            names = ", ".join(self._registry.describe(device) for device in sorted(waiting)) or "more devices"
            late = time.monotonic() > self._open.deadline
            if late and answers >= quorum:
                log.warning("%s: the deadline has passed; the round closes without %s", where, names)
                return
            if late and not warned:
                warned = True
                log.warning(
                    "%s: the deadline has passed with %d of the %d answers that close it; waits for %s",
                    *(where, answers, quorum, names),
                )
                self._publish("working", f"late: waits for {names}")
            elif time.monotonic() > speak:
                log.info("%s: %d of %d answers; waits for %s", where, answers, answers + len(waiting), names)
                speak = time.monotonic() + _SPEAK_EVERY
            self._pump(0.5, job)

    def _pump(self, timeout: float, job: Job | None = None) -> None:
        for event in self._link.events(timeout):
            if isinstance(event, Connected) and self._open is not None:
                self._publish_progress()
                self._send_announcement(self._open.announcement)
            elif isinstance(event, Received):
                self._receive(event, job)
        for device, missing in self._uploads.overdue():
            self._link.publish(self._topics.down(device, "missing"), encode(missing))

    def _receive_rival(self, event: Received) -> None:
        """Another aggregator's presence; the one that came first stays."""
        presence = decode(event.payload, Presence)
        if presence.boot == self._boot:
            return
        there = presence.state not in ("offline", "failed")
        if not self._claimed:
            self._rival = presence if there else None
        elif there and presence.boot < self._boot:  # both came at once
            raise self._not_alone()
        else:  # a late Will must not say that nobody is there
            self._publish(*self._said)

    def _clear_abandoned(self, topic: str, raw: bytes) -> None:
        """Take back the announcement of a run that nobody leads any more, or devices would answer it."""
        if not raw or open_envelope(raw, Announcement).run == self._run.run:
            return
        if self._claimed:
            self._link.publish(topic, b"", retain=True)
        else:
            self._abandoned.add(topic)

    def _receive_presence(self, levels: tuple[str, ...], event: Received) -> None:
        presence = decode(event.payload, Presence)
        if levels != (presence.name,):
            raise MessageError("the presence is of another device", "ignore it", reason="wrong-topic")
        self._registry.update(presence, retained=event.retained)

    def _receive(self, event: Received, job: Job | None) -> None:
        levels = self._topics.split(event.topic)
        try:
            if levels == ("agg", "st"):
                self._receive_rival(event)
            elif levels[:1] == ("g",):
                self._clear_abandoned(event.topic, event.payload)
            elif levels[:1] == ("st",):
                self._receive_presence(levels[1:], event)
            elif levels[:1] == ("up",) and levels[2:] == ("need",):
                self._repair(decode(event.payload, Need))
            elif levels[:1] == ("up",) and len(levels) == 4 and job is not None:
                device, update, last = levels[1:]
                if last == "m":
                    with self._refusing(device, update):
                        self._receive_manifest(device, update, event.payload, job)
                elif (index := read_number(last)) is not None:
                    self._receive_chunk(device, update, index, event.payload, job)
        except MessageError as error:
            log.warning("%s: %s (%s)", event.topic, error, error.reason)

    @contextmanager
    def _refusing(self, device: str, update: str) -> Iterator[None]:
        """Tell a device why its update is refused; it then lets go of it."""
        try:
            yield
        except MessageError as error:
            self._uploads.drop(device, update)
            self._answer(device, update, error.reason)
            raise

    def _answer(self, device: str, update: str, reason: str = "") -> None:
        self._link.publish(
            self._topics.down(device, "ack"), encode(Ack(update=update, accepted=not reason, reason=reason))
        )

    def _receive_manifest(self, device: str, update: str, raw: bytes, job: Job) -> None:
        manifest = open_envelope(raw, UpdateManifest)
        if (manifest.device, manifest.update, manifest.fleet) != (device, update, self._config.fleet):
            raise MessageError("the manifest belongs to another topic", "send it to its own", reason="wrong-topic")
        if not self._registry.knows(device):
            raise MessageError(f"{device} is not of this fleet", "add it to the fleet file", reason="unknown-device")
        if manifest.backbone != job.backbone:
            raise MessageError("the update is for another backbone", "pack the job's one", reason="wrong-backbone")
        if manifest.run != self._run.run:
            raise MessageError("the update is of another run", "answer the newest announcement", reason="wrong-run")
        if self._is_journaled(manifest):
            self._answer(device, update)
            return
        assert self._open is not None
        if manifest.job != job.id or manifest.version != self._open.announcement.version:
            raise MessageError("the update is for a round that is closed", "wait for the next", reason="stale-round")
        if manifest.samples < 1:
            raise MessageError("the update has no samples", "train on at least one", reason="no-samples")
        if manifest.payload is None:
            self._accept(manifest, b"")
        else:
            self._uploads.begin(manifest)

    def _is_journaled(self, manifest: UpdateManifest) -> bool:
        return any(
            isinstance(record, Accepted)
            and (record.manifest.device, record.manifest.update) == (manifest.device, manifest.update)
            for record in self._journal.records
        )

    def _receive_chunk(self, device: str, update: str, index: int, data: bytes, job: Job) -> None:
        if (complete := self._uploads.add(device, update, index, data)) is not None:
            with self._refusing(device, update):
                self._check_tensors(*complete, job)
                self._accept(*complete)

    def _check_tensors(self, manifest: UpdateManifest, data: bytes, job: Job) -> None:
        assert manifest.payload is not None
        assert self._open is not None
        for name, tensor in Codec.named(manifest.payload.codec).decode(data).items():
            allowed = name.startswith(self._open.plan.broadcast) if self._open.plan.broadcast else False
            if not allowed or job.shapes.get(name) != tensor.shape:
                raise MessageError(
                    f"tensor {name} of shape {tensor.shape} is not expected in this stage",
                    "use the same pack and the same number of classes",
                    reason="unexpected-tensor",
                )

    def _accept(self, manifest: UpdateManifest, data: bytes) -> None:
        """Journal an update, then acknowledge it: in this order nothing that was acknowledged can be lost."""
        assert self._open is not None
        if data:
            self._journal.save_update(manifest, data)
        self._journal.append(Accepted(manifest, time.time()))
        self._open.accepted[manifest.device] = manifest
        log.info("%s: update of %s, %d bytes%s", manifest.job, manifest.device, len(data), _in_words(manifest.metrics))
        self._answer(manifest.device, manifest.update)
        self._publish_progress()

    def _repair(self, need: Need) -> None:
        if self._open is None or need.job != self._open.announcement.job:
            return
        payload = self._open.announcement.payloads.get(need.version)
        if payload is not None:
            indices = list(chunks.unpack_bitmap(need.bitmap, payload.chunks))
            self._send_chunks(need.job, need.version, payload, indices)

    # --- closing ------------------------------------------------------------------------------------------------

    def _close(self, job: Job) -> None:
        assert self._open is not None
        total = PartialSum()
        for _, manifest in sorted(self._open.accepted.items()):
            total.add(self._journal.load_update(manifest), manifest.samples)
        self._globals |= total.mean()
        number = self._open.announcement.version
        self._journal.save_globals(job.id, number, self._globals)
        self._save_model(job, self._open)
        self._journal.append(Closed(job.id, number, sorted(self._open.accepted), time.time()))
        self._closed.append(self._closed_round(self._open))
        self._open = None
        self._uploads.clear()

    def _save_model(self, job: Job, closing: _Open) -> None:
        """Write the model file after each round of the global stage; what comes later does not change the expert."""
        card = self._config.cards.get(job.id)
        if card is not None and closing.announcement.stage == "global":
            expert = {name: t for name, t in self._globals.items() if name.startswith(closing.plan.broadcast)}
            self._journal.save_model(job.id, msgspec.structs.replace(card, run=self._run.run), expert)

    # --- presence -----------------------------------------------------------------------------------------------

    def _presence(self, state: PresenceState, detail: str) -> Presence:
        facts: dict[str, float | int | str | bool] = {}
        if self._open is not None:
            announcement = self._open.announcement
            facts = {
                "job": announcement.job,
                "stage": announcement.stage,
                "round": announcement.round,
                "rounds": announcement.rounds,
                "depth": int(announcement.settings["depth"]),
                "updates": len(self._open.accepted),
            }
        return Presence(
            name="aggregator", state=state, boot=self._boot, kit=version("fleetune"), detail=detail, facts=facts
        )

    def _publish(self, state: PresenceState, detail: str) -> None:
        self._said = state, detail
        self._link.publish(self._topics.aggregator_presence, encode(self._presence(state, detail)), retain=True)

    def _publish_progress(self) -> None:
        assert self._open is not None
        done, members = len(self._open.accepted), len(self._registry.members())
        self._publish("working", f"collects updates: {done} of {members}")


def _in_words(metrics: Metrics) -> str:
    """The figures of an update that an operator looks for first."""
    forms = {"loss": "loss {:.3f}", "cpu_s": "{:.1f} CPU s", "peak_mib": "{:.0f} MiB"}
    shown = {name: value for name in forms if isinstance(value := metrics.get(name), float | int)}
    return _accuracies(metrics) + "".join(f", {forms[name].format(value)}" for name, value in shown.items())


def _accuracies(metrics: Metrics) -> str:
    """Accuracies on ``test``: of each expert where there are several, else of the one that the round is about."""
    experts = [name for name in metrics if name.startswith("test_")] or [name for name in metrics if name == "test"]
    words = [f"{name.removeprefix('test').removeprefix('_')} {metrics[name]:.3f}".strip() for name in experts]
    return f", test accuracy {', '.join(words)}" if words else ""
