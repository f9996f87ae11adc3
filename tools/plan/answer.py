"""What is answered: the plan, and what every other one lacks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.codec import DEFAULT, Codec
from fleetune.edge.protocol.errors import BudgetError, ConfigError
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.limits import LIMITS, Budget
from fleetune.edge.resources.planner import Option, Plan, choose, options
from fleetune.edge.resources.workload import Workload
from fleetune.profiles.profile import Profile
from fleetune.tools.profile.summary import threads_in_words
from fleetune.tools.text import columns


@dataclass(frozen=True)
class Answer:
    """What a device would do.

    Attributes:
        device: Its id, or its profile's name.
        budget: What was given.
        costs: The trials that it is planned from.
        plan: The plan; None if none fits.
        refusal: Why none fits.
        options: Every plan with what it lacks, the best first.
        bytes_up: Bytes of the round's update; 0 without a plan.
        bytes_down: Bytes of the largest broadcast that the job can have.
    """

    device: str
    budget: Budget
    costs: Costs
    plan: Plan | None
    refusal: BudgetError | None
    options: tuple[Option, ...]
    bytes_up: int
    bytes_down: int

    def as_json(self, *, every: bool) -> dict[str, Any]:
        """For ``--json``; with every option that was rejected if wanted."""
        document: dict[str, Any] = {
            "device": self.device,
            "budget": {name: value for name, value in msgspec.structs.asdict(self.budget).items() if value != math.inf},
            "threads": self.costs.threads,
            "power_mode": self.costs.power_mode,
            "plan": None if self.plan is None else msgspec.to_builtins(self.plan),
            "refusal": None if self.refusal is None else self.refusal.what,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }
        if every:
            document["options"] = [
                {"plan": msgspec.to_builtins(option.plan), "lacks": option.lacks} for option in self.options
            ]
        return document


def answer(
    device: str, profile: Profile, pack: Pack, workload: Workload, budget: Budget, *, threads: int | None, classes: int
) -> Answer:
    """Plan from what was measured; of several tables that count, the one with the deepest plan, then the fastest.

    Args:
        device: Name for people.
        profile: A profile with trials of the pack.
        pack: The pack.
        workload: The round.
        budget: Its limits.
        threads: Only trials with so many threads; None for any.
        classes: Classes of the task, for the bytes.

    Raises:
        ConfigError: Nothing that was measured counts.
        BudgetError: The budget limits energy, and no sensor measured it.
    """
    found = [_plan(costs, workload, budget) for costs in _usable(device, profile, pack, workload, threads)]
    costs, plan, refusal, every = min(found, key=lambda one: (-one[1].depth, one[1].seconds) if one[1] else (0, 0.0))
    layout = Layout.of(pack.manifest, classes)
    up, down = (_payload_bytes(layout, depth) for depth in (plan.depth if plan else 0, workload.max_depth))
    return Answer(device, budget, costs, plan, refusal, tuple(every), up, down)


def _payload_bytes(layout: Layout, depth: int) -> int:
    """Bytes of an update of so many blocks, as agents encode it: what training adds compresses as well as noise."""
    if not depth:
        return 0
    rng = np.random.default_rng(0)
    active = Expert(layout).active(depth)
    noise = {name: rng.standard_normal(tensor.shape, dtype=np.float32) for name, tensor in active.items()}
    return len(Codec.named(DEFAULT).encode(noise))


def _usable(device: str, profile: Profile, pack: Pack, workload: Workload, threads: int | None) -> list[Costs]:
    reasons, usable = list[str](), list[Costs]()
    for measured in profile.measured:
        why = measured.costs.stale(pack, length=workload.longest, threads=threads, here=False)
        if why:
            reasons.append(f"{measured.backbone}, {measured.taken}: {why}")
        else:
            usable.append(measured.costs)
    if not usable:
        raise ConfigError(
            f"{device}: the profile {profile.name} holds no trials that count for this pack and these samples"
            f"{': ' if reasons else ''}{'; '.join(reasons)}",
            "measure on the device: fleetune profile --pack DIR --out FILE",
        )
    return usable


def _plan(
    costs: Costs, workload: Workload, budget: Budget
) -> tuple[Costs, Plan | None, BudgetError | None, list[Option]]:
    every = list[Option]()
    try:
        every = options(costs, workload, budget)
        return costs, choose(costs, workload, budget), None, every
    except BudgetError as error:
        return costs, None, error, every


# --- for people -----------------------------------------------------------------------------------------------------


def in_words(answer: Answer, *, every: bool) -> str:
    """The plan, and below it for each depth the option that comes closest, or every option."""
    plan = answer.plan
    lines = [f"{answer.device}, {answer.costs.power_mode}, {threads_in_words(answer.costs)}"]
    if plan is not None:
        given = ", ".join(
            f"{limit.amount(limit.need(plan))} of {limit.amount(limit.given(answer.budget))}"
            for limit in LIMITS
            if limit.given(answer.budget) < math.inf
        )
        lines += [
            f"plan: depth {plan.depth}, activations {_policy(plan)}, micro-batch {plan.micro_batch}, prefix cache "
            f"{_cache(plan)}; "
            f"bound by {plan.bound_by.replace('+', ' and ')}",
            f"peak {plan.peak_mib:.0f} MiB; a round takes {plan.seconds:.1f} s, {plan.cpu_s:.1f} CPU s"
            f"{'' if plan.joules is None else f', {plan.joules:.0f} J'}, {answer.bytes_up / 1024:.0f} KiB up, "
            f"at most {answer.bytes_down / 1024:.0f} KiB down",
            *([f"with margins: {given}"] if given else ["no budget was given: nothing limits the plan"]),
        ]
    shown = answer.options if every else _closest(answer.options)
    if not shown:
        return "\n".join(lines)
    rows = [["depth", "activations", "micro-batch", "cache", "MiB", "s", "CPU s", "J", "lacks"]]
    rows += [_row(option) for option in shown]
    return "\n".join([*lines, "", columns(rows)])


def _closest(every: Iterable[Option]) -> list[Option]:
    """Of each depth the best option that fits, or the one that lacks the smallest share of what it needs."""
    found = dict[int, list[Option]]()
    for option in every:  # they come sorted, the best first
        found.setdefault(option.plan.depth, []).append(option)
    return [min(found[depth], key=_shortage) for depth in sorted(found)]


def _shortage(option: Option) -> float:
    return sum(option.lacks.get(limit.name, 0.0) / (limit.need(option.plan) or 1.0) for limit in LIMITS)


def _row(option: Option) -> list[str]:
    lacks = ", ".join(limit.amount(option.lacks[limit.name]) for limit in LIMITS if limit.name in option.lacks)
    plan = option.plan
    joules = "-" if plan.joules is None else f"{plan.joules:.0f}"
    return [*_work(plan), _cache(plan), *_costs(plan), joules, lacks or "fits"]


def _work(plan: Plan) -> list[str]:
    return [str(plan.depth), _policy(plan), str(plan.micro_batch)]


def _costs(plan: Plan) -> list[str]:
    return [f"{plan.peak_mib:.0f}", f"{plan.seconds:.1f}", f"{plan.cpu_s:.1f}"]


def fleet_table(answers: Iterable[Answer | tuple[str, str]]) -> str:
    """One row a device, and below the table why a device has no plan; of one without trials, its id and the reason."""
    rows = [["device", "depth", "activations", "micro-batch", "MiB", "s", "CPU s", "KiB up", "bound by"]]
    reasons = list[str]()
    for found in answers:
        if isinstance(found, Answer) and found.plan is not None:
            plan, up = found.plan, f"{found.bytes_up / 1024:.0f}"
            rows.append([found.device, *_work(plan), *_costs(plan), up, plan.bound_by.replace("+", " and ")])
        else:
            name, why = found if isinstance(found, tuple) else (found.device, str(found.refusal))
            rows.append([name, *["-"] * 7, "no plan, see below"])
            reasons.append(f"{name}: {why}")
    return "\n".join([columns(rows), *(["", *reasons] if reasons else [])])


def _policy(plan: Plan) -> str:
    return "recomputed" if plan.recompute else "kept"


def _cache(plan: Plan) -> str:
    return "no cache" if plan.cache == "none" else f"{plan.cache}, {plan.cache_mib:.1f} MiB"
