"""What is on disk after a run of the chaos benchmark, held against what must be there: exactly, not on average.

Sums are made here once more, from the journal and the payloads beside it, by nothing of the aggregator's but its
record types.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from fleetune.edge.protocol.codec import Tensors
from fleetune.edge.protocol.messages import Ack, Announcement, open_envelope
from fleetune.server.journal import FILE, Accepted, Announced, Closed, Record, read_records
from fleetune.tools.bench.chaos.agent import sent
from fleetune.tools.bench.chaos.plan import DEVICES, Plan
from fleetune.tools.bench.transfer.noop import JOB


@dataclass
class Findings:
    """What is not as it must be, in words.

    Attributes:
        lost: Updates that were acknowledged and are not in the journal; answers that a round did not wait for.
        doubled: Updates that are there twice.
        wrong: Rounds, or devices' copies, that do not follow from the updates.
    """

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.lost, *self.doubled, *self.wrong])


def check(folder: Path, plan: Plan) -> Findings:
    """Look at a run that is over.

    Args:
        folder: With the aggregator's state in `aggregator`, and for each device the acknowledgements that it heard in
            `<device>.heard` and the global tensors that its last round began with in `<device>.given`.
        plan: What the run was.

    Raises:
        RunFolderError: A record of the journal is damaged.
    """
    findings = Findings()
    records = list(read_records(folder / "aggregator" / FILE))
    accepted = Counter((r.manifest.device, r.manifest.update) for r in records if isinstance(r, Accepted))
    findings.doubled += [f"{device}: {update} counts {n} times" for (device, update), n in accepted.items() if n > 1]
    for device in DEVICES:
        for ack in _heard(folder / f"{device}.heard"):
            if ack.accepted and (device, ack.update) not in accepted:
                findings.lost.append(f"{device}: {ack.update} was acknowledged, and is not in the journal")
    _Recount(folder, plan, findings).follow(records)
    return findings


def _heard(file: Path) -> list[Ack]:
    lines = file.read_bytes().splitlines() if file.exists() else []
    return [open_envelope(line, Ack) for line in lines]


class _Recount:
    """Goes through the journal and does every sum again."""

    def __init__(self, folder: Path, plan: Plan, findings: Findings) -> None:
        self._folder, self._plan, self._findings = folder, plan, findings
        self._wrong = findings.wrong
        self._tensors: Tensors = {}
        self._exact = True  # the weight of a late update is no binary fraction
        self._announced: Announcement | None = None
        self._open: list[Accepted] = []
        self._closed: list[int] = []

    def follow(self, records: list[Record]) -> None:
        for record in records:
            if isinstance(record, Announced):
                self._announce(record.announcement)
            elif isinstance(record, Accepted):
                self._accept(record)
            elif isinstance(record, Closed):
                self._close(record)
        if self._announced is None:
            self._wrong.append("no round was announced")
        else:
            self._look_at_devices(self._announced, [r for r in records if isinstance(r, Closed)])

    def _announce(self, announcement: Announcement) -> None:
        if announcement.version != len(self._closed):
            self._wrong.append(f"version {announcement.version} is announced after {len(self._closed)} closed rounds")
        self._announced, self._open = announcement, []
        if (announcement.whole is None) != (not self._tensors):
            self._wrong.append(f"version {announcement.version}: names global tensors where there are none, or none")
        if announcement.whole is not None and self._exact and announcement.whole.sha256 != _sha256(self._tensors):
            self._wrong.append(f"version {announcement.version}: announces other tensors than the rounds gave")

    def _accept(self, record: Accepted) -> None:
        manifest = record.manifest
        name = f"{manifest.device}: {manifest.update}"
        if self._announced is None or record.into != self._announced.version:
            self._wrong.append(f"{name} counts in a round that is not open")
        if record.staleness != sum(version >= manifest.version for version in self._closed):
            self._wrong.append(f"{name} is not {record.staleness} rounds late")
        if manifest.samples != DEVICES[manifest.device]:
            self._wrong.append(f"{name} has another weight than it was sent with")
        self._open.append(record)

    def _close(self, record: Closed) -> None:
        version = record.version
        if version in self._closed:
            self._wrong.append(f"version {version} is closed twice")
            return
        self._closed.append(version)
        answers = {r.manifest.device for r in self._open if r.manifest.version == version}
        if set(record.devices) != answers:
            self._wrong.append(f"version {version}: closed with {record.devices}, but {sorted(answers)} answered")
        buffer = self._plan.buffer if self._announced is not None and self._announced.stage == "global" else None
        if (len(answers) < self._plan.quorum) if buffer is None else (len(self._open) < buffer):
            missing = ", ".join(sorted(DEVICES.keys() - answers))
            self._findings.lost.append(f"version {version}: closed without {missing}")
        self._add()
        found = self._read(self._folder / "aggregator" / JOB / "globals" / f"{version}.safetensors")
        self._compare(f"version {version}: the global tensors", found)

    def _add(self) -> None:
        """The mean over who trained, weighted by samples; being late makes a part smaller, not its weight.

        No update here is so large, and no device claims so many samples, that it would reach the rule's bounds.
        """
        sums = dict[str, np.ndarray]()
        weights = Counter[str]()
        for record in self._open:
            scale = 1 / math.sqrt(1 + record.staleness)
            for name, tensor in self._payload(record).items():
                sums[name] = sums.get(name, np.float64(0)) + tensor.astype(np.float64) * record.manifest.samples * scale
                weights[name] += record.manifest.samples
            self._exact = self._exact and not record.staleness
        for name, total in sums.items():
            gain = (total / weights[name]).astype(np.float32)
            self._tensors[name] = self._tensors[name] + gain if name in self._tensors else gain

    def _payload(self, record: Accepted) -> Tensors:
        payload, device, version = record.manifest.payload, record.manifest.device, record.manifest.version
        if payload is None:
            return {}
        with (self._folder / "aggregator" / JOB / "updates" / f"{record.into}.bin").open("rb") as file:
            file.seek(record.start)
            tensors = self._decode(f"{device}: the payload of version {version}", file.read(payload.size))
        if not _same(tensors, sent(device, version, self._plan.shapes)):
            self._wrong.append(f"{device}: version {version}: the journal has other tensors than were sent")
        return tensors

    def _look_at_devices(self, announcement: Announcement, closed: list[Closed]) -> None:
        """Whoever answered the last round began it with what was announced."""
        whole = announcement.whole
        for device in next((r.devices for r in closed if r.version == announcement.version), ()):
            if whole is None:
                continue
            file = self._folder / f"{device}.given"
            if not file.is_file():
                self._wrong.append(f"{device}: answered, and began no round")
            elif hashlib.sha256(file.read_bytes()).hexdigest() != whole.sha256:
                self._wrong.append(f"{device}: began with other bytes than the announced ones")
            else:
                self._compare(f"{device}: what it began with", self._read(file))

    def _compare(self, what: str, found: Tensors) -> None:
        if not _same(found, self._tensors, exact=self._exact):
            self._wrong.append(f"{what}: not what the updates give")

    def _read(self, file: Path) -> Tensors:
        if not file.is_file():
            self._wrong.append(f"{file}: is missing")
            return {}
        return self._decode(str(file), file.read_bytes())

    def _decode(self, what: str, data: bytes) -> Tensors:
        try:
            tensors: Tensors = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, ValueError) as error:
            self._wrong.append(f"{what}: {error}")
            return {}
        return tensors


def _sha256(tensors: Mapping[str, np.ndarray]) -> str:
    return hashlib.sha256(safetensors.numpy.save(dict(tensors))).hexdigest()


def _same(found: Tensors, expected: Tensors, *, exact: bool = True) -> bool:
    """Whether all tensors agree; in the last bits they need not where the sum has no exact value."""
    if found.keys() != expected.keys():
        return False
    if exact:
        return all(np.array_equal(found[name], tensor) for name, tensor in expected.items())
    return all(np.allclose(found[name], tensor, rtol=1e-6, atol=1e-2) for name, tensor in expected.items())
