"""One job from its first round to its last. Nothing is kept of it but what follows from the journal."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.codec import shapes_of
from fleetune.edge.protocol.errors import MessageError, RunFolderError
from fleetune.edge.protocol.messages import Announcement, Stage
from fleetune.edge.protocol.modelfile import Card
from fleetune.server.globals import MAX_CHECKPOINT, Globals
from fleetune.server.intake import accuracies
from fleetune.server.job import Job
from fleetune.server.journal import Announced, Closed, Finished, Journal, Started, Typical, read_records
from fleetune.server.leadership import Facts
from fleetune.server.privacy import Account, Guarantee
from fleetune.server.round import OpenRound
from fleetune.server.rules.base import Bounds
from fleetune.server.store import Store
from fleetune.server.strategies import STRATEGIES
from fleetune.server.strategies.base import ClosedRound, Metrics, NextRound, trains

log = logging.getLogger(__name__)

CHECKPOINT_ROUNDS = 16
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


class Training:
    """A job; it goes on where the journal ends.

    Args:
        job: What is trained.
        run: How the run began.
        journal: The run's.
        store: The journal's index.
        model: What the job's model file holds; it gets none without.
        checkpoint_rounds: Rounds that a restart repeats at most.

    Attributes:
        job: What is trained.
        globals: The global tensors.
        open: The round that is open.
        closed: Versions of the rounds that are closed, in their order.

    Raises:
        RunFolderError: The journal, or what lies beside it, is damaged.
    """

    def __init__(
        self,
        job: Job,
        run: Started,
        journal: Journal,
        store: Store,
        *,
        model: Model | None = None,
        checkpoint_rounds: int = CHECKPOINT_ROUNDS,
    ) -> None:
        self.job, self._run, self._journal, self._store, self._model = job, run, journal, store, model
        self._checkpoint_rounds = checkpoint_rounds
        self._strategy = STRATEGIES[job.method](job)
        self.open: OpenRound | None = None
        self.closed: list[int] = []
        self._past: list[ClosedRound] = []
        self._typical: dict[Stage, Typical] = {}  # of the last round of each stage in which anything changed
        self._last: dict[str, Metrics] = {}
        self._version = -1
        self._checkpointed, self.globals = self._load_globals()
        self._recover()
        self._account = self._recover_account()

    # --- after a restart ----------------------------------------------------------------------------------------

    def _load_globals(self) -> tuple[int, Globals]:
        """What the newest checkpoint holds, and the round that it includes."""
        version, checkpoint = self._journal.load_checkpoint(self.job.id, MAX_CHECKPOINT)
        where = f"{self._journal.folder}: the checkpoint of {self.job.id} after version {version}"
        remedy = "restore the folder from a backup, or start the run in a new one"
        try:
            globals_ = Globals(self.job.codec, checkpoint)
        except MessageError as error:
            raise RunFolderError(f"{where} is damaged: {error.what}", remedy) from error
        if not shapes_of(globals_.tensors).items() <= self.job.shapes.items():
            raise RunFolderError(f"{where} holds tensors of another job", remedy)
        return version, globals_

    def _recover(self) -> None:
        """Compute again, from the updates, what the last checkpoint lacks."""
        for row in self._store.rounds(self.job.id):
            self._version = row.announcement.version
            if self._version > self._checkpointed:
                plan = self.next()
                assert plan is not None
                self.globals.tell(plan.broadcast)
                whole, announced = self.globals.whole, row.announcement.whole
                if (whole and whole.sha256) != (announced and announced.sha256):
                    raise RunFolderError(
                        f"{self._journal.folder}: version {self._version} of {self.job.id} does not follow from the "
                        "updates",
                        "restore the folder from a backup, or start the run in a new one",
                    )
                self.open = self._opened(row.announcement, plan)
                for accepted in self._store.accepted(self.job.id, self._version):
                    self.open.add(accepted, self._journal.load_update(accepted, self.job.shapes))
            if row.closed is not None:
                if self.open is not None:
                    self.globals.add(self.open.gain())
                self._remember(ClosedRound(row.announcement.stage, row.means), row.typical)
        if self.open is not None:
            number = self.open.announcement.round
            log.info("%s: goes on with %d updates of round %d", self.job.id, self.open.updates, number)
        elif self._past:
            log.info("%s: goes on after %d rounds", self.job.id, len(self._past))

    def _recover_account(self) -> Account | None:
        """What the rounds in the journal have given away, if the job is private."""
        if self.job.privacy is None:
            return None
        account = Account(self.job.privacy)
        for record in read_records(self._journal.path) if self._past else ():
            if isinstance(record, Closed) and record.job == self.job.id and record.privacy is not None:
                account.add(record.privacy)
        return account

    # --- its rounds ---------------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether a round was announced."""
        return self._version >= 0

    def next(self) -> NextRound | None:
        """The round after those that are closed; None when the job is done."""
        return self._strategy.next(self._past)

    def announce(self, plan: NextRound, chunk_size: int) -> None:
        """Open a round: whoever asks from now on is told of it.

        Args:
            plan: What is announced.
            chunk_size: Bytes of the chunks that global tensors travel in.

        Raises:
            OSError: There is no room in the journal; then nothing was announced.
        """
        before = self.globals.told()
        since, changes = self.globals.tell(plan.broadcast, chunk_size)
        version, self._version = self._version, self._version + 1
        announcement = msgspec.structs.replace(
            self._announcement(plan), whole=self.globals.whole, since=since, changes=changes
        )
        records = (Announced(announcement),) if self._journal.size else (self._run, Announced(announcement))
        try:
            self._journal.append(*records)
        except OSError:
            self._version = version
            self.globals.untell(before)
            raise
        self._store.add(records, self._journal.size)
        self.open = self._opened(announcement, plan)
        number = announcement.round
        log.info("%s: %s, %d of %d rounds, depth %d", self.job.id, plan.stage, number, announcement.rounds, plan.depth)

    def _announcement(self, plan: NextRound) -> Announcement:
        job = self.job
        return Announcement(
            fleet=self._run.fleet,
            run=self._run.run,
            job=job.id,
            version=self._version,
            method=job.method,
            stage=plan.stage,
            round=sum(trains(past.stage) for past in self._past) + trains(plan.stage),
            rounds=self._strategy.rounds,
            backbone=job.backbone,
            quantisation=job.quantisation,
            settings={**job.settings, "depth": plan.depth},
            issued=0.0,
            expires=0.0,
            privacy=None if job.privacy is None else job.privacy.of(plan.stage),
        )

    def _opened(self, announcement: Announcement, plan: NextRound) -> OpenRound:
        job = self.job
        if announcement.privacy is None:
            bounds = Bounds(job.rule, self._typical.get(announcement.stage))
        else:
            shapes = (shape for name, shape in job.shapes.items() if name.startswith(plan.trained))
            bounds = Bounds.of_noise(job.rule, announcement.privacy, shapes)
        return OpenRound(announcement, plan, bounds, partial(self._journal.load_update, shapes=job.shapes))

    def close(self) -> None:
        """Sum up the round that is open.

        Raises:
            OSError: There is no room; the round takes no more updates, and is to be closed again.
        """
        done = self.open
        assert done is not None
        number, means = done.announcement.version, done.means()
        if not done.closing:  # a full disk may stop what follows, and then it is done again
            self.globals.add(done.gain())
            done.closing = True
        self._journal.keep_globals(self.job.id, number, self.globals.tensors)
        self._save_model(done)
        privacy = done.privacy
        record = Closed(self.job.id, number, sorted(done.answers), time.time(), done.late, means, done.typical, privacy)
        self._journal.append(record, sync=False)  # the next record is; until then the round counts as open
        self._store.add([record], self._journal.size)
        self._remember(ClosedRound(done.announcement.stage, means), done.typical)
        self._last = done.answers
        if self._account is not None and privacy is not None:
            self._account.add(privacy)

    def _remember(self, closed: ClosedRound, typical: Typical | None) -> None:
        """The open round is closed; this is what the next ones follow from."""
        self.open = None
        self.closed.append(self._version)
        self._past.append(closed)
        if typical is not None:
            self._typical[closed.stage] = typical

    def _save_model(self, closing: OpenRound) -> None:
        """Write the model file after each round of the global stage; what comes later does not change the expert."""
        model = self._model
        if model is not None and closing.announcement.stage == "global":
            expert = {name: t for name, t in self.globals.tensors.items() if name.startswith(closing.plan.trained)}
            values = {
                name: initial + expert[name] if name in expert else initial
                for name, initial in model.initial.items()
                if name in expert or f"{name[:-1]}B" in expert  # an A that stayed as it began
            }
            self._journal.save_model(self.job.id, msgspec.structs.replace(model.card, run=self._run.run), values)

    # --- what is kept beside the journal ------------------------------------------------------------------------

    @property
    def wants_checkpoint(self) -> bool:
        """Whether what a restart would have to repeat has become much."""
        if self.closed[-1] - self._checkpointed >= self._checkpoint_rounds:
            return True
        return self._journal.uncheckpointed(self.job.id, self._checkpointed) > _CHECKPOINT_BYTES

    def checkpoint(self) -> None:
        """Keep what followed from the rounds so far, so that a restart need not repeat them.

        Raises:
            OSError: There is no room.
        """
        version = self.closed[-1] if self.closed else -1
        self._journal.append(sync=True)
        self._journal.save_checkpoint(self.job.id, version, self.globals.checkpoint())
        self._store.forget(self.job.id, version)
        self._checkpointed = version

    @property
    def guarantee(self) -> Guarantee | None:
        """What the privacy of the job's devices has come to, if there is any."""
        return None if self._account is None else self._account.guarantee()

    def save_guarantee(self) -> None:
        """Keep it.

        Raises:
            OSError: There is no room.
        """
        if (guarantee := self.guarantee) is not None:
            self._journal.save_guarantee(self.job.id, guarantee)

    # --- its end ------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The job has no more rounds.

        Raises:
            OSError: There is no room.
        """
        self._journal.append(Finished(self.job.id))
        self._store.add([Finished(self.job.id)], self._journal.size)

    def last_announcement(self) -> Announcement:
        """What tells devices that the job is done."""
        self._version += 1
        return self._announcement(NextRound("finished", 0))

    def log_results(self) -> None:
        """What came out, for the operator."""
        job = self.job.id
        log.info("%s: done, run %s", job, self._run.run)
        told = {device: accuracies(metrics) for device, metrics in sorted(self._last.items())}
        for device, words in told.items():
            if words:
                log.info("%s: %s%s", job, device, words)
        if any(told.values()):
            log.info("%s: mean%s", job, accuracies(self._past[-1].means))
        else:
            log.info("%s: no device told accuracies%s", job, "" if self.job.privacy is None else " (--report-accuracy)")
        if self.guarantee is not None:
            log.info("%s: %s; see %s", job, self.guarantee.in_words(), self._journal.privacy_path(job))
        if self._model is not None:
            log.info("%s: the global expert is in %s", job, self._journal.model_path(job))

    def facts(self) -> Facts:
        """Where it stands."""
        if self.open is None:
            return {}
        announcement = self.open.announcement
        return {
            "job": announcement.job,
            "stage": announcement.stage,
            "round": announcement.round,
            "rounds": announcement.rounds,
            "depth": int(announcement.settings["depth"]),
            "updates": self.open.updates,
        }
