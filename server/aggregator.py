"""The aggregator: announces rounds, collects updates until a round may close, publishes what came out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fleetune.edge.protocol.address import BrokerAddress
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
    PresenceState,
    shortened,
)
from fleetune.edge.protocol.topics import Topics, read_number
from fleetune.server.broadcast import Broadcast
from fleetune.server.intake import Intake
from fleetune.server.job import Job
from fleetune.server.journal import Journal
from fleetune.server.leadership import OWN, Facts, Leadership
from fleetune.server.quarantine import Quarantine
from fleetune.server.reception import Reception
from fleetune.server.registry import Registry
from fleetune.server.round import OpenRound
from fleetune.server.run import identify
from fleetune.server.store import open_store
from fleetune.server.strategies.base import trains
from fleetune.server.training import CHECKPOINT_ROUNDS, Model, Training

log = logging.getLogger(__name__)

_SPEAK_EVERY = 60.0
"""Seconds between two words on what a round waits for."""

_NAMED = 8
"""Devices that are named where there are many."""

_LOOK_AGAIN = 5.0
"""Seconds after which a full disk is tried again."""


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
        checkpoint_rounds: Rounds that a restart repeats at most.
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
    checkpoint_rounds: int = CHECKPOINT_ROUNDS
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
            self._run = identify(self._journal.started(), config.state, config.fleet, config.jobs)
            self._store = open_store(self._journal)
        except (FileAccessError, RunFolderError):
            self._journal.close()
            raise
        self._registry = Registry(config.devices)
        self._quarantine = Quarantine(self._journal, self._store, self._registry, config.quarantine_after)
        self._training: Training | None = None
        self._intake: Intake | None = None
        self._cut: float | None = None  # since when the link is down
        self._complaints = Complaints()
        self._leadership = Leadership(self._topics, self._run.run, self._facts)
        seals = Seals(config.identity)
        self._link = Link(
            config.broker,
            f"{config.fleet}-aggregator-{self._run.run}-{self._leadership.boot}",
            subscriptions=[
                *([self._topics.trust, self._topics.aggregator_introduction] if seals.signed else []),
                *([self._topics.introduction("+")] if seals.signed else []),  # before what they have signed
                self._topics.aggregator_presence,
                self._topics.current("+"),
                self._topics.presence("+"),
                self._topics.upload_chunk("+", "+", "+"),  # and manifests: of two filters that fit, each gets a copy
                self._topics.up("+", "+"),
            ],
            will=self._leadership.will,
            seals=seals,
        )
        self._broadcast = Broadcast(self._link, self._topics)
        self._reception = Reception(self._link, self._topics, self._registry)

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
            if (failed := self._open) is not None:  # devices that come later shall not begin what failed
                self._link.publish(self._topics.current(failed.announcement.job), b"", retain=True)
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
        training = self._training = Training(
            *(job, self._run, self._journal, self._store),
            model=self._config.models.get(job.id),
            checkpoint_rounds=self._config.checkpoint_rounds,
        )
        intake = self._intake = Intake(
            *(self._link, self._topics, self._run.run, job, self._journal, self._store, self._registry),
            *(self._quarantine, training.closed),
            max_staleness=self._config.max_staleness,
        )
        self._with_room(training.save_guarantee)
        self._registry.expect_anew()
        self._wait_for_devices(begun=training.begun)
        while (plan := training.next()) is not None:
            if training.open is None:
                self._with_room(partial(training.announce, plan, self._link.max_chunk))
                self._leadership.say(self._link, "working", f"announces {plan.stage}")
                self._announce(fresh=True)
            else:
                self._announce(fresh=False)
            self._collect(training)
            self._with_room(training.close)
            self._with_room(training.save_guarantee)
            if training.wants_checkpoint:
                self._with_room(training.checkpoint)
        self._with_room(training.checkpoint)
        self._with_room(training.finish)
        intake.end()
        self._intake = self._training = None
        training.log_results()
        self._broadcast.end(training.last_announcement())

    def _announce(self, *, fresh: bool) -> None:
        assert self._training is not None and self._training.open is not None
        self._broadcast.announce(self._training.open.announcement, self._training.globals.payloads, fresh=fresh)

    @property
    def _open(self) -> OpenRound | None:
        return None if self._training is None else self._training.open

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

    def _wait_for_devices(self, *, begun: bool) -> None:
        """Wait for all; where rounds were announced before, a quorum goes on: some may have gone for good."""
        wanted = len(self._config.devices - self._registry.out) or self._config.quorum
        said, until = "", time.monotonic() + (self._config.away_s if begun else self._config.deadline_s)
        while (there := len(self._registry.ready())) < wanted:
            if time.monotonic() > until and (begun or there >= self._config.quorum):
                break
            self._check_quorum()
            away = self._config.devices - self._registry.ready() - self._registry.out
            for device in away:
                self._reception.ask_who(
                    device
                )  # what the broker retains of it may be the late Will of an earlier connection
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
                "mend the devices and start them again, or do without: take them out of the fleet file, or lower "
                "--quorum; the same command then goes on where the run stopped. Or start another run, with other "
                "options and another folder for --state",
            )

    # --- collecting ---------------------------------------------------------------------------------------------

    def _collect(self, training: Training) -> None:
        """Wait until the round may close."""
        collecting = training.open
        assert collecting is not None
        collecting.deadline = time.monotonic() + self._config.deadline_s
        announced = collecting.announcement
        where = f"{announced.job}: {announced.stage}, round {announced.round}"
        speak, warned = time.monotonic() + _SPEAK_EVERY, False
        while True:
            self._check_quorum()
            answers, quorum = len(collecting.answers), self._config.quorum
            if self._config.buffer is not None and trains(announced.stage):
                if collecting.updates >= self._config.buffer:
                    return
                quorum = self._config.buffer
            waiting = self._registry.members() - collecting.answers.keys()
            if not waiting and answers >= quorum:
                return
            late = self._cut is None and time.monotonic() > collecting.deadline
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
        self._reception.look_after_own()
        self._registry.save(self._store)

    @property
    def _taking(self) -> OpenRound | None:
        """The round that updates count in: one that was summed up, and waits for room, takes no more."""
        return None if self._open is None or self._open.closing else self._open

    def _receive(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._reception.introduce()
            self._registry.trust()
            self._leadership.say_again(self._link)
            cut, self._cut = self._cut, None
            if self._open is not None:
                if cut is not None:  # what devices had to say could not arrive
                    self._open.deadline += time.monotonic() - cut
                self._announce(fresh=False)
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
        elif levels[:1] == ("st",) and len(levels) == 2:
            self._reception.presence(levels[1], event)
        elif levels[:1] == ("st",) and levels[2:] == ("id",):
            self._reception.introduction(levels[1], event.payload)
        elif levels == ("ca", "trust"):
            self._reception.trust(event.payload)
        elif levels == ("agg", "id"):
            self._link.seals.meet(event.payload, OWN)
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
        elif not event.payload or self._link.seals.open(event.topic, event.payload, Announcement, OWN).run != own.run:
            self._announce(fresh=False)  # devices have let go of it

    def _receive_question(self, device: str, verb: str, event: Received) -> None:
        """What a device asks for."""
        if verb == "need" and self._registry.knows(device):
            sender = Sender("device", device)
            self._broadcast.need(self._link.seals.open(event.topic, event.payload, Need, sender))
        elif verb == "time":
            self._reception.tell_time(device, event)

    def _facts(self) -> Facts:
        """What the aggregator's presence shows."""
        out = self._registry.kept_out
        facts: Facts = {"quarantined": shortened(", ".join(f"{d}: {out[d]}" for d in sorted(out)))} if out else {}
        return facts if self._training is None else facts | self._training.facts()
