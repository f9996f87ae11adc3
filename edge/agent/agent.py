"""The agent: waits for announcements, has rounds done, sends updates.

paho's thread only fills a queue; everything below runs in the main thread, one event after the other. While a round is
done, the worker tells how far it is, and the agent looks at its post between two steps: what is on its way goes on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fleetune.edge.agent.broadcasts import Broadcasts
from fleetune.edge.agent.config import AgentConfig
from fleetune.edge.agent.feedback import encode_with_feedback
from fleetune.edge.agent.membership import Membership
from fleetune.edge.agent.notify import Notifier
from fleetune.edge.agent.outbox import Outbox
from fleetune.edge.agent.privacy import Ledger, discreet, make_private
from fleetune.edge.agent.state import State
from fleetune.edge.agent.worker import Answer, Worker
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import EXACT, Codec
from fleetune.edge.protocol.complaints import Complaints
from fleetune.edge.protocol.errors import BrokerProtocolError, FleetuneError, MessageError, RunFailedError
from fleetune.edge.protocol.files import is_full
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.link import Connected, Disconnected, Event, Link, Received, Refused
from fleetune.edge.protocol.messages import (
    KIT,
    Ack,
    Announcement,
    Missing,
    Presence,
    PresenceState,
    UpdateManifest,
    Who,
    shortened,
)
from fleetune.edge.protocol.topics import Topics, check_name, read_number

log = logging.getLogger(__name__)

_SHOW_EVERY = 0.5
"""Seconds between two words on how far a round is."""

SAY_EVERY = 600.0
"""Seconds after which an agent that has nothing to say says where it stands."""

_LOOK_EVERY = 5.0
"""Seconds after which an agent looks again whether it may train, or write."""

_LOOK_AT_POST_EVERY = 0.1
"""Seconds, at least, between two looks at the post in a round."""

_WAITS = "waits: "

_READMIT = "too many were refused before: mend the device, then start `fleetune serve` with --readmit"

_MAX_JOBS = 16
"""Jobs that may be led at the same time; of more, the device forgets the one that it heard of longest ago."""

_MAX_RUNS = 64
"""Runs that are led now, or were."""

_SHOWN = ("loss", "test", "depth", "cpu_s", "peak_mib", "cache_missing_mib")
"""Metrics that the presence shows too."""


_Round = tuple[str, str, int]


def _round(one: Announcement | UpdateManifest) -> _Round:
    """What tells a round from every other."""
    return one.run, one.job, one.version


def _forget_oldest(table: dict[str, Any], most: int) -> None:
    """Keep so many entries of a table that grows with what comes from the network."""
    while len(table) > most:
        del table[next(iter(table))]


class Agent:
    """One device.

    Args:
        config: What it is started with.
        worker: Does the rounds.

    Raises:
        FleetuneError: The state folder cannot be used.
    """

    def __init__(self, config: AgentConfig, worker: Worker) -> None:
        check_name("device", config.device)
        self._config = config
        self._topics = Topics(config.fleet)
        self._codec = Codec.named(config.codec)
        self._worker = worker
        self._state = State(config.state, config.device)
        counters = self._state.counters
        counters.boot += 1
        self._state.save_counters()
        self._earlier = (counters.bytes_up, counters.bytes_down)
        self._broadcasts = Broadcasts(self._state, worker.shapes)
        self._newest: dict[str, Announcement] = {}
        self._declined: dict[str, tuple[_Round, str]] = {}  # job → the round that this device does not do, and why
        self._led: dict[str, None] = {}  # runs that are led now, or were, oldest first
        self._doing: _Round | None = None  # until its update is in the outbox; a broker that was away tells it again
        self._unsaved: tuple[Announcement, Answer] | None = None
        self._repairs: set[str] = set()
        self._facts: dict[str, float | int | str | bool] = {}
        self._ledger = Ledger(self._state, config.privacy)
        self._is_private = config.privacy.min_noise is not None  # or the newest round is: no word of the samples
        self._said: tuple[PresenceState, str] = ("online", "starts")
        self._shown = 0.0
        self._look_again = self._looked = 0.0
        self._notifier = Notifier()
        me, seals = config.device, Seals(config.identity)
        who = [self._topics.trust, self._topics.aggregator_introduction] if seals.signed else []
        self._link = Link(
            config.broker,
            f"{config.fleet}-{me}",
            subscriptions=[
                *who,  # before what they have signed
                self._topics.current("+"),
                self._topics.broadcast_chunk("+", "+", "+"),
                self._topics.down(me, "+"),
            ],
            will=lambda: (self._topics.presence(me), self._presence("offline", "the connection broke")),
            seals=seals,
        )
        self._outbox = Outbox(self._state, self._link, self._topics)
        self._membership = Membership(self._link, self._topics, me, counters)
        self._complaints = Complaints()

    def run(self) -> None:
        """Serve until the process is told to stop. A job that does not suit the device is declined.

        Raises:
            FleetuneError: The device cannot take part in any job; the aggregator saw why.
        """
        try:
            self._membership.check()
            self._notifier.status("waits for the broker")
            self._link.connect(timeout=math.inf)
            self._membership.introduce()
            self._worker.prepare(self._state, self._show_preparation)
            declined = [why for job, (round_, why) in self._declined.items() if round_ == self._newest_round(job)]
            self._publish(*(("declined", declined[-1]) if declined else ("online", "waits for a round")))
            log.info("%s of the fleet %s waits for a round", self._config.device, self._config.fleet)
            self._notifier.ready()
            while True:
                self._look_at_post(timeout=0.1 if self._broadcasts.waits else 1.0)
                self._work()
                if time.monotonic() - self._shown > SAY_EVERY:  # who is put out learns it by saying something
                    self._publish(*self._said)
        except FleetuneError as error:
            self._publish("failed", self._public(error))
            raise
        finally:
            self._notifier.stopping()
            self._count_bytes()
            self._membership.keep_time()
            self._state.save_counters()
            if self._said[0] != "failed":
                self._publish("offline", "stopped")
            self._link.close()
            self._state.close()
            self._worker.close()
            log.info("stopped")

    # --- presence -----------------------------------------------------------------------------------------------

    def _presence(self, state: PresenceState, detail: str) -> Presence:
        return Presence(
            name=self._config.device,
            state=state,
            boot=self._state.counters.boot,
            kit=KIT,
            detail=shortened(detail),
            facts=dict(self._facts),
        )

    def _public(self, error: FleetuneError) -> str:
        return discreet(error) if self._is_private else error.public

    def _publish(self, state: PresenceState, detail: str) -> None:
        self._said = state, detail
        self._shown = time.monotonic()
        self._count_bytes()
        self._facts |= {"bytes_up": self._state.counters.bytes_up, "bytes_down": self._state.counters.bytes_down}
        self._link.say(self._topics.presence(self._config.device), self._presence(state, detail), retain=True)
        self._notifier.status(f"{state}: {detail}")

    def _count_bytes(self) -> None:
        counters = self._state.counters
        counters.bytes_up = self._earlier[0] + self._link.bytes_out
        counters.bytes_down = self._earlier[1] + self._link.bytes_in

    # --- what comes in, and what goes out ------------------------------------------------------------------------

    def _look_at_post(self, timeout: float) -> None:
        self._looked = time.monotonic()
        self._notifier.alive()
        for event in self._link.events(timeout):
            self._handle(event)
        needs = list(self._broadcasts.overdue())
        self._listen_for_repairs()  # before what is asked for is sent
        for need in needs:
            self._link.say(self._topics.up(self._config.device, "need"), need)
        self._membership.step()
        self._outbox.send(self._led)

    def _listen_for_repairs(self) -> None:
        """Hear what is sent once more, but only while something of it is missing here."""
        wanted = {self._topics.repair_chunk(job, sha256, "+") for job, sha256 in self._broadcasts.asked()}
        for topic in wanted - self._repairs:
            self._link.subscribe(topic)
        for topic in self._repairs - wanted:
            self._link.unsubscribe(topic)
        self._repairs = wanted

    def _handle(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._introduce()
            self._broadcasts.hurry()
        elif isinstance(event, Disconnected):
            self._outbox.hurry()
        elif isinstance(event, Refused):
            self._membership.denied(event.reason)
        elif isinstance(event, Received):
            try:
                self._receive(event)
            except MessageError as error:
                self._complaints.about(event.topic, error)
            except OSError as error:
                if not is_full(error):
                    raise
                log.warning("%s: no room in %s: %s", event.topic, self._config.state, error.strerror)

    def _introduce(self) -> None:
        """Say who this is, and where it stands."""
        self._membership.introduce()
        self._publish(*self._said)

    def _receive(self, event: Received) -> None:
        levels = self._topics.split(event.topic)
        if levels == ("ca", "trust"):
            self._membership.trust(event.payload)
        elif levels == ("agg", "id"):
            self._membership.aggregator(event.payload)
        elif levels[:1] == ("g",) and levels[2:] == ("current",):
            self._receive_announcement(levels[1], event)
        elif levels[:1] == ("g",) and len(levels) in (4, 5):
            if (index := read_number(levels[-1])) is not None and levels[3:-1] in ((), ("r",)):
                self._broadcasts.add(levels[1], levels[2], index, event.payload)
        elif levels[:1] == ("dn",) and len(levels) == 3:
            self._receive_word(levels[2], event)

    def _receive_word(self, verb: str, event: Received) -> None:
        """What the aggregator or the authority says to this device."""
        topic, raw, members = event.topic, event.payload, self._membership
        if verb == "ack":
            self._receive_ack(members.open(topic, raw, Ack))
        elif verb == "missing":
            self._outbox.missing(members.open(topic, raw, Missing))
        elif verb == "who":
            members.open(topic, raw, Who)
            self._introduce()
        elif verb == "renew":
            members.renew(topic, raw)
        elif verb == "renewed" and members.renewed(topic, raw):
            self._introduce()
            self._link.reconnect()
        elif verb == "time":
            members.time(topic, raw)

    def _receive_announcement(self, job: str, event: Received) -> None:
        if not event.payload:  # nobody leads it any more
            self._forget(job)
            self._await_another_job()
            return
        announced = self._membership.announcement(event.topic, event.payload)
        self._led.pop(announced.run, None)
        self._led[announced.run] = None
        _forget_oldest(self._led, _MAX_RUNS)
        if announced.stage == "finished":
            self._forget(job)
            self._await_another_job()
            self._state.drop_updates(announced.run, job)  # those of other runs wait for theirs
            if self._state.answered(announced.run, job) >= 0:
                folder = self._state.store(announced.run, job).folder
                log.info("%s: done%s", job, f"; what is private is in {folder}" if folder.is_dir() else "")
            return
        before = self._newest.get(job)
        again = before is not None and _round(before) == _round(announced)
        if again:  # by an aggregator that has restarted, or has been away
            self._outbox.hurry()
            self._publish(*self._said)
        self._newest.pop(job, None)
        self._newest[job] = announced
        if len(self._newest) > _MAX_JOBS:
            self._forget(next(iter(self._newest)))
        declined, why = self._declined.get(job, (None, ""))
        if declined == _round(announced):
            self._publish("declined", why)  # whoever leads now may not have heard it
            self._broadcasts.forget(job)
        elif announced.version <= self._state.answered(announced.run, job) or self._doing == _round(announced):
            self._broadcasts.forget(job)
        else:
            with self._declining(announced):
                self._broadcasts.want(announced, under_way=not event.retained and not again)

    def _newest_round(self, job: str) -> _Round | None:
        announced = self._newest.get(job)
        return None if announced is None else _round(announced)

    def _forget(self, job: str) -> None:
        """The newest announcement of a job does not count any more."""
        self._newest.pop(job, None)
        self._broadcasts.forget(job)

    def _await_another_job(self) -> None:
        """What did not suit this device, or not yet, is over."""
        if self._said[0] == "declined" or self._said[1].startswith(_WAITS):
            self._publish("idle", "waits for a round")

    @contextmanager
    def _declining(self, announced: Announcement) -> Iterator[None]:
        """Decline a round that this device cannot do: say why, take no part in it, and stay for the next job."""
        try:
            yield
        except BrokerProtocolError:
            raise
        except FleetuneError as error:
            self._declined[announced.job] = _round(announced), self._public(error)
            _forget_oldest(self._declined, _MAX_RUNS)
            if self._doing == _round(announced):
                self._doing = self._unsaved = None
            self._broadcasts.forget(announced.job)
            self._worker.forget()
            log.warning(
                "%s: declined: %s; waits for another round or job, and needs a start after a change here",
                *(announced.job, error),
            )
            self._publish("declined", self._public(error))

    def _receive_ack(self, ack: Ack) -> None:
        manifest = self._state.waiting(ack.update)
        if manifest is not None and ack.reason == "wrong-run":
            log.warning("%s waits: the aggregator that is there leads another run", ack.update)
            self._led.pop(manifest.run, None)
            self._outbox.hurry()
            return
        gone = self._outbox.acknowledge(ack)
        if gone is None or ack.accepted or ack.reason == "stale-round":
            return
        self._state.enter(gone.run).answered.pop(gone.job, None)  # mended and started again, it shall answer anew
        announced = self._newest.get(gone.job)
        if announced is not None and _round(announced) == _round(gone):
            remedy = _READMIT if ack.reason == "quarantined" else "see the aggregator's log"
            with self._declining(announced):
                raise RunFailedError(f"the aggregator refuses this device's update: {ack.reason}", remedy)

    # --- a round ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        announced = self._broadcasts.ready()
        if time.monotonic() < self._look_again or (announced is None and self._unsaved is None):
            return
        try:
            if self._unsaved is not None:
                self._queue_update(*self._unsaved)
            elif announced is not None:
                with self._declining(announced):
                    self._begin(announced)
        except OSError as error:
            if not is_full(error):
                raise
            self._wait(f"no room in {self._config.state}: {error.strerror}")

    def _begin(self, announced: Announcement) -> None:
        self._is_private = announced.privacy is not None or self._config.privacy.min_noise is not None
        self._ledger.check(announced)
        self._worker.check_fit(announced)
        if hindrance := self._worker.hindrance(announced):
            self._wait(hindrance)
            return
        try:
            tensors = self._broadcasts.tensors(announced)
        except MessageError as error:
            log.warning("%s: %s", announced.job, error)
            self._broadcasts.want(announced, under_way=False)
            return
        self._broadcasts.forget(announced.job)
        self._facts = {key: value for key, value in self._facts.items() if key not in _SHOWN}  # of the round before
        self._facts |= {"job": announced.job, "stage": announced.stage, "round": announced.round, "progress": 0.0}
        self._facts |= self._worker.facts
        # Said when the round takes longer than a moment.
        self._said = "working", f"{announced.job}: {announced.stage}, round {announced.round} of {announced.rounds}"
        self._shown = time.monotonic()
        self._doing = _round(announced)
        answer: Answer = self._worker.answer(announced, tensors, self._show_progress, self._pulse)
        if announced.privacy is not None:  # before anything else is done with it: all that follows sees noise
            answer = make_private(answer, announced, announced.privacy, self._config.privacy)
        self._unsaved = announced, answer
        self._queue_update(announced, answer)

    def _wait(self, hindrance: str) -> None:
        """A round has to wait: the aggregator sees why, and its deadline goes on."""
        self._look_again = time.monotonic() + _LOOK_EVERY
        if not self._said[1].startswith(_WAITS):
            log.warning("waits: %s", hindrance)
        said = _WAITS + ("the device's own log says for what" if self._is_private else hindrance)
        if self._said[1] != said:
            self._publish("idle", said)

    def _show_preparation(self, what: str) -> None:
        self._publish("working", what)
        self._look_at_post(timeout=0.0)

    def _show_progress(self, share: float, loss: float) -> None:
        """Between two steps of a round: say how far it is, and look at the post."""
        if not self._is_private:
            self._facts |= {"progress": round(share, 3), "loss": round(loss, 4)}
        self._pulse()

    def _pulse(self) -> None:
        """Show where the round is, and look at the post, now and then."""
        if time.monotonic() - self._shown > _SHOW_EVERY:
            self._publish(*self._said)
        if time.monotonic() - self._looked > _LOOK_AT_POST_EVERY:
            self._look_at_post(timeout=0.0)

    def _queue_update(self, announced: Announcement, answer: Answer) -> None:
        """Put an update into the outbox; from then on the round is answered."""
        self._ledger.count(announced, answer)
        self._count_bytes()
        counters = self._state.counters
        record = self._state.enter(announced.run)
        noise = 0.0 if announced.privacy is None else announced.privacy.noise
        data, lost = b"", self._state.lost(announced.run, announced.job, private=noise > 0)
        if answer.tensors:
            data, lost = encode_with_feedback(answer.tensors, lost, self._codec)
        manifest = UpdateManifest(
            fleet=self._config.fleet,
            device=self._config.device,
            update=f"{announced.run}-{announced.job}-{announced.version}",
            run=announced.run,
            job=announced.job,
            version=announced.version,
            issued=announced.issued,
            backbone=announced.backbone,
            samples=1 if noise else self._worker.samples,  # how many they are is private too
            noise=noise,
            metrics={
                **answer.metrics,
                "bytes_up": counters.bytes_up,
                "bytes_down": counters.bytes_down,
                "boot": counters.boot,
            },
            payload=chunks.describe(data, self._codec.name, self._link.max_chunk) if data else None,
        )
        self._state.put_outbox(manifest, data, EXACT.encode(lost) if lost else b"")
        self._doing = self._unsaved = None
        record.answered[announced.job] = announced.version
        self._facts |= {name: value for name, value in answer.metrics.items() if name in _SHOWN}
        self._publish("idle", "waits for the next round")
