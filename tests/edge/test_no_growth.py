"""A training loop allocates nothing: the memory of the process stays where its first steps left it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.edge.pack.pack import Pack

LOOP = """\
import json, sys
from pathlib import Path
import numpy as np
import psutil
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.batch import batch_gradient
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.optimiser import Adam
from fleetune.edge.engine.suffix import Suffix
from fleetune.edge.pack.pack import Pack

pack = Pack.open(Path(sys.argv[1]))
data = read_dataset(Path(sys.argv[2]), pack)
backbone = Backbone(pack, threads=1)
expert = Expert.initial(Layout.of(pack.manifest, 2), 0)
gradient, tail = Expert(expert.layout), expert.layout.tail(2)
prefix = PrefixCache(Path(sys.argv[3]), backbone, data, micro_batch=4).prefix(1, expert)
suffix = Suffix(backbone, 2, recompute=sys.argv[4] == "recompute")
optimiser, rng, rss = Adam(tail.stop - tail.start, 1e-3), np.random.default_rng(0), []
for step in range(1100):
    batch = rng.permutation(data.indices("train"))[:6]  # of other lengths in every step
    batch_gradient(suffix, prefix, data.labels, batch, 4, expert, gradient)
    optimiser.step(expert.vector[tail], gradient.vector[tail])
    if step % 100 == 99:
        rss.append(psutil.Process().memory_info().rss / 2**20)
print(json.dumps(rss))
"""


@pytest.mark.parametrize("policy", ["fused", "recompute"])
def test_a_thousand_steps_grow_by_less_than_a_mebibyte(
    policy: str, tiny_bert_pack: Pack, text_data: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", LOOP, str(tiny_bert_pack.path), str(text_data), str(tmp_path / "cache"), policy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rss = json.loads(done.stdout)
    assert max(rss) - rss[0] < 1, rss
