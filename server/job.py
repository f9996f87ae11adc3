"""What the operator wants trained: one method, its hyper-parameters, and who must take part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleetune.edge.protocol.codec import DEFAULT
from fleetune.edge.protocol.messages import Privacy, Stage


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        id: Its name, a level of its topics.
        method: Name of the method.
        backbone: Hash of what all devices have alike: of the backbone's weights before they were quantised, or in
            pFedMoE of the shared extractor; empty where nothing is shared.
        quantisation: How their packs store weights; empty where devices may differ in it.
        shapes: Full name → shape of every tensor that a device may send; anything else is refused.
        rounds: Rounds of each training stage.
        settings: Hyper-parameters that do not change from round to round.
        schedule: When SAL deepens.
        codec: How what is broadcast becomes bytes.
        rule: How updates become one.
        privacy: What devices do to their updates before these leave; None for nothing.
    """

    id: str
    method: str
    backbone: str
    quantisation: str
    shapes: Mapping[str, tuple[int, ...]]
    rounds: Mapping[str, int]
    settings: Mapping[str, float | int | str | bool]
    schedule: ScheduleSettings = field(default_factory=lambda: ScheduleSettings())
    codec: str = DEFAULT
    rule: RuleSettings = field(default_factory=lambda: RuleSettings())
    privacy: JobPrivacy | None = None


@dataclass(frozen=True)
class JobPrivacy:
    """Differential privacy of each device as a whole.

    Attributes:
        noise: Standard deviation of a device's noise, over the clip: z.
        clip: L2 norm that an update of the expert is cut to.
        gate_clip: L2 norm that an update of the gate's adapter is cut to: it is far smaller.
        delta: δ that ε is said for.
        accuracy: Whether devices tell accuracies when the job ends, which nothing covers.
    """

    noise: float
    clip: float
    gate_clip: float
    delta: float
    accuracy: bool = False

    def of(self, stage: Stage) -> Privacy:
        """What is asked of a device in a round of this stage."""
        return Privacy(self.gate_clip if stage == "personal" else self.clip, self.noise, self.accuracy)


@dataclass(frozen=True)
class ScheduleSettings:
    """SAL's schedule, the "capability queue".

    Attributes:
        start: Depth of the first round.
        step: Blocks added at once, s.
        window: Validation results in the queue, w.
        threshold: Mean gain below which the depth grows, τ.
    """

    start: int = 1
    step: int = 1
    window: int = 2
    threshold: float = 0.01


@dataclass(frozen=True)
class RuleSettings:
    """How the updates of a round become one. What is typical are medians of the round before in the same stage.

    Attributes:
        name: The rule.
        malicious: Share of an update's fellows that are assumed to be malicious, for rules that leave some out.
        clip: Norm to which an update is clipped, in multiples of the typical one.
        outlier: Norm above which it is refused, likewise.
        weight: Samples that it counts in a mean at most, in multiples of the typical number.
    """

    name: str = "mean"
    malicious: float = 0.2
    clip: float = 1.5
    outlier: float = 20.0
    weight: float = 3.0
