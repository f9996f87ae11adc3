"""The agent: waits for announcements, does rounds, sends updates.

paho's thread only fills a queue; everything below runs in the main thread, one event after the other.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from fleetune.edge.agent.broadcasts import Broadcasts
from fleetune.edge.agent.config import AgentConfig
from fleetune.edge.agent.rounds import Rounds, in_words
from fleetune.edge.agent.state import State
from fleetune.edge.engine.dataset import Dataset, read_dataset
from fleetune.edge.methods import METHODS
from fleetune.edge.methods.base import Metrics, Outcome, Tensors
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.errors import (
    BrokerProtocolError,
    BudgetError,
    FleetuneError,
    MessageError,
    PackError,
    RunFailedError,
)
from fleetune.edge.protocol.link import Connected, Link, Received
from fleetune.edge.protocol.messages import (
    Ack,
    Announcement,
    Missing,
    Payload,
    Presence,
    PresenceState,
    UpdateManifest,
    decode,
    encode,
    open_envelope,
    seal,
)
from fleetune.edge.protocol.topics import Topics, check_name, read_number
from fleetune.edge.resources.process import machine_memory_mib

log = logging.getLogger(__name__)

_RESEND_AFTER = 5.0
"""Seconds without an answer after which an update is announced again."""

_PROGRESS_EVERY = 0.5

_LOOK_EVERY = 5.0
"""Seconds after which an agent looks again whether it may train."""

_WAITS = "waits: "

_SHOWN = ("loss", "test", "depth", "cpu_s", "peak_mib", "cache_missing_mib")
"""Metrics that the presence shows too."""


class Agent:
    """One device.

    Args:
        config: What it is started with.

    Raises:
        FleetuneError: The pack, the data or the state folder cannot be used.
        BudgetError: The budget is larger than the machine's memory, so nothing would hold the agent to it.
    """

    def __init__(self, config: AgentConfig) -> None:
        check_name("device", config.device)
        if config.budget.memory_mib > machine_memory_mib():
            raise BudgetError(
                f"budget: memory: {config.budget.memory_mib:.0f} MiB are given, "
                f"but this machine has {machine_memory_mib():.0f} MiB in all",
                "lower the budget of this device in the fleet file",
            )
        self._config = config
        self._topics = Topics(config.fleet)
        self._pack = Pack.open(config.pack)
        self._data: Dataset = read_dataset(config.data, self._pack)
        self._state = State(config.state, config.device)
        counters = self._state.counters
        counters.boot += 1
        self._state.save_counters()
        self._earlier = (counters.bytes_up, counters.bytes_down)
        self._rounds = Rounds(config, self._pack, self._data, self._state, say=self._measures, progress=self._trains)
        self._broadcasts = Broadcasts(self._state)
        self._current: dict[str, tuple[str, int]] = {}  # job → run and version that its newest announcement asks for
        self._declined: dict[str, tuple[str, int]] = {}  # job → run and version that this device does not answer
        self._sent: dict[str, float] = {}
        self._facts: Metrics = {}
        self._said: tuple[PresenceState, str] = ("online", "starts")
        self._shown = 0.0
        self._look_again = 0.0
        me = config.device
        self._link = Link(
            config.broker,
            f"{config.fleet}-{me}",
            subscriptions=[
                self._topics.current("+"),
                self._topics.broadcast_chunk("+", "+", "+"),
                self._topics.down(me, "+"),
            ],
            will=(self._topics.presence(me), encode(self._presence("offline", "the connection broke"))),
        )

    def run(self) -> None:
        """Serve until the process is told to stop. A job that does not suit the device is declined.

        Raises:
            FleetuneError: The device cannot take part in any job; the aggregator saw why.
        """
        self._link.connect(timeout=math.inf)
        try:
            self._rounds.measure()
            self._publish("online", "waits for a round")
            log.info("%s of the fleet %s waits for a round", self._config.device, self._config.fleet)
            while True:
                for event in self._link.events(timeout=0.25):
                    if isinstance(event, Connected):
                        self._publish(*self._said)
                        self._sent.clear()
                    elif isinstance(event, Received):
                        self._receive(event)
                for need in self._broadcasts.overdue():
                    self._link.publish(self._topics.need(self._config.device), encode(need))
                self._send_outbox()
                self._work()
        except FleetuneError as error:
            self._publish("failed", error.public)
            raise
        finally:
            self._count_bytes()
            self._state.save_counters()
            if self._said[0] != "failed":
                self._publish("offline", "stopped")
            self._link.close()
            self._state.close()
            self._rounds.close()
            log.info("stopped")

    # --- presence -----------------------------------------------------------------------------------------------

    def _presence(self, state: PresenceState, detail: str) -> Presence:
        return Presence(
            name=self._config.device,
            state=state,
            boot=self._state.counters.boot,
            kit=version("fleetune"),
            detail=detail,
            facts=dict(self._facts),
        )

    def _publish(self, state: PresenceState, detail: str) -> None:
        self._said = state, detail
        self._count_bytes()
        self._facts |= {"bytes_up": self._state.counters.bytes_up, "bytes_down": self._state.counters.bytes_down}
        topic = self._topics.presence(self._config.device)
        self._link.publish(topic, encode(self._presence(state, detail)), retain=True)

    def _count_bytes(self) -> None:
        counters = self._state.counters
        counters.bytes_up = self._earlier[0] + self._link.bytes_out
        counters.bytes_down = self._earlier[1] + self._link.bytes_in

    def _measures(self, what: str) -> None:
        self._publish("working", what)

    def _trains(self, share: float, loss: float) -> None:
        self._facts |= {"progress": round(share, 3), "loss": round(loss, 4)}
        if time.monotonic() - self._shown > _PROGRESS_EVERY:
            self._shown = time.monotonic()
            self._publish("working", "trains")

    # --- what comes in ------------------------------------------------------------------------------------------

    def _receive(self, event: Received) -> None:
        levels = self._topics.split(event.topic)
        try:
            if levels[:1] == ("g",) and levels[2:] == ("current",):
                self._receive_announcement(levels[1], event.payload)
            elif levels[:1] == ("g",) and len(levels) == 4:
                version, index = read_number(levels[2]), read_number(levels[3])
                if version is not None and index is not None:
                    self._broadcasts.add(levels[1], version, index, event.payload)
            elif levels[:1] == ("dn",) and levels[2:] == ("ack",):
                self._receive_ack(decode(event.payload, Ack))
            elif levels[:1] == ("dn",) and levels[2:] == ("missing",):
                self._receive_missing(decode(event.payload, Missing))
        except MessageError as error:
            log.warning("%s: %s (%s)", event.topic, error, error.reason)

    def _receive_announcement(self, job: str, raw: bytes) -> None:
        self._forget(job)
        if not raw:  # nobody leads it any more
            self._await_another_job()
            return
        announced = open_envelope(raw, Announcement)
        if announced.job != job or announced.fleet != self._config.fleet:
            raise MessageError("the announcement belongs to another topic", "ignore it", reason="wrong-topic")
        if announced.stage == "finished":
            self._await_another_job()
            self._drop_closed(announced)
            if self._state.answered(announced.run, job) >= 0:
                folder = self._state.store(announced.run, job).folder
                log.info("%s: done%s", job, f"; what is private is in {folder}" if folder.is_dir() else "")
            return
        if announced.expires < time.time():
            log.warning("%s: version %d has expired; the clocks of both sides may differ", job, announced.version)
            return
        self._drop_closed(announced)
        if self._declined.get(job) == (announced.run, announced.version):
            return
        with self._declining(job, announced.run, announced.version):
            self._check_fit(announced)
            self._current[job] = announced.run, announced.version
            if announced.version > self._state.answered(announced.run, job):
                self._broadcasts.want(announced)

    def _forget(self, job: str) -> None:
        """The newest announcement of a job does not count any more."""
        self._broadcasts.forget(job)
        self._current.pop(job, None)

    def _await_another_job(self) -> None:
        """What did not suit this device, or not yet, is over."""
        if self._said[0] == "declined" or self._said[1].startswith(_WAITS):
            self._publish("idle", "waits for a round")

    @contextmanager
    def _declining(self, job: str, run: str, version: int) -> Iterator[None]:
        """Decline a round that this device cannot do: say why, take no part in it, and stay for the next job."""
        try:
            yield
        except BrokerProtocolError:
            raise
        except FleetuneError as error:
            self._declined[job] = run, version
            self._forget(job)
            self._rounds.forget()
            log.warning("%s: declined: %s; waits for another job, and needs a start after a change here", job, error)
            self._publish("declined", error.public)

    def _check_fit(self, announced: Announcement) -> None:
        if announced.method not in METHODS:
            raise MessageError(
                f"the method {announced.method!r} is unknown", "update Fleetune on this device", reason="unknown-method"
            )
        mine = self._pack.manifest
        for what, theirs, own in (
            ("the backbone", announced.backbone, mine.backbone.sha256),
            ("weights in the format", announced.quantisation, mine.quantisation.type),
            ("adapters of rank", announced.settings.get("rank"), mine.rank),
            ("adapters on", announced.settings.get("targets"), ",".join(mine.targets)),
        ):
            if theirs != own:
                raise PackError(
                    f"the job {announced.job} is for {what} {theirs}, the pack {self._pack.path} has {own}",
                    "give the device the pack that the aggregator was started with",
                )

    def _drop_closed(self, announced: Announcement) -> None:
        """Let go of updates for rounds that this announcement has closed; those of other runs wait for theirs."""
        for manifest in self._state.outbox():
            if (manifest.run, manifest.job) == (announced.run, announced.job) and manifest.version < announced.version:
                self._state.drop_outbox(manifest.update)

    # --- a round ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        announced = self._broadcasts.ready()
        if announced is None or time.monotonic() < self._look_again:
            return
        with self._declining(announced.job, announced.run, announced.version):
            if hindrance := self._rounds.hindrance(announced):
                self._wait(announced, hindrance)
                return
            self._broadcasts.forget(announced.job)
            self._answer(announced)

    def _wait(self, announced: Announcement, hindrance: str) -> None:
        """A round has to wait: the aggregator sees why, and its deadline goes on."""
        self._look_again = time.monotonic() + _LOOK_EVERY
        if not self._said[1].startswith(_WAITS):
            log.warning("%s: round %d waits: %s", announced.job, announced.round, hindrance)
        if self._said[1] != _WAITS + hindrance:
            self._publish("idle", _WAITS + hindrance)

    def _answer(self, announced: Announcement) -> None:
        """Do a round, and queue what goes up."""
        plan = self._rounds.plan
        assert plan is not None
        self._facts = {key: value for key, value in self._facts.items() if key not in _SHOWN}  # of the round before
        self._facts |= {"job": announced.job, "stage": announced.stage, "round": announced.round, "progress": 0.0}
        self._facts |= {"plan": in_words(plan), "bound_by": plan.bound_by}
        self._publish("working", f"{announced.job}: {announced.stage}, round {announced.round} of {announced.rounds}")
        frozen = announced.frozen.payload if announced.frozen else None
        outcome = self._rounds.run(announced, self._tensors(announced.payload), self._tensors(frozen))
        self._facts |= {key: value for key, value in outcome.metrics.items() if key in _SHOWN}
        self._queue_update(announced, outcome)
        self._send_outbox()
        self._publish("idle", "waits for the next round")

    def _tensors(self, payload: Payload | None) -> Tensors:
        if payload is None:
            return {}
        data = self._state.payload(payload)
        if data is None:
            raise MessageError("a payload vanished from the state folder", "check the disk", reason="payload-lost")
        return Codec.named(payload.codec).decode(data)

    # --- what goes out ------------------------------------------------------------------------------------------

    def _queue_update(self, announced: Announcement, outcome: Outcome) -> None:
        self._count_bytes()
        counters = self._state.counters
        metrics = outcome.metrics | {
            "bytes_up": counters.bytes_up,
            "bytes_down": counters.bytes_down,
            "boot": counters.boot,
        }
        data = Codec.named(self._config.codec).encode(outcome.tensors) if outcome.tensors else b""
        manifest = UpdateManifest(
            fleet=self._config.fleet,
            device=self._config.device,
            update=f"{announced.run}-{announced.job}-{announced.version}",
            run=announced.run,
            job=announced.job,
            version=announced.version,
            backbone=announced.backbone,
            samples=len(self._data.indices("train")),
            metrics=metrics,
            payload=chunks.describe(data, self._config.codec) if data else None,
        )
        self._state.put_outbox(manifest, data)
        self._state.enter(announced.run).answered[announced.job] = announced.version
        self._state.save_counters()

    def _send_outbox(self) -> None:
        """Send what the newest announcements ask for; an update of another run waits until that is led again."""
        for manifest in self._state.outbox():
            if self._current.get(manifest.job) != (manifest.run, manifest.version):
                continue
            first = manifest.update not in self._sent
            if first or time.monotonic() - self._sent[manifest.update] > _RESEND_AFTER:
                self._sent[manifest.update] = time.monotonic()
                topic = self._topics.upload_manifest(manifest.device, manifest.update)
                self._link.publish(topic, seal(manifest))
                if first and manifest.payload:
                    self._send_chunks(manifest, manifest.payload, range(manifest.payload.chunks))

    def _send_chunks(self, manifest: UpdateManifest, payload: Payload, indices: range | list[int]) -> None:
        data = self._state.outbox_data(manifest)
        sent = self._link.publish_many(
            (self._topics.upload_chunk(manifest.device, manifest.update, index), chunks.chunk(data, payload, index))
            for index in indices
        )
        if not sent:
            log.warning("%s stays in the outbox until the broker is back", manifest.update)

    def _receive_missing(self, missing: Missing) -> None:
        manifest = self._state.waiting(missing.update)
        if manifest is not None and manifest.payload is not None:
            self._sent[manifest.update] = time.monotonic()
            wanted = list(chunks.unpack_bitmap(missing.bitmap, manifest.payload.chunks))
            self._send_chunks(manifest, manifest.payload, wanted)

    def _receive_ack(self, ack: Ack) -> None:
        manifest = self._state.waiting(ack.update)
        if manifest is None:
            return
        self._sent.pop(ack.update, None)
        if ack.reason == "wrong-run":
            log.warning("%s waits: the aggregator that is there leads another run", ack.update)
            self._current.pop(manifest.job, None)
            return
        self._state.drop_outbox(ack.update)
        if ack.accepted:
            return
        log.warning("%s was refused: %s", ack.update, ack.reason)
        if ack.reason != "stale-round":  # mended and started again, this device shall answer the same round
            self._state.enter(manifest.run).answered.pop(manifest.job, None)
            with self._declining(manifest.job, manifest.run, manifest.version):
                raise RunFailedError(
                    f"the aggregator refuses this device's update: {ack.reason}", "see the aggregator's log"
                )
