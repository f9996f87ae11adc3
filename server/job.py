"""What the operator wants trained: one method, its hyper-parameters, and who must take part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleetune.edge.protocol.codec import DEFAULT


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        id: Its name, a level of its topics.
        method: Name of the method.
        backbone: Hash of the backbone's weights before they were quantised.
        quantisation: How the pack stores them.
        shapes: Full name → shape of every tensor that a device may send; anything else is refused.
        rounds: Rounds of each training stage.
        settings: Hyper-parameters that do not change from round to round.
        schedule: When SAL deepens.
        codec: How what is broadcast becomes bytes.
        rule: How updates become one.
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
