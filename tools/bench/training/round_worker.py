"""One round of training as an agent does it, without a broker: what it planned, and what it took."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import msgspec


class RoundSpec(msgspec.Struct, frozen=True):
    """What the worker is to do.

    Attributes:
        pack: The pack's folder.
        data: The data file.
        costs: What training costs here.
        state: The agent's state folder.
        memory_mib: The budget.
        threads: Threads of ONNX Runtime.
        epochs: Passes over the samples.
        group: Folder of a control group to join; empty for none.
    """

    pack: str
    data: str
    costs: str
    state: str
    memory_mib: float
    threads: int
    epochs: int
    group: str


def main(path: str) -> None:
    """Get ready, and do a round for each request."""
    spec = msgspec.json.decode(Path(path).read_bytes(), type=RoundSpec)
    if spec.group:  # before it takes memory: what a process has by then stays with the group that it comes from
        Path(spec.group, "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from fleetune.edge.agent.rounds import Rounds, RoundsConfig
    from fleetune.edge.agent.state import State
    from fleetune.edge.pack.pack import Pack
    from fleetune.edge.protocol.messages import Announcement
    from fleetune.edge.resources.costs import Costs
    from fleetune.edge.resources.limits import Budget

    config = RoundsConfig(
        pack=Path(spec.pack),
        data=Path(spec.data),
        budget=Budget(spec.memory_mib),
        threads=spec.threads,
        costs=(msgspec.json.decode(Path(spec.costs).read_bytes(), type=Costs),),
    )
    manifest = Pack.open(config.pack).manifest
    announced = Announcement(
        fleet="bench",
        run="bench",
        job="bench",
        version=0,
        method="fedms",
        stage="global",
        round=1,
        rounds=1,
        backbone=manifest.backbone.sha256,
        quantisation=manifest.quantisation.type,
        settings={
            "rank": manifest.rank, "targets": ",".join(manifest.targets), "classes": 2, "seed": 0,
            "max_depth": manifest.blocks, "depth": manifest.blocks, "epochs": spec.epochs, "batch": 16,
            "optimiser": "adam", "learning_rate": 1e-3, "weight_decay": 0.01,
            "gate_rank": 8, "gate_learning_rate": 1e-4, "gate_epochs": 5, "gate_split": "train", "mix": "logits",
        },
        issued=time.time(), expires=time.time() + 1e6,
    )  # fmt: skip
    rounds = Rounds(config, "bench")
    rounds.prepare(State(Path(spec.state), "bench"), _quiet)
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    for _ in sys.stdin:
        hindrance = rounds.hindrance(announced)
        answer: dict[str, object] = {"waits": hindrance}
        if not hindrance:
            outcome = rounds.answer(announced, {}, _quiet, _quiet)
            answer |= {**outcome.metrics, "tensors": len(outcome.tensors)}
        print(json.dumps(answer), flush=True)  # noqa: T201
    rounds.close()


def _quiet(*_said: object) -> None:
    pass


if __name__ == "__main__":
    main(sys.argv[1])
