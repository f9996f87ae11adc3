"""What comes up from devices: checked, put together, journaled, acknowledged.

Nothing is acknowledged before it is on disk; what came in one go is synced in one go.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import Codec, Tensors
from fleetune.edge.protocol.codec.numbers import Shapes
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.credential import Sender
from fleetune.edge.protocol.link import Link
from fleetune.edge.protocol.messages import Ack, UpdateManifest
from fleetune.edge.protocol.topics import Topics
from fleetune.server.job import Job
from fleetune.server.journal import Accepted, Journal
from fleetune.server.quarantine import REASON, Quarantine
from fleetune.server.registry import Registry
from fleetune.server.round import OpenRound
from fleetune.server.rules.base import norm_of
from fleetune.server.store import Store
from fleetune.server.strategies.base import Metrics
from fleetune.server.uploads import Uploads

log = logging.getLogger(__name__)

_AGAIN = frozenset({"damaged", "wrong-chunk", "wrong-hash", "wrong-signature", "unknown-key"})
"""Why an update is refused that may be whole when it comes again."""


class Intake:
    """The updates of one job.

    Args:
        link: To the broker.
        topics: Of the fleet.
        run: The run.
        job: The job.
        journal: Where updates are kept.
        store: Knows which are there.
        registry: Knows the devices.
        quarantine: Knows which of them are kept out.
        closed: Versions of the job's rounds that are closed, in their order; it grows.
        max_staleness: Closed rounds after which an update no longer counts.
    """

    def __init__(
        self,
        link: Link,
        topics: Topics,
        run: str,
        job: Job,
        journal: Journal,
        store: Store,
        registry: Registry,
        quarantine: Quarantine,
        closed: Sequence[int],
        *,
        max_staleness: int,
    ) -> None:
        self._link, self._topics, self._run, self._job = link, topics, run, job
        self._journal, self._store, self._registry, self._quarantine = journal, store, registry, quarantine
        self._closed, self._max_staleness = closed, max_staleness
        self._uploads = Uploads(journal.parts(job.id))
        self._whole: dict[tuple[str, str], tuple[UpdateManifest, bytes, Tensors, float]] = {}

    def end(self) -> None:
        """The job is over."""
        self._uploads.clear()

    # --- manifests ----------------------------------------------------------------------------------------------

    def manifest(self, device: str, update: str, raw: bytes, current: OpenRound) -> None:
        """Take a manifest.

        Raises:
            MessageError: The update is refused; the device was told why.
        """
        if self._quarantine.holds(device):
            self._refuse(device, update, REASON)  # said once, when it began
            return
        with self._refusing(device, update):
            topic = self._topics.upload_manifest(device, update)
            manifest = self._link.seals.open(topic, raw, UpdateManifest, Sender("device", device))
            self._check(manifest, device, update)
            if self._store.has_update(device, update):
                self._answer(device, update)
                return
            if (device, update) in self._whole:
                return  # it is on its way into the journal
            late = self._staleness(manifest, current) > 0
            if manifest.payload is None:
                self._whole[device, update] = manifest, b"", {}, 0.0
            else:
                self._check_size(manifest, self._shapes(current, late=late))
                self._uploads.begin(manifest)

    def _check(self, manifest: UpdateManifest, device: str, update: str) -> None:
        if (manifest.device, manifest.update, manifest.fleet) != (device, update, self._topics.fleet):
            raise MessageError("the manifest belongs to another topic", "send it to its own", reason="wrong-topic")
        if not self._registry.knows(device):
            raise MessageError(f"{device} is not of this fleet", "add it to the fleet file", reason="unknown-device")
        if manifest.backbone != self._job.backbone:
            raise MessageError("the update is for another backbone", "pack the job's one", reason="wrong-backbone")
        if manifest.run != self._run:
            raise MessageError("the update is of another run", "answer the newest announcement", reason="wrong-run")
        if manifest.samples < 1:
            raise MessageError("the update has no samples", "train on at least one", reason="no-samples")
        private = self._job.privacy
        if private is not None and (manifest.noise < private.noise or manifest.samples != 1):
            raise MessageError("the update is not private", "add the job's noise", reason="not-private")

    def _shapes(self, current: OpenRound, *, late: bool) -> Shapes:
        """What an update may hold: what the round trains, or, where it comes late, what any round of the job does."""
        if late:
            return self._job.shapes
        return {name: shape for name, shape in self._job.shapes.items() if name.startswith(current.plan.trained)}

    @staticmethod
    def _check_size(manifest: UpdateManifest, shapes: Shapes) -> None:
        """Refuse what the round cannot need, before any of it is asked for."""
        assert manifest.payload is not None
        if not shapes:
            raise MessageError("the round asks for no tensors", "send none", reason="unexpected-tensor")
        chunks.check(manifest.payload, Codec.named(manifest.payload.codec).most(shapes))

    def _staleness(self, manifest: UpdateManifest, current: OpenRound) -> int:
        """Rounds that were closed since the update was asked for."""
        if manifest.job == self._job.id:
            if manifest.version == current.announcement.version:
                return 0
            may_come = self._closed[-self._max_staleness :] if self._max_staleness else ()
            if manifest.version in may_come and manifest.payload is not None:
                return len(may_come) - may_come.index(manifest.version)
        raise MessageError("the update is for a round that is closed", "wait for the next", reason="stale-round")

    # --- chunks -------------------------------------------------------------------------------------------------

    def chunk(self, device: str, update: str, index: int, data: bytes, current: OpenRound) -> None:
        """Take a chunk.

        Raises:
            MessageError: It does not fit, or it completes an update that is refused; the device was told why.
        """
        if device in self._registry.revoked:  # since its manifest was taken
            self._uploads.drop(device, update)
            return
        with self._refusing(device, update):
            complete = self._uploads.add(device, update, index, data)
            if complete is not None:
                manifest, whole = complete
                staleness = self._staleness(manifest, current)
                tensors = self._decode(manifest, whole, current, late=staleness > 0)
                self._whole[device, update] = manifest, whole, tensors, self._norm(tensors, current)

    def _decode(self, manifest: UpdateManifest, data: bytes, current: OpenRound, *, late: bool) -> Tensors:
        assert manifest.payload is not None
        tensors = Codec.named(manifest.payload.codec).decode(data, self._shapes(current, late=late))
        if not all(name.startswith(current.plan.trained) for name in tensors):
            raise MessageError("the update is of a stage that is over", "wait for the next", reason="stale-round")
        return tensors

    @staticmethod
    def _norm(tensors: Tensors, current: OpenRound) -> float:
        """Norm of an update; one far beyond all others stays out: clipping would bound it, but it is no good."""
        if (norm := norm_of(tensors)) > current.limit:
            raise MessageError(
                f"an update of norm {norm:.3g}, where others' lead to a limit of {current.limit:.3g}",
                "look at the device: its data, its clock, who owns it; training that diverged wants a lower rate",
                reason="norm-outlier",
            )
        return norm

    @contextmanager
    def _refusing(self, device: str, update: str) -> Iterator[None]:
        """Tell a device why its update is refused. It lets go of it, or tries again where that may help."""
        try:
            yield
        except MessageError as error:
            self._refuse(device, update, error.reason, keep=error.reason in _AGAIN)
            raise
        except OSError as error:
            self._refuse(device, update, "no-room")
            raise MessageError(
                f"{self._journal.folder}: {error.strerror}", "make room there", reason="no-room"
            ) from error

    def _refuse(self, device: str, update: str, reason: str, *, keep: bool = False) -> None:
        if not keep:
            self._uploads.drop(device, update)
        if self._registry.knows(device):
            self._store.refuse(device, reason)
            if self._quarantine.strike(device, update, reason):
                self._uploads.drop_all(device)
                self._whole = {key: whole for key, whole in self._whole.items() if key[0] != device}
        self._answer(device, update, reason)

    def _answer(self, device: str, update: str, reason: str = "") -> None:
        answer = Ack(update=update, accepted=not reason, reason=reason)
        self._link.say(self._topics.down(device, "ack"), answer)

    # --- the journal --------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Ask devices whose turn it is for chunks."""
        for device, missing in self._uploads.grants():
            self._link.say(self._topics.down(device, "missing"), missing)

    def commit(self, current: OpenRound) -> bool:
        """Journal what has come whole, then acknowledge it: in this order nothing acknowledged can be lost.

        Returns:
            Whether there was something.
        """
        whole, self._whole = list(self._whole.values()), {}
        if not whole:
            return False
        into, now = current.announcement.version, time.time()
        records = [
            Accepted(manifest, now, into, self._staleness(manifest, current), norm) for manifest, _, _, norm in whole
        ]
        try:
            accepted = self._journal.accept(zip(records, (data for _, data, _, _ in whole), strict=True))
        except OSError as error:
            log.error("%s: %s; updates wait on their devices", self._journal.folder, error.strerror)  # noqa: TRY400
            for manifest, _, _, _ in whole:
                self._refuse(manifest.device, manifest.update, "no-room")
            return True
        self._store.add(accepted, self._journal.size)
        for record, (manifest, data, tensors, _) in zip(accepted, whole, strict=True):
            current.add(record, tensors)
            log.info(
                "%s: update of %s, %d bytes%s%s",
                *(manifest.job, manifest.device, len(data), in_words(manifest.metrics)),
                f", staleness {record.staleness}" if record.staleness else "",
            )
            self._answer(manifest.device, manifest.update)
        return True


def in_words(metrics: Metrics) -> str:
    """The figures of an update that an operator looks for first."""
    forms = {"loss": "loss {:.3f}", "cpu_s": "{:.1f} CPU s", "peak_mib": "{:.0f} MiB"}
    shown = {name: value for name in forms if isinstance(value := metrics.get(name), float | int)}
    return accuracies(metrics) + "".join(f", {forms[name].format(value)}" for name, value in shown.items())


def accuracies(metrics: Metrics) -> str:
    """Accuracies on ``test``: of each expert where there are several, else of the one that the round is about."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float | int)}
    experts = [name for name in numbers if name.startswith("test_")] or [name for name in numbers if name == "test"]
    words = [f"{name.removeprefix('test').removeprefix('_')} {numbers[name]:.3f}".strip() for name in experts]
    return f", test accuracy {', '.join(words)}" if words else ""
