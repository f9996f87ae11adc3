"""``report.json``: what a run did, read back from the aggregator's journal and from the devices' state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.messages import Announcement, UpdateManifest
from fleetune.profiles.fleet import Fleet, FleetDevice
from fleetune.server.journal import FILE, Accepted, Announced, read_records
from fleetune.server.strategies.base import trains

ACCURACIES = ("frozen_head", "standalone", "global_expert", "local_expert", "mixture")
"""What is compared, from the least to the most."""


Main = Literal["fedms", "pfedmoe"]
"""Methods that a report can be about."""


@dataclass(frozen=True)
class RunFacts:
    """What the journal does not know.

    Attributes:
        seconds: Wall time of the command in all its starts, set-up included.
        seed: Seed of the run.
        broker: Name and version of the broker.
        url: Its address.
        method: What the report is about.
        sha256_before: Identity of a pack → hash of its weights before the run.
        sha256_after: And after it.
        settings: The options of the run.
    """

    seconds: float
    seed: int
    broker: str
    url: str
    method: Main
    sha256_before: Mapping[str, str]
    sha256_after: Mapping[str, str]
    settings: Mapping[str, Any]


def build_report(
    journal: Path, fleet: Fleet, packs: Mapping[str, Pack], data: Mapping[str, Any], facts: RunFacts
) -> dict[str, Any]:
    """Assemble the report.

    Args:
        journal: Folder of the aggregator.
        fleet: The fleet.
        packs: Device → its pack.
        data: What the devices trained on, for people.
        facts: What the journal does not know.
    """
    history = _history(journal)
    devices = [_device(device, history[device.id], packs[device.id], facts.method) for device in fleet.devices]
    backbones = {
        pack.sha256: {
            "id": pack.manifest.backbone.id,
            "architecture": pack.manifest.backbone.architecture,
            "blocks": pack.manifest.blocks,
            "source_sha256": pack.manifest.backbone.sha256,
            "sha256_before": facts.sha256_before[pack.sha256],
            "sha256_after": facts.sha256_after[pack.sha256],
        }
        for pack in packs.values()
    }
    return {
        "schema": 1,
        "kit": version("fleetune"),
        "fleet": fleet.name,
        "method": facts.method,
        "seed": facts.seed,
        "seconds": round(facts.seconds, 1),
        "transport": {"broker": facts.broker, "protocol": 5, "url": facts.url},
        "backbones": sorted(backbones.values(), key=lambda one: -one["blocks"]),
        "data": dict(data),
        "settings": dict(facts.settings),
        "devices": devices,
        "summary": {
            "accuracy": {
                name: round(fmean(values), 4)
                for name in ACCURACIES
                if (values := [d["accuracy"][name] for d in devices if name in d["accuracy"]])
            },
            "inside_memory_budget": all(d["peak_mib"] <= d["budget_mib"] for d in devices),
            "inside_cpu_budget": all(
                entry["cpu_s"] <= d["budget_cpu_s"]
                for d in devices
                for entry in d["history"]
                if entry["stage"] != "prepare"
            ),
            "bytes_up": sum(d["bytes_up"] for d in devices),
            "bytes_down": sum(d["bytes_down"] for d in devices),
        },
    }


Entry = dict[str, Any]


def training_rounds(history: Sequence[Mapping[str, Any]], method: str) -> list[Mapping[str, Any]]:
    """The entries of a device's history in which it trained for the method that the report is about."""
    return [entry for entry in history if entry["job"] == method and trains(entry["stage"])]


def _history(journal: Path) -> dict[str, list[Entry]]:
    """Device → its rounds in order."""
    announced: dict[tuple[str, int], Announcement] = {}
    history: dict[str, list[Entry]] = {}
    for record in read_records(journal / FILE):
        if isinstance(record, Announced):
            announcement = record.announcement
            announced[announcement.job, announcement.version] = announcement
        elif isinstance(record, Accepted):
            manifest: UpdateManifest = record.manifest
            where = announced[manifest.job, manifest.version]
            entry = {"job": where.job, "stage": where.stage, "round": where.round, **manifest.metrics}
            history.setdefault(manifest.device, []).append(entry)
    return history


def _device(device: FleetDevice, history: Sequence[Entry], pack: Pack, method: Main) -> dict[str, Any]:
    training = training_rounds(history, method)
    first = next(entry for entry in history if entry["job"] == method)
    plan = {name.removeprefix("plan_"): value for name, value in first.items() if name.startswith("plan_")}
    last = {entry["job"]: entry for entry in history}
    accuracy = {name: last[job]["test"] for name, job in _BASELINES.items() if job in last}
    accuracy |= {name: last[method][metric] for name, metric in _EXPERTS.items()}
    return {
        "id": device.id,
        "profile": device.profile.name,
        "board": device.profile.board,
        "budget_mib": device.budget.memory_mib,
        "peak_mib": max(entry["peak_mib"] for entry in history),
        "budget_cpu_s": device.budget.cpu_s,
        "cpu_s": [entry["cpu_s"] for entry in training],
        "backbone": pack.manifest.backbone.id,
        "blocks_total": pack.manifest.blocks,
        "blocks_active": [entry["depth"] for entry in training],
        "plan": plan,
        "stopped_early": sum(entry["stopped_early"] for entry in history),
        "bytes_up": history[-1]["bytes_up"],
        "bytes_down": history[-1]["bytes_down"],
        "samples": first["samples"],
        "accuracy": accuracy,
        "gate_local": last[method]["gate_local"],
        "history": [
            {name: value for name, value in entry.items() if not name.startswith("plan_") and name != "boot"}
            for entry in history
        ],
    }


_BASELINES = {"frozen_head": "frozen-head", "standalone": "standalone"}
_EXPERTS = {"global_expert": "test_global", "local_expert": "test_local", "mixture": "test_mixture"}
