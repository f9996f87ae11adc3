"""The aggregator: announces rounds, collects updates, averages them, publishes the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import shapes_of
from fleetune.edge.protocol.complaints import Complaints
from fleetune.edge.protocol.errors import FileAccessError, MessageError, RunFailedError, RunFolderError
from fleetune.edge.protocol.files import is_full
from fleetune.edge.protocol.identity.credential import Sender
from fleetune.edge.protocol.identity.folder import Identity
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.link import Connected, Disconnected, Event, Link, Received
from fleetune.edge.protocol.messages import (
    Announcement,
    Need,
    Presence,
    PresenceState,
    Stage,
    TimeReply,
    TimeRequest,
    Who,
    shortened,
)
from fleetune.edge.protocol.modelfile import Card
from fleetune.edge.protocol.topics import Topics, read_number
from fleetune.server.broadcast import Broadcast
from fleetune.server.globals import MAX_CHECKPOINT, Globals
from fleetune.server.intake import Intake, accuracies
from fleetune.server.job import Job
from fleetune.server.journal import Announced, Closed, Finished, Journal, Typical, read_records
from fleetune.server.leadership import OWN, Facts, Leadership
from fleetune.server.privacy import Account, Guarantee
from fleetune.server.quarantine import Quarantine
from fleetune.server.registry import Registry
from fleetune.server.round import OpenRound
from fleetune.server.rules.base import Bounds
from fleetune.server.run import identify
from fleetune.server.store import open_store
from fleetune.server.strategies import STRATEGIES
from fleetune.server.strategies.base import ClosedRound, Metrics, NextRound, Strategy, trains

log = logging.getLogger(__name__)

_SPEAK_EVERY = 60.0
"""Seconds between two words on what a round waits for."""

_NAMED = 8
"""Devices that are named where there are many."""

_LOOK_AGAIN = 5.0
"""Seconds after which a full disk is tried again."""

_ASK_EVERY = 5.0
"""Seconds between two questions to one device."""

_CHECKPOINT_ROUNDS = 16
_CHECKPOINT_BYTES = 256 << 20
"""Rounds, and bytes of their updates, that a restart repeats at most."""


@dataclass(frozen=True)
class Model:
    """What the model file of a job's global expert holds beside what was trained.

    Attributes:
        card: What it says of itself, but for the run's id.
        initial: Full name → initial value, as every device draws it from the job's seed.
    """

    card: Card
    initial: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class AggregatorConfig:
    """What the aggregator is started with.

    Attributes:
        fleet: Name of the fleet.
        broker: Where the broker listens.
        state: Folder of the journal; it holds one run.
        jobs: What to train, one after the other.
        devices: Ids of the fleet's devices; empty to take any that connects.
        quorum: Updates without which a round does not close at its deadline, or while others are away.
        deadline_s: Seconds a round may take before it closes with a quorum.
        away_s: Seconds that a round waits for a device that has gone, if there is a quorum without it.
        buffer: Updates after which a round closes at once, whoever still trains; None to wait for the members.
        max_staleness: Closed rounds after which an update no longer counts.
        quarantine_after: Updates refused for cause after which a device is kept out of the run.
        readmit: Devices that are let in again.
        keep_history: Whether every round's updates and global tensors stay on disk.
        models: Job → what its model file holds; a job without one gets no file.
        identity: Who it is; without one nothing is signed or verified.
    """

    fleet: str
    broker: BrokerAddress
    state: Path
    jobs: tuple[Job, ...]
    devices: frozenset[str] = frozenset()
    quorum: int = 1
    deadline_s: float = 600.0
    away_s: float = 5.0
    buffer: int | None = None
    max_staleness: int = 8
    quarantine_after: int = 3
    readmit: frozenset[str] = frozenset()
    keep_history: bool = False
    models: Mapping[str, Model] = field(default_factory=dict)
    identity: Identity | None = None


class Aggregator:
    """One fleet's aggregator.

    Args:
        config: What it is started with.

    Raises:
        RunFolderError: The state folder is in use, damaged, or holds a run of another fleet or with other jobs.
        FileAccessError: There is no room in it.
    """

    def __init__(self, config: AggregatorConfig) -> None:
        self._config = config
        self._topics = Topics(config.fleet)
        self._journal = Journal(config.state, keep_history=config.keep_history)
        try:
            started = self._journal.started()
            self._run = identify(started, config.state, config.fleet, config.jobs)
            self._is_new = started is None
            self._store = open_store(self._journal)
        except (FileAccessError, RunFolderError):
            self._journal.close()
            raise
        self._registry = Registry(config.devices)
        self._quarantine = Quarantine(self._journal, self._store, self._registry, config.quarantine_after)
        self._closed: list[ClosedRound] = []
        self._typical: dict[Stage, Typical] = {}  # of the last round of each stage in which anything changed
        self._last: dict[str, Metrics] = {}
        self._open: OpenRound | None = None
        self._intake: Intake | None = None
        self._globals = Globals("f32")
        self._account: Account | None = None
        self._checkpointed = -1
        self._version = self._closed_version = -1
        self._cut: float | None = None  # since when the link is down
        self._seals, self._complaints = Seals(config.identity), Complaints()
        self._asked: dict[str, float] = {}  # device → when it was asked who it is
        self._leadership = Leadership(self._topics, self._run.run, self._facts)
        self._link = Link(
            config.broker,
            f"{config.fleet}-aggregator-{self._run.run}-{self._leadership.boot}",
            subscriptions=[
                *([self._topics.trust, self._topics.aggregator_introduction] if self._seals.signed else []),
                *([self._topics.introduction("+")] if self._seals.signed else []),  # before what they have signed
                self._topics.aggregator_presence,
                self._topics.current("+"),
                self._topics.presence("+"),
                self._topics.upload_chunk("+", "+", "+"),  # and manifests: of two filters that fit, each gets a copy
                self._topics.up("+", "+"),
            ],
            will=self._leadership.will,
            seals=self._seals,
        )
        self._broadcast = Broadcast(self._link, self._topics)

    def run(self) -> None:
        """Lead every job to its end.

        Raises:
            RunFailedError: Another aggregator leads the fleet, or too few devices are left for a quorum.
        """
        for device in sorted(self._config.readmit):
            self._quarantine.readmit(device)
        self._link.connect()
        last: tuple[PresenceState, str] = "offline", "stopped"  # or the next one would wait for this to leave
        try:
            self._leadership.claim(self._link, self._pump)
            for job in self._config.jobs:
                self._lead(job)
            self._leadership.say(self._link, "idle", "all jobs are done")
            last = "offline", "all jobs are done"
        except RunFailedError as error:
            if self._open is not None:  # devices that come later shall not begin what failed
                self._link.publish(self._topics.current(self._open.announcement.job), b"", retain=True)
            last = "failed", str(error)
            raise
        finally:
            if self._leadership.claimed:
                self._leadership.say(self._link, *last)
            if last[0] == "offline":
                log.info("%s", last[1])
            self._link.close()
            self._registry.save(self._store)
            self._store.close()
            self._journal.close()

    # --- a job --------------------------------------------------------------------------------------------------

    def _lead(self, job: Job) -> None:
        if self._store.is_finished(job.id):
            log.info("%s: is done already; name another folder with --state to train anew", job.id)
            return
        strategy = STRATEGIES[job.method](job)
        intake = self._intake = Intake(
            *(self._link, self._topics, self._run.run, job, self._journal, self._store, self._registry),
            self._quarantine,
            max_staleness=self._config.max_staleness,
        )
        globals_ = self._globals = self._recover(job, strategy, intake)
        self._account = self._recover_account(job)
        self._with_room(partial(self._save_guarantee, job))
        self._registry.expect_anew()
        self._wait_for_devices()
        while (plan := strategy.next(self._closed)) is not None:
            if self._open is None:
                self._with_room(partial(self._announce, job, plan, strategy.rounds, globals_))
            else:
                self._broadcast.announce(self._open.announcement, globals_.payloads, fresh=False)
            assert self._open is not None
            self._open.deadline = time.monotonic() + self._config.deadline_s
            self._collect(job)
            self._with_room(partial(self._close, job, globals_, intake))
            self._with_room(partial(self._save_guarantee, job))
            if self._is_due(job):
                self._with_room(partial(self._checkpoint, job, globals_))
        self._with_room(partial(self._checkpoint, job, globals_))
        self._with_room(partial(self._journal.append, Finished(job.id)))
        self._store.add([Finished(job.id)], self._journal.size)
        intake.end()
        self._intake = None
        self._log_results(job)
        self._version += 1
        self._broadcast.end(self._announcement(job, NextRound("finished", 0), strategy.rounds))

    def _with_room(self, write: Callable[[], None]) -> None:
        """Do what writes; while the disk is full, wait, and go on listening."""
        while True:
            try:
                write()
            except OSError as error:
                if not is_full(error):
                    raise
                detail = f"no room in {self._config.state}: {error.strerror}"
                log.error("%s; tries again until there is some", detail)  # noqa: TRY400 - nothing is wrong but the disk
                self._leadership.say(self._link, "working", detail)
                until = time.monotonic() + _LOOK_AGAIN
                while time.monotonic() < until:
                    self._pump(0.5)
            else:
                return

    def _log_results(self, job: Job) -> None:
        log.info("%s: done, run %s", job.id, self._run.run)
        for device, metrics in sorted(self._last.items()):
            log.info("%s: %s%s", job.id, device, accuracies(metrics))
        if self._closed:
            log.info("%s: mean%s", job.id, accuracies(self._closed[-1].means))
        if self._guarantee is not None:
            log.info("%s: %s; see %s", job.id, self._guarantee.in_words(), self._journal.privacy_path(job.id))
        if job.id in self._config.models:
            log.info("%s: the global expert is in %s", job.id, self._journal.model_path(job.id))

    def _recover(self, job: Job, strategy: Strategy, intake: Intake) -> Globals:
        """Go on where the journal ends: what the last checkpoint lacks is computed again, from the updates."""
        self._open, self._closed, self._last, self._version, self._closed_version = None, [], {}, -1, -1
        self._typical.clear()
        self._checkpointed, globals_ = self._load_globals(job)
        for row in self._store.rounds(job.id):
            self._version = row.announcement.version
            if self._version > self._checkpointed:
                plan = strategy.next(self._closed)
                assert plan is not None
                globals_.tell(plan.broadcast)
                whole, announced = globals_.whole, row.announcement.whole
                if (whole and whole.sha256) != (announced and announced.sha256):
                    raise RunFolderError(
                        f"{self._config.state}: version {self._version} of {job.id} does not follow from the updates",
                        "restore the folder from a backup, or start the run in a new one",
                    )
                self._open = self._opened(job, row.announcement, plan)
                for accepted in self._store.accepted(job.id, self._version):
                    self._open.add(accepted, self._journal.load_update(accepted, job.shapes))
            if row.closed is not None:
                if self._open is not None:
                    globals_.add(self._open.gain())
                self._open = None
                self._remember(ClosedRound(row.announcement.stage, row.means), row.typical)
                self._closed_version = self._version
                intake.close_round(self._version)
        if self._open is not None:
            number = self._open.announcement.round
            log.info("%s: goes on with %d updates of round %d", job.id, self._open.updates, number)
        elif self._closed:
            log.info("%s: goes on after %d rounds", job.id, len(self._closed))
        return globals_

    def _load_globals(self, job: Job) -> tuple[int, Globals]:
        """What the newest checkpoint holds, and the round that it includes."""
        version, checkpoint = self._journal.load_checkpoint(job.id, MAX_CHECKPOINT)
        where = f"{self._config.state}: the checkpoint of {job.id} after version {version}"
        remedy = "restore the folder from a backup, or start the run in a new one"
        try:
            globals_ = Globals(job.codec, checkpoint)
        except MessageError as error:
            raise RunFolderError(f"{where} is damaged: {error.what}", remedy) from error
        if not shapes_of(globals_.tensors).items() <= job.shapes.items():
            raise RunFolderError(f"{where} holds tensors of another job", remedy)
        return version, globals_

    def _recover_account(self, job: Job) -> Account | None:
        """What the rounds in the journal have given away, if the job is private."""
        if job.privacy is None:
            return None
        account = Account(job.privacy)
        for record in read_records(self._journal.path) if self._closed else ():
            if isinstance(record, Closed) and record.job == job.id and record.privacy is not None:
                account.add(record.privacy)
        return account

    @property
    def _guarantee(self) -> Guarantee | None:
        """What the privacy of the job's devices has come to, if there is any."""
        return None if self._account is None else self._account.guarantee()

    def _save_guarantee(self, job: Job) -> None:
        if (guarantee := self._guarantee) is not None:
            self._journal.save_guarantee(job.id, guarantee)

    def _checkpoint(self, job: Job, globals_: Globals) -> None:
        """Keep what followed from the rounds so far, so that a restart need not repeat them."""
        self._journal.append(sync=True)
        self._journal.save_checkpoint(job.id, self._closed_version, globals_.checkpoint())
        self._store.forget(job.id, self._closed_version)
        self._checkpointed = self._closed_version

    def _wait_for_devices(self) -> None:
        wanted = len(self._config.devices - self._registry.kept_out.keys()) or self._config.quorum
        begun = self._open is not None or bool(self._closed)  # then a quorum goes on: some may have gone for good
        said, until = "", time.monotonic() + (self._config.away_s if begun else self._config.deadline_s)
        while (there := len(self._registry.ready())) < wanted:
            if time.monotonic() > until and (begun or there >= self._config.quorum):
                break
            self._check_quorum()
            away = self._config.devices - self._registry.ready() - self._registry.kept_out.keys()
            for device in away:
                self._ask_who(device)  # what the broker retains of it may be the late Will of an earlier connection
            missing = ", ".join(sorted(away)) or "devices"
            detail = f"waits for {missing}: {there} of {wanted} are there"
            if detail != said:
                said = detail
                log.info("%s", detail)
                self._leadership.say(self._link, "online", detail)
            self._pump(1.0)
            if self._open is not None and set(self._open.answers) >= self._registry.members():
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

    def _announcement(self, job: Job, plan: NextRound, rounds: int) -> Announcement:
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
            issued=0.0,
            expires=0.0,
            privacy=None if job.privacy is None else job.privacy.of(plan.stage),
        )

    def _announce(self, job: Job, plan: NextRound, rounds: int, globals_: Globals) -> None:
        before = globals_.told()
        since, changes = globals_.tell(plan.broadcast, self._link.max_chunk)
        version, self._version = self._version, self._version + 1
        announcement = msgspec.structs.replace(
            self._announcement(job, plan, rounds), whole=globals_.whole, since=since, changes=changes
        )
        records = (self._run, Announced(announcement)) if self._is_new else (Announced(announcement),)
        try:
            self._journal.append(*records)
        except OSError:
            self._version = version
            globals_.untell(before)
            raise
        self._is_new = False
        self._store.add(records, self._journal.size)
        self._open = self._opened(job, announcement, plan)
        log.info(
            "%s: %s, %d of %d rounds, depth %d", job.id, plan.stage, announcement.round, announcement.rounds, plan.depth
        )
        self._leadership.say(self._link, "working", f"announces {plan.stage}")
        self._broadcast.announce(announcement, globals_.payloads, fresh=True)

    def _opened(self, job: Job, announcement: Announcement, plan: NextRound) -> OpenRound:
        if announcement.privacy is None:
            bounds = Bounds(job.rule, self._typical.get(announcement.stage))
        else:
            shapes = (shape for name, shape in job.shapes.items() if name.startswith(plan.trained))
            bounds = Bounds.of_noise(job.rule, announcement.privacy, shapes)
        return OpenRound(announcement, plan, bounds, partial(self._journal.load_update, shapes=job.shapes))

    # --- collecting ---------------------------------------------------------------------------------------------

    def _collect(self, job: Job) -> None:
        """Wait until the round may close."""
        assert self._open is not None
        where = f"{job.id}: {self._open.announcement.stage}, round {self._open.announcement.round}"
        speak, warned = time.monotonic() + _SPEAK_EVERY, False
        while True:
            self._check_quorum()
            answers, quorum = len(self._open.answers), self._config.quorum
            if self._config.buffer is not None and trains(self._open.announcement.stage):
                if self._open.updates >= self._config.buffer:
                    return
                quorum = self._config.buffer
            waiting = self._registry.members() - self._open.answers.keys()
            if not waiting and answers >= quorum:
                return
            late = self._cut is None and time.monotonic() > self._open.deadline
            if answers >= quorum and (late or not waiting & self._registry.here(self._config.away_s)):
                why = "the deadline has passed; the round closes" if late else "closes"
                log.warning("%s: %s without %s", where, why, self._in_words(waiting))
                return
            if late and not warned:
                warned = True
                log.warning(
                    "%s: the deadline has passed with %d of the %d answers that close it; waits for %s",
                    *(where, answers, quorum, self._in_words(waiting)),
                )
                self._leadership.say(self._link, "working", f"late: waits for {self._in_words(waiting)}")
            elif time.monotonic() > speak:
                names = self._in_words(waiting)
                log.info("%s: %d of %d answers; waits for %s", where, answers, answers + len(waiting), names)
                speak = time.monotonic() + _SPEAK_EVERY
            self._pump(0.5)

    def _in_words(self, waiting: frozenset[str]) -> str:
        """Some of the devices that a round waits for, and what each does."""
        names = ", ".join(self._registry.describe(device) for device in sorted(waiting)[:_NAMED])
        more = f" and {len(waiting) - _NAMED} more" if len(waiting) > _NAMED else ""
        return f"{names}{more}" or "more devices"

    def _pump(self, timeout: float) -> None:
        """Look at what comes, for so long; journal and acknowledge what has come whole."""
        kept_out = len(self._registry.kept_out)
        for event in self._link.events(timeout):
            try:
                self._receive(event)
            except MessageError as error:
                self._complaints.about(event.topic if isinstance(event, Received) else "", error)
        taking = self._taking
        if taking is not None and self._intake is not None:
            if self._intake.commit(taking):
                done, members = len(taking.answers), len(self._registry.members())
                self._leadership.say_sometimes(self._link, "working", f"collects updates: {done} of {members}")
            self._intake.ask()
        if len(self._registry.kept_out) > kept_out:
            self._leadership.say_again(self._link)
        self._leadership.catch_up(self._link)
        self._broadcast.repair()
        self._registry.save(self._store)

    @property
    def _taking(self) -> OpenRound | None:
        """The round that updates count in: one that was summed up, and waits for room, takes no more."""
        return None if self._open is None or self._open.closing else self._open

    def _receive(self, event: Event) -> None:
        if isinstance(event, Connected):
            if self._seals.signed:
                self._link.publish(self._topics.aggregator_introduction, self._seals.introduction, retain=True)
            self._registry.trust()
            self._leadership.say_again(self._link)
            cut, self._cut = self._cut, None
            if self._open is not None:
                if cut is not None:  # what devices had to say could not arrive
                    self._open.deadline += time.monotonic() - cut
                self._broadcast.announce(self._open.announcement, self._globals.payloads, fresh=False)
        elif isinstance(event, Disconnected):
            self._registry.doubt()
            self._cut = self._cut or time.monotonic()
        if not isinstance(event, Received):
            return
        levels, taking = self._topics.split(event.topic), self._taking
        if levels == ("agg", "st"):
            self._leadership.meet(self._link, event.payload, retained=event.retained)
        elif levels[:1] == ("g",):
            self._receive_announcement(event)
        elif levels[:1] == ("st",):
            self._receive_presence(levels[1:], event)
        elif levels == ("ca", "trust"):
            self._receive_trust(event.payload)
        elif levels == ("agg", "id"):
            self._seals.meet(event.payload, OWN)
        elif levels[:1] == ("up",) and len(levels) == 3:
            self._receive_question(levels[1], levels[2], event)
        elif levels[:1] == ("up",) and len(levels) == 4 and self._intake is not None and taking is not None:
            device, update, last = levels[1:]
            if last == "m":
                self._intake.manifest(device, update, event.payload, taking)
            elif (index := read_number(last)) is not None:
                self._intake.chunk(device, update, index, event.payload, taking)

    def _receive_announcement(self, event: Received) -> None:
        """One's own, or what another aggregator leaves; where the open round is announced it must not stay."""
        own = None if self._open is None else self._open.announcement
        if not event.payload and self._leadership.has_taken_back(event.topic):
            return
        if own is None or event.topic != self._topics.current(own.job):
            self._leadership.clear(self._link, event.topic, event.payload)
        elif not event.payload or self._seals.open(event.topic, event.payload, Announcement, OWN).run != own.run:
            self._broadcast.announce(own, self._globals.payloads, fresh=False)  # devices have let go of it

    def _receive_trust(self, raw: bytes) -> None:
        trust = self._seals.hear_trust(raw)
        if trust is not None:
            log.info("takes version %d of the fleet's trust document", trust.version)

    def _receive_question(self, device: str, verb: str, event: Received) -> None:
        """What a device asks for."""
        sender = Sender("device", device)
        if verb == "need" and self._registry.knows(device):
            self._broadcast.need(self._seals.open(event.topic, event.payload, Need, sender))
        elif verb == "time":
            question = self._seals.open(event.topic, event.payload, TimeRequest, sender)
            self._link.say(self._topics.down(device, "time"), TimeReply(question.nonce, self._seals.clock.now()))

    def _receive_presence(self, levels: tuple[str, ...], event: Received) -> None:
        device = levels[0]
        if levels[1:] == ("id",):
            if event.payload:
                self._seals.meet(event.payload, Sender("device", device))
            return
        try:
            presence = self._seals.open(event.topic, event.payload, Presence, Sender("device", device))
        except MessageError as error:
            if error.reason == "unknown-key":
                self._ask_who(device)
            raise
        if levels != (presence.name,):
            raise MessageError("the presence is of another device", "ignore it", reason="wrong-topic")
        was_here, was_shared = self._registry.is_here(presence.name), self._registry.is_shared(presence.name)
        if self._registry.update(presence, retained=event.retained) and not event.retained:
            if was_here and presence.state == "offline":
                log.warning("%s is offline: %s", presence.name, presence.detail)
            elif not was_here and presence.state != "offline":
                log.info("%s is there", presence.name)
        if self._registry.is_shared(presence.name) and not was_shared:
            log.warning("%s: two agents take turns under this id; give each device one of its own", presence.name)

    def _ask_who(self, device: str) -> None:
        """Have a device introduce itself again."""
        now = time.monotonic()
        if now - self._asked.get(device, -_ASK_EVERY) >= _ASK_EVERY:
            self._asked[device] = now
            self._link.say(self._topics.down(device, "who"), Who())

    # --- closing ------------------------------------------------------------------------------------------------

    def _close(self, job: Job, globals_: Globals, intake: Intake) -> None:
        done = self._open
        assert done is not None
        number, means = done.announcement.version, done.means()
        if not done.closing:  # a full disk may stop what follows, and then it is done again
            globals_.add(done.gain())
            done.closing = True
        self._journal.keep_globals(job.id, number, globals_.tensors)
        self._save_model(job, done, globals_)
        privacy = done.privacy
        record = Closed(job.id, number, sorted(done.answers), time.time(), done.late, means, done.typical, privacy)
        self._journal.append(record, sync=False)  # the next record is; until then the round counts as open
        self._store.add([record], self._journal.size)
        self._closed_version = number
        self._remember(ClosedRound(done.announcement.stage, means), done.typical)
        self._last = done.answers
        intake.close_round(number)
        self._open = None
        if self._account is not None and privacy is not None:
            self._account.add(privacy)

    def _remember(self, closed: ClosedRound, typical: Typical | None) -> None:
        """What the next rounds follow from."""
        self._closed.append(closed)
        if typical is not None:
            self._typical[closed.stage] = typical

    def _is_due(self, job: Job) -> bool:
        """Whether what a restart would have to repeat has become much."""
        if self._closed_version - self._checkpointed >= _CHECKPOINT_ROUNDS:
            return True
        return self._journal.uncheckpointed(job.id, self._checkpointed) > _CHECKPOINT_BYTES

    def _save_model(self, job: Job, closing: OpenRound, globals_: Globals) -> None:
        """Write the model file after each round of the global stage; what comes later does not change the expert."""
        model = self._config.models.get(job.id)
        if model is not None and closing.announcement.stage == "global":
            expert = {name: t for name, t in globals_.tensors.items() if name.startswith(closing.plan.trained)}
            values = {
                name: initial + expert[name] if name in expert else initial
                for name, initial in model.initial.items()
                if name in expert or f"{name[:-1]}B" in expert  # an A that stayed as it began
            }
            self._journal.save_model(job.id, msgspec.structs.replace(model.card, run=self._run.run), values)

    def _facts(self) -> Facts:
        """What the aggregator's presence shows."""
        out = self._registry.kept_out
        facts: Facts = {"quarantined": shortened(", ".join(f"{d}: {out[d]}" for d in sorted(out)))} if out else {}
        if self._open is None:
            return facts
        announcement = self._open.announcement
        return facts | {
            "job": announcement.job,
            "stage": announcement.stage,
            "round": announcement.round,
            "rounds": announcement.rounds,
            "depth": int(announcement.settings["depth"]),
            "updates": self._open.updates,
        }
