"""What every method shares: the round it is given, the device it runs on, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import Dataset
from fleetune.edge.engine.expert import Factors, Layout
from fleetune.edge.engine.gate import adapter_shapes
from fleetune.edge.engine.optimiser import OptimiserName
from fleetune.edge.pack.manifest import Manifest
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.codec.numbers import Shapes
from fleetune.edge.protocol.errors import MessageError, PackError
from fleetune.edge.protocol.messages import Announcement, Stage
from fleetune.edge.protocol.modelfile import MAX_CLASSES
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.guard import Guard
from fleetune.edge.resources.planner import Plan

FloatArray = NDArray[np.float32]
Tensors = dict[str, FloatArray]
Metrics = dict[str, float | int | str | bool]


Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Classes = Annotated[int, msgspec.Meta(ge=2, le=MAX_CLASSES)]
Rate = Annotated[float, msgspec.Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hyper-parameters that every method has.

    Attributes:
        classes: Number of classes of the task.
        seed: Seed of the job; with the device's id and the round it fixes every random choice.
        max_depth: Deepest that any device of the job goes; everything below is frozen for good.
        depth: Depth that SAL's schedule asks for in this round.
        epochs: Passes over the training samples in a round.
        batch: Samples an optimiser step.
        optimiser: What takes the steps; its state lasts for one round.
        learning_rate: Its step size.
        weight_decay: Its decoupled weight decay.
        factors: Matrices of the adapters that are trained where they go up; what stays private trains both.
    """

    classes: Classes
    seed: Annotated[int, msgspec.Meta(ge=0)]
    max_depth: Count
    depth: Count
    epochs: Count
    batch: Count
    optimiser: OptimiserName
    learning_rate: Rate
    weight_decay: Annotated[float, msgspec.Meta(ge=0)]
    factors: Factors = "AB"


class ExpertSettings(Settings, frozen=True, kw_only=True):
    """Hyper-parameters of methods whose experts have the same adapters on all devices.

    Attributes:
        rank: Rank of the adapters; the agent has compared it with its pack.
        targets: Linear maps that carry an adapter; likewise.
    """

    rank: Count
    targets: str


class TensorStore(Protocol):
    """Keeps a job's private tensors between rounds and restarts.

    Attributes:
        folder: Where they are; also for files that a method writes itself.
        run: The run that the job belongs to.
        job: The job.
    """

    folder: Path
    run: str
    job: str

    def save(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Replace what is stored under ``name``, atomically."""
        ...

    def load(self, name: str) -> Tensors | None:
        """What was stored under ``name``, if anything was."""
        ...


@dataclass(frozen=True)
class Device:
    """What a method may use.

    Attributes:
        id: The device.
        backbone: Runs blocks.
        dataset: The device's samples.
        cache: Hidden states at any boundary.
        plan: What the device can afford.
        costs: Measured costs, to know what an evaluation takes.
        store: Private tensors of the job.
        progress: Is told how far a round is: a share from 0 to 1 and the loss so far.
    """

    id: str
    backbone: Backbone
    dataset: Dataset
    cache: PrefixCache
    plan: Plan
    costs: Costs
    store: TensorStore
    progress: Callable[[float, float], None]


@dataclass(frozen=True)
class Round:
    """One round, as announced.

    Attributes:
        stage: What to do.
        number: Rounds of training in the job, up to this one and with it.
        settings: Hyper-parameters, not yet converted to the method's own type.
        tensors: The global tensors, less the initial ones that follow from the seed.
        guard: Watches the budget.
    """

    stage: Stage
    number: int
    settings: Mapping[str, Any]
    tensors: Tensors
    guard: Guard


@dataclass(frozen=True)
class Outcome:
    """What a round produced.

    Attributes:
        metrics: Figures for the aggregator and the report.
        tensors: What goes up: what the round has added to the global tensors; empty if nothing does.
        depth: Active blocks in this round.
    """

    metrics: Metrics
    tensors: Tensors = field(default_factory=dict)
    depth: int = 0


class Method(Protocol):
    """One device's part in a job.

    Args:
        device: What it may use.
    """

    def __init__(self, device: Device) -> None: ...

    @classmethod
    def check_fit(cls, pack: Pack, announced: Announcement) -> None:
        """See that a pack is one that this job can be done with.

        Raises:
            PackError: It is not.
        """
        ...

    @classmethod
    def shapes(cls, manifest: Manifest, settings: Mapping[str, Any]) -> Shapes:
        """Full name → shape of every tensor that the devices of a job may share.

        Args:
            manifest: The pack's.
            settings: As announced.

        Raises:
            MessageError: A setting is missing or out of range.
        """
        ...

    def run(self, announced: Round) -> Outcome:
        """Do one round."""
        ...


AnySettings = TypeVar("AnySettings", bound=Settings)


def read_settings(announced: Round, kind: type[AnySettings]) -> AnySettings:
    """Convert the announced settings to a method's own.

    Raises:
        MessageError: A setting is missing, unknown, of a wrong type or out of range.
    """
    try:
        return msgspec.convert(dict(announced.settings), type=kind)
    except msgspec.ValidationError as error:
        raise _bad_settings(str(error)) from error


class SameBackbone:
    """What all methods have in common whose devices have the same backbone with the same adapters."""

    @classmethod
    def check_fit(cls, pack: Pack, announced: Announcement) -> None:
        """See that the pack is the job's.

        Raises:
            PackError: It is another one.
        """
        mine = pack.manifest
        for what, theirs, own in (
            ("the backbone", announced.backbone, mine.backbone.sha256),
            ("weights in the format", announced.quantisation, mine.quantisation.type),
            ("adapters of rank", announced.settings.get("rank"), mine.rank),
            ("adapters on", announced.settings.get("targets"), ",".join(mine.targets)),
        ):
            if theirs != own:
                raise PackError(
                    f"the job {announced.job} is for {what} {theirs}, the pack {pack.path} has {own}",
                    "give the device the pack that the aggregator was started with",
                )

    @classmethod
    def shapes(cls, manifest: Manifest, settings: Mapping[str, Any]) -> Shapes:
        """Those of the expert and of the gate's adapter.

        Raises:
            MessageError: A setting is missing or out of range.
        """
        return job_shapes(manifest, settings)


class NothingShared(SameBackbone):
    """What all methods have in common that share nothing: a job may leave open which backbones its devices have."""

    @classmethod
    def check_fit(cls, pack: Pack, announced: Announcement) -> None:
        """See that the pack is the job's, if the job names one.

        Raises:
            PackError: It is another one.
        """
        if announced.backbone:
            super().check_fit(pack, announced)

    @classmethod
    def shapes(cls, manifest: Manifest, settings: Mapping[str, Any]) -> Shapes:
        """None."""
        del manifest, settings
        return {}


class _Sizes(msgspec.Struct, frozen=True):
    classes: Classes
    max_depth: Count
    gate_rank: Count = 1


def job_shapes(manifest: Manifest, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Full name → shape of every tensor that the devices of a job may share, whatever its method.

    Args:
        manifest: The pack's.
        settings: As announced.

    Raises:
        MessageError: A setting is missing or out of range.
    """
    try:
        sizes = msgspec.convert(dict(settings), type=_Sizes)
    except msgspec.ValidationError as error:
        raise _bad_settings(str(error)) from error
    for name, most in (("max_depth", manifest.blocks), ("gate_rank", manifest.width)):
        if (value := getattr(sizes, name)) > most:
            raise _bad_settings(f"{name}: {value} is more than {most}")
    return Layout.of(manifest, sizes.classes).shapes | adapter_shapes(manifest.width, sizes.gate_rank)


def _bad_settings(why: str) -> MessageError:
    return MessageError(
        f"settings of the job: {why}", "use the same version of Fleetune on both sides", reason="bad-settings"
    )


def task_layout(device: Device, settings: Settings) -> Layout:
    """The layout of the task's experts.

    Raises:
        DataError: The device has labels that the job does not know.
    """
    check_labels(device, settings)
    return Layout.of(device.backbone.pack.manifest, settings.classes)


def check_labels(device: Device, settings: Settings) -> None:
    """See that the job knows all labels of a device.

    Raises:
        DataError: It does not.
    """
    device.dataset.check_labels(
        np.arange(len(device.dataset)),
        settings.classes,
        "the job",
        f"label samples from 0 to {settings.classes - 1}, or start the job with more classes",
    )


def random_for(device: Device, settings: Settings, announced: Round) -> np.random.Generator:
    """The round's random numbers: the same whenever the same device repeats the same round of the same job."""
    words = [settings.seed, announced.number, *device.id.encode()]
    return np.random.default_rng(words)
