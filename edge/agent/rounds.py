"""The agent's worker: it knows what training costs here, plans within what there is now, and trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleetune.edge.agent.state import State
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache, room
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.methods import METHODS
from fleetune.edge.methods.base import (
    Device,
    Method,
    Metrics,
    Outcome,
    Round,
    Settings,
    Tensors,
    read_settings,
)
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.codec.numbers import Shapes
from fleetune.edge.protocol.errors import BudgetError, MessageError
from fleetune.edge.protocol.messages import Announcement
from fleetune.edge.resources.costs import Costs, measure
from fleetune.edge.resources.guard import Guard
from fleetune.edge.resources.heat import Heat
from fleetune.edge.resources.limits import Budget, lacking
from fleetune.edge.resources.memorywatch import MemoryWatch
from fleetune.edge.resources.planner import Plan, choose
from fleetune.edge.resources.process import Stopwatch, machine_memory_mib, peak_mib
from fleetune.edge.resources.workload import Workload

log = logging.getLogger(__name__)

_MIB = 1 << 20
_COSTS = "costs.json"


@dataclass(frozen=True)
class _Part:
    """This device's part in a job, under one plan."""

    run: str
    job: str
    plan: Plan
    cache: PrefixCache
    method: Method


@dataclass(frozen=True)
class RoundsConfig:
    """What a device trains with.

    Attributes:
        pack: The pack's folder.
        data: The device's data file.
        budget: What it may spend.
        threads: Threads of ONNX Runtime; 0 means one for each core.
        costs: Costs that were measured on this device before; measured anew where none of them fits.
        sensors: Folder with the `/sys` that heat is read from; another one than the system's is for rehearsals.
        throttles_c: Degrees from which the board throttles, where its sensors name no limit.
    """

    pack: Path
    data: Path
    budget: Budget
    threads: int = 0
    costs: tuple[Costs, ...] = ()
    sensors: Path = Path("/")
    throttles_c: float | None = None


class Rounds:
    """The rounds of one device: a :class:`~fleetune.edge.agent.worker.Worker`.

    Args:
        config: What it trains with.
        device: Its id.

    Raises:
        FleetuneError: The pack or the data cannot be used.
        BudgetError: The budget is larger than the machine's memory, so nothing would hold the agent to it.
    """

    def __init__(self, config: RoundsConfig, device: str) -> None:
        if config.budget.memory_mib > machine_memory_mib():
            raise BudgetError(
                f"budget: memory: {config.budget.memory_mib:.0f} MiB are given, "
                f"but this machine has {machine_memory_mib():.0f} MiB in all",
                "lower the budget of this device in the fleet file",
            )
        self._config, self._device = config, device
        self._pack = Pack.open(config.pack)
        self._data = read_dataset(config.data, self._pack)
        self._backbone = Backbone(self._pack, config.threads)
        self._memory = MemoryWatch(config.budget.memory_mib)
        self._heat = Heat(config.sensors, config.throttles_c)
        self._costs: Costs | None = None
        self._base_mib: float | None = None
        self._part: _Part | None = None
        self._say: Callable[[str], None] = lambda _what: None
        self._progress: Callable[[float, float], None] = lambda _share, _loss: None

    @property
    def samples(self) -> int:
        """Samples that it trains on."""
        return len(self._data.indices("train"))

    @property
    def facts(self) -> Metrics:
        """The plan, for people."""
        plan = self._part.plan if self._part is not None else None
        return {} if plan is None else {"plan": in_words(plan), "bound_by": plan.bound_by}

    def close(self) -> None:
        """Let go of the kernel's files."""
        self._memory.close()

    def forget(self) -> None:
        """Take no further part in the job of the round before."""
        self._part = None

    def prepare(self, state: State, say: Callable[[str], None]) -> None:
        """Know what training costs here.

        Raises:
            BudgetError: Not even the smallest trial ran.
        """
        self._state, self._say = state, say
        self._cache_folder = state.folder / "cache"
        self.measure()

    def check_fit(self, announced: Announcement) -> None:
        """See that this Fleetune has the method, and the pack is the job's.

        Raises:
            MessageError: The method is unknown.
            PackError: The pack is another one.
        """
        if announced.method not in METHODS:
            raise MessageError(
                f"the method {announced.method!r} is unknown", "update Fleetune on this device", reason="unknown-method"
            )
        METHODS[announced.method].check_fit(self._pack, announced)

    def shapes(self, announced: Announcement) -> Shapes:
        """Full name → shape of every tensor that the devices of a job may share.

        Raises:
            MessageError: The method is unknown, or a setting is missing or out of range.
            PackError: The pack is another one.
        """
        self.check_fit(announced)
        return METHODS[announced.method].shapes(self._pack.manifest, announced.settings)

    def measure(self) -> Costs:
        """What training costs here: as it was measured before, unless the kit, the pack, or the power mode changed.

        Raises:
            BudgetError: Not even the smallest trial ran.
        """
        length, threads = int(self._data.lengths.max()), self._config.threads
        known = [self._costs] if self._costs is not None else [*self._config.costs, self._state.read(_COSTS, Costs)]
        for costs in known:
            if costs is not None:
                why = costs.stale(self._pack, threads=threads, length=length)
                if not why:
                    if costs is not self._costs:
                        log.info("knows what training costs here from %d trials before", len(costs.trials))
                        self._state.save(_COSTS, costs)
                    self._costs = costs
                    return costs
                log.info("costs that are known do not count: %s", why)
        log.info("measures what training costs here")
        self._costs = measure(
            self._pack,
            threads=threads,
            longest=length,
            limit_mib=self._memory.afforded_mib(),
            on_trial=lambda done, total: self._say(f"measures what training costs here: {done} of {total} trials"),
        )
        self._state.save(_COSTS, self._costs)
        return self._costs

    def hindrance(self, announced: Announcement) -> str:
        """What keeps a round from starting now: heat, or memory that others hold; empty if nothing does.

        Raises:
            BudgetError: The job does not fit the budget, whatever the machine has.
        """
        if hot := self._heat.reason():
            return hot
        costs, budget = self.measure(), self._within_disk()
        now = msgspec.structs.replace(budget, memory_mib=min(budget.memory_mib, self._memory.afforded_mib()))
        try:
            self._take_part(announced, costs, now)
        except BudgetError as error:
            self._choose(announced, costs, budget)
            return error.what
        return ""

    def answer(
        self,
        announced: Announcement,
        tensors: Tensors,
        progress: Callable[[float, float], None],
        pulse: Callable[[], None],
    ) -> Outcome:
        """Do a round that nothing hinders.

        Raises:
            DataError: The samples do not suit the job, or training diverged.
            MessageError: The job's settings do not suit this version of Fleetune.
        """
        watch, part, budget = Stopwatch(), self._part, self._config.budget
        assert part is not None
        self._progress, self._backbone.pulse = progress, pulse
        limits = (None, None) if announced.stage == "prepare" else (budget.cpu_s, budget.deadline_s)
        guard = Guard(limits[0], seconds=limits[1], excess_mib=self._memory.excess_mib)
        outcome = part.method.run(
            Round(
                stage=announced.stage,
                number=announced.round,
                settings=announced.settings,
                tensors=tensors,
                guard=guard,
            )
        )
        plan, (seconds, cpu_s) = part.plan, watch.read()
        self._backbone.give_back()  # until the next round others may have it
        metrics: Metrics = {
            **outcome.metrics,
            "depth": outcome.depth,
            "cpu_s": round(cpu_s, 3),
            "seconds": round(seconds, 3),
            "peak_mib": round(peak_mib(), 1),
            "stopped_early": guard.stopped_early,
            "stopped_for": guard.stopped_for,
            "eased": guard.eased,
            "cache_missing_mib": round(plan.missing_mib or part.cache.missing / _MIB, 3),
            "plan_depth": plan.depth,
            "plan_micro_batch": plan.micro_batch,
            "plan_recompute": plan.recompute,
            "plan_cache": plan.cache,
            "plan_cache_mib": round(plan.cache_mib, 3),
            "plan_peak_mib": plan.peak_mib,
            "plan_cpu_s": plan.cpu_s,
            "plan_bound_by": plan.bound_by,
        }
        log.info(
            "%s: %s, round %d: %.1f s, %.1f CPU s, peak %.0f MiB%s",
            *(announced.job, announced.stage, announced.round, seconds, cpu_s, metrics["peak_mib"]),
            f"; ended early, for want of {guard.stopped_for}" if guard.stopped_early else "",
        )
        return Outcome(metrics, outcome.tensors, outcome.depth)

    # --- planning -----------------------------------------------------------------------------------------------

    def _take_part(self, announced: Announcement, costs: Costs, budget: Budget) -> None:
        """Plan, unless the plan of the round before still fits and none is deeper: a new one needs a new cache."""
        part, plan = self._part, self._choose(announced, costs, budget)
        same = part is not None and (part.run, part.job) == (announced.run, announced.job)
        if part is not None and same and not lacking(part.plan, budget) and part.plan.depth >= plan.depth:
            return
        self._state.enter(announced.run)
        log.info(
            "%s: plans %s; expects a peak of %.0f MiB, %.1f CPU s a round (bound by %s)",
            *(announced.job, in_words(plan), plan.peak_mib, plan.cpu_s, plan.bound_by),
        )
        if plan.missing_mib:
            log.warning(
                "%s: no room for the prefix cache in %s, which lacks %.2f MiB: the frozen blocks run for every batch",
                *(announced.job, self._cache_folder, plan.missing_mib),
            )
        cache = PrefixCache(
            self._cache_folder,
            self._backbone,
            self._data,
            micro_batch=plan.micro_batch,
            codec=plan.cache,
            limit=int(plan.cache_mib * _MIB),
        )
        device = Device(
            id=self._device,
            backbone=self._backbone,
            dataset=self._data,
            cache=cache,
            plan=plan,
            costs=costs,
            store=self._state.store(announced.run, announced.job),
            progress=lambda share, loss: self._progress(share, loss),
        )
        self._part = _Part(announced.run, announced.job, plan, cache, METHODS[announced.method](device))

    def _choose(self, announced: Announcement, costs: Costs, budget: Budget) -> Plan:
        names = set(Settings.__struct_fields__)
        common = {name: value for name, value in announced.settings.items() if name in names}
        settings = read_settings(Round(announced.stage, announced.round, common, {}, Guard()), Settings)
        workload = Workload.of(
            self._data,
            self._pack.manifest,
            epochs=settings.epochs,
            batch=settings.batch,
            max_depth=min(settings.max_depth, self._pack.manifest.blocks),
        )
        if self._base_mib is None:
            costs.model.growth_mib(
                1, 1, 1, recompute=costs.trials[0].recompute
            )  # planning loads more of NumPy: that belongs to the base
            self._base_mib = peak_mib()
        return choose(costs, workload, budget, self._base_mib)

    def _within_disk(self) -> Budget:
        """The budget, or what the disk has of it; the prefix cache that is there may be written over."""
        budget = self._config.budget
        written = sum(file.stat().st_size for file in self._cache_folder.rglob("*") if file.is_file())
        return msgspec.structs.replace(
            budget, disk_mib=min(budget.disk_mib, (room(self._cache_folder) + written) / _MIB)
        )


def in_words(plan: Plan) -> str:
    """A plan, for people."""
    cache = "no cache" if plan.cache == "none" else f"{plan.cache} cache"
    return f"depth {plan.depth}, {'recompute' if plan.recompute else 'fused'}, micro-batch {plan.micro_batch}, {cache}"
