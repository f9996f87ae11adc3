"""A run's folder: what is where, whether it may be used, and everything that is made before the fleet starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import RunFolderError
from fleetune.edge.protocol.files import read_bytes, write_atomic
from fleetune.edge.protocol.messages import encode
from fleetune.edge.resources.costs import Costs, measure, read_costs
from fleetune.edge.resources.limits import TIME_MARGIN
from fleetune.edge.resources.planner import candidates
from fleetune.edge.resources.workload import Workload
from fleetune.profiles.yamlfile import read_yaml
from fleetune.tools.demo.identities import make_identities
from fleetune.tools.demo.task import Task

_MAX_OPTIONS = 1 << 16
_MAX_SECONDS = 64


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def options(self) -> Path:
        """The options it was started with."""
        return self.path / "run.json"

    @property
    def pack(self) -> Path:
        """The pack; of a fleet with several backbones, that of the large boards."""
        return self.path / "pack"

    @property
    def fleet(self) -> Path:
        """The fleet file."""
        return self.path / "fleet.yaml"

    @property
    def aggregator(self) -> Path:
        """The aggregator's state."""
        return self.path / "aggregator"

    @property
    def authority(self) -> Path:
        """The authority of the run's fleet."""
        return self.path / "authority"

    @property
    def report(self) -> Path:
        """The report as JSON."""
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The report to read."""
        return self.path / "report.html"

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far, in all its starts."""
        file = self.path / "seconds"
        try:
            return float(read_bytes(file, _MAX_SECONDS)) if file.exists() else 0.0
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{file}: {error}", "delete the file; the report then counts from now on") from error

    def save_seconds(self, seconds: float) -> None:
        """Keep the seconds that the run has taken."""
        write_atomic(self.path / "seconds", f"{seconds:.1f}\n".encode("ascii"))

    def device(self, device: str) -> Path:
        """A device's state."""
        return self.path / "devices" / device

    def data(self, device: str, suffix: str) -> Path:
        """A device's samples."""
        return self.path / "data" / f"{device}{suffix}"

    def log(self, process: str) -> Path:
        """What a process wrote."""
        return self.path / "logs" / f"{process}.log"

    def claim(self, options: dict[str, Any]) -> bool:
        """Take the folder for a run with these options.

        Returns:
            Whether an interrupted run goes on.

        Raises:
            RunFolderError: It holds a finished run, a run with other options, or something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is not a folder", "name another folder with --out")
        changed, earlier = [], dict[str, Any]()
        if self.options.exists():
            earlier = self._earlier()
            changed = sorted(name for name in earlier.keys() | options.keys() if earlier.get(name) != options.get(name))
        if self.report.exists():
            other = f" with another {', '.join(changed)}" if changed else ""
            raise RunFolderError(
                f"{self.path} holds a finished run{other}", f"read {self.page}, or name another folder with --out"
            )
        if self.options.exists():
            begun = self.pack.exists() or earlier.keys() != options.keys()  # before the pack, nothing depends on them
            if changed and begun:
                raise RunFolderError(
                    f"{self.path} holds an interrupted run with another {', '.join(changed)}",
                    "start it with the same options to go on, or name another folder with --out",
                )
            if not changed:
                return True
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunFolderError(f"{self.path} is not empty and holds no run", "name another folder with --out")
        write_atomic(self.options, json.dumps(options, indent=1).encode())
        return False

    def _earlier(self) -> dict[str, Any]:
        try:
            earlier = json.loads(read_bytes(self.options, _MAX_OPTIONS))
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{self.options} cannot be read: {error}", "name another folder with --out") from error
        if not isinstance(earlier, dict):
            raise RunFolderError(f"{self.options} holds no run's options", "name another folder with --out")
        return earlier


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    profile: str
    memory: str
    cpu: float
    few_blocks: bool = False
    extractor_memory: str | None = None


class _Template(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fleet: str
    devices: list[_Entry]


@dataclass(frozen=True)
class Kit:
    """What a device is given beside its samples.

    Attributes:
        pack: Folder of its pack.
        costs: What training costs with it on this machine.
    """

    pack: Path
    costs: Path


def prepare(
    folder: RunFolder,
    task: Task,
    *,
    mixed: bool,
    max_depth: int | None,
    epochs: int,
    batch: int,
    say: Callable[[str], None],
) -> dict[str, Kit]:
    """Make what is not there yet: packs, data, costs, the fleet file and the identities.

    Args:
        folder: The run's folder.
        task: Backbone and data.
        mixed: Whether small boards have a backbone of fewer blocks, and all share an extractor.
        max_depth: Deepest that any device may train; all blocks if None.
        epochs: Local epochs a round.
        batch: Samples an optimiser step.
        say: Is told what happens next.

    Returns:
        Device → what it is given.
    """
    template = read_yaml(Path(__file__).with_name("fleet.yaml"), _Template, "install Fleetune again").value
    large = Kit(folder.pack, folder.path / "costs.json")
    small = Kit(folder.path / "pack-small", folder.path / "costs-small.json")
    kits = {entry.id: small if mixed and entry.few_blocks else large for entry in template.devices}
    for kit in dict.fromkeys(kits.values()):
        if not kit.pack.exists():
            blocks = task.few_blocks if kit is small else None
            say(f"packs {f'the first {blocks} blocks of ' if blocks else ''}the backbone {task.backbone}")
            task.write_pack(kit.pack, extractor=mixed, blocks=blocks)
    packs = {kit: Pack.open(kit.pack) for kit in dict.fromkeys(kits.values())}
    files = {entry.id: folder.data(entry.id, task.suffix) for entry in template.devices}
    if not all(file.exists() for file in files.values()):
        say(f"splits the data set {task.data} among {len(files)} devices")
        task.write_data(list(files.values()))
    datasets = {device: read_dataset(file, packs[kits[device]]) for device, file in files.items()}
    for kit, pack in packs.items():
        if not kit.costs.exists():
            costs = measure(
                pack,
                threads=1,
                longest=max(int(dataset.lengths.max()) for dataset in datasets.values()),
                at_once=len(files),  # as many as will share the machine
                on_trial=lambda done, total: say(f"measures what training costs on this machine ({done} of {total})"),
            )
            write_atomic(kit.costs, encode(costs))
    if not folder.fleet.exists():
        options = {
            kit: _Choices(
                read_costs(kit.costs),
                Workload.of(
                    next(dataset for device, dataset in datasets.items() if kits[device] == kit),
                    pack.manifest,
                    epochs=epochs,
                    batch=batch,
                    max_depth=min(max_depth or pack.manifest.blocks, pack.manifest.blocks),
                ),
            )
            for kit, pack in packs.items()
        }
        choices = {device: options[kit] for device, kit in kits.items()}
        write_atomic(folder.fleet, _fleet_file(template, choices, mixed=mixed).encode())
    states = [(entry.id, folder.device(entry.id)) for entry in template.devices]
    make_identities(folder.authority, template.fleet, [kit.pack for kit in packs], folder.aggregator, states)
    return kits


@dataclass(frozen=True)
class _Choices:
    """What a device could plan.

    Attributes:
        costs: What training costs.
        workload: What a round asks for.
    """

    costs: Costs
    workload: Workload

    def cpu_s(self, depth: int) -> float:
        """CPU seconds of a round of the cheapest plan of a depth, with the planner's margin."""
        plans = candidates(self.costs, self.workload)
        return min(plan.cpu_s for plan in plans if plan.depth == depth) * (1 + TIME_MARGIN)


def _fleet_file(template: _Template, choices: Mapping[str, _Choices], *, mixed: bool) -> str:
    spans = {device: (choice.cpu_s(1), choice.cpu_s(choice.workload.max_depth)) for device, choice in choices.items()}
    devices = [
        {
            "id": entry.id,
            "profile": entry.profile,
            "budget": {
                "memory": entry.extractor_memory if mixed and entry.extractor_memory else entry.memory,
                "cpu_seconds": round(spans[entry.id][0] + entry.cpu * (spans[entry.id][1] - spans[entry.id][0]), 2),
            },
        }
        for entry in template.devices
    ]
    head = "# Written by `fleetune demo`: budgets are the demo's choices, not measurements of these boards.\n"
    return head + yaml.safe_dump({"schema": 1, "fleet": template.fleet, "devices": devices}, sort_keys=False)
