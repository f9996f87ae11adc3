"""A device needs no torch: every module that it may import, and a training step, with torch and the like out of reach.

Each test runs in a process of its own, in which an import of a forbidden package fails and is written down, even where
the code would have caught the failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleetune.edge.pack.pack import Pack
from fleetune.edge.resources.trial import Request, Trial
from fleetune.profiles.profile import profile_names

FORBIDDEN = (
    *("torch", "transformers", "optimum", "bitsandbytes", "onnx"),
    *("matplotlib", "rich", "jinja2", "iotcore", "dp_accounting", "scipy"),
)

BLOCKER = f"""\
import json, sys

class Blocker:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            self.asked.append(name)
            raise ImportError(f"a device must not import {{name}}")

sys.meta_path.insert(0, Blocker())

def answer(found):
    loaded = [name for name in sys.modules if name.partition(".")[0] in {FORBIDDEN!r}]
    print(json.dumps({{"asked": Blocker.asked, "loaded": loaded, "found": found}}))
"""

WALK = """\
import importlib, pkgutil
import fleetune.edge, fleetune.profiles

names = []
for package in (fleetune.edge, fleetune.profiles):
    def fail(name):
        raise
    names += [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=fail)]
for name in [*names, "fleetune.tools.cli", "fleetune.tools.commands.agent"]:
    importlib.import_module(name)
from fleetune.profiles.profile import profile_names, read_profile
from fleetune.tools.cli import build_parser
build_parser()
answer({"modules": names, "profiles": [read_profile(name).name for name in profile_names()]})
"""

TRAIN = """\
import pathlib
import numpy as np
from fleetune.edge.agent.state import JobStore
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.methods.base import Device, Round, ExpertSettings
from fleetune.edge.methods.local import ExpertLearner, LocalRun
from fleetune.edge.pack.pack import Pack
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.guard import Guard
from fleetune.edge.resources.planner import Plan
from fleetune.edge.resources.trial import Trial

pack = Pack.open(pathlib.Path(sys.argv[1]))
data = read_dataset(pathlib.Path(sys.argv[2]), pack)
backbone = Backbone(pack, threads=1)
trial = Trial(1, 2, 8, False, 50.0, 50.0, 60.0, 0.01, 0.01, 1e-6, 1e-6)
device = Device(
    id="cam-01",
    backbone=backbone,
    dataset=data,
    cache=PrefixCache(pathlib.Path(sys.argv[3]), backbone, data, micro_batch=4),
    plan=Plan(2, 4, False, "f16", 1.0, 60.0, 1.0, 1.0, None, "job"),
    costs=Costs("p", "1", "1", "x", 1, "1 core", (trial,)),
    store=JobStore(pathlib.Path(sys.argv[3]), "r", "j"),
    progress=lambda share, loss: None,
)
settings = ExpertSettings(
    rank=4, targets="query,value", classes=2, seed=0, max_depth=2, depth=2, epochs=1, batch=12, weight_decay=0.0,
    optimiser=sys.argv[4], learning_rate=float(sys.argv[5]),
)
expert = Expert.initial(Layout.of(pack.manifest, 2), seed=0)
before = expert.vector.copy()
run = LocalRun(device, settings, expert)
announced = Round("global", 1, {}, {}, Guard())
learners = (ExpertLearner(expert, settings) for _ in range(8))
losses = [run.train(learner, announced, np.random.default_rng(0), evaluated=0) for learner in learners]
changed = [name for name, view in expert.layout.views(before).items() if (view != expert.tensors[name]).any()]
answer({"losses": losses, "changed": changed})
"""


def run(script: str, *arguments: str | Path) -> Any:
    """What a script found, after it and everything that it imported left the forbidden packages alone."""
    command = [sys.executable, "-c", BLOCKER + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["asked"] == []
    assert answer["loaded"] == []
    return answer["found"]


def test_every_module_of_a_device_imports_without_them() -> None:
    found = run(WALK)
    folder = Path(sys.modules[Pack.__module__].__file__ or "").parents[1]
    files = [path.relative_to(folder).with_suffix("").parts for path in folder.rglob("*.py")]
    modules = {".".join(("fleetune", "edge", *parts)).removesuffix(".__init__") for parts in files}
    assert modules - {"fleetune.edge"} <= set(found["modules"])
    assert "fleetune.profiles.fleet" in found["modules"]
    assert found["profiles"] == profile_names()


@pytest.mark.parametrize(("optimiser", "rate"), [("adam", 5e-3), ("sgd", 0.01)])
def test_training_works_without_them(
    optimiser: str, rate: float, tiny_bert_pack: Pack, text_data: Path, tmp_path: Path
) -> None:
    found = run(TRAIN, tiny_bert_pack.path, text_data, tmp_path / "cache", optimiser, str(rate))
    assert found["losses"][-1] < found["losses"][0]
    blocks = {name.split(".")[1] for name in found["changed"] if name.startswith("blocks.")}
    assert blocks == {"1", "2"}  # depth 2 of three blocks
    assert "head.weight" in found["changed"]


def test_a_trial_works_without_them(tiny_bert_pack: Pack) -> None:
    """A trial is a process of its own on a device; here it runs as one, behind the same blocker."""
    request = Request(str(tiny_bert_pack.path), 2, 4, 12, recompute=True, threads=1)
    script = """\
    import contextlib, io, runpy
    request, sys.argv[1:] = sys.argv[1], []
    sys.stdin = io.TextIOWrapper(io.BytesIO(request.encode()))
    out = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(out):
        runpy.run_module("fleetune.edge.resources.trial", run_name="__main__")
    answer(json.loads(out.buffer.getvalue()))
    """
    trial = msgspec.convert(run(script, msgspec.json.encode(request).decode()), Trial)
    assert (trial.depth, trial.micro_batch, trial.recompute) == (2, 4, True)
    assert trial.step_cpu_s > 0 < trial.step_s
    assert trial.peak_mib >= trial.base_mib > 0
