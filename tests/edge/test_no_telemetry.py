"""Data never leaves a device: the runtime of its engine reports to nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fleetune.edge.pack.pack import Pack

FORWARD = """\
import pathlib, sys
import numpy as np
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.pack.pack import Pack

backbone = Backbone(Pack.open(pathlib.Path(sys.argv[1])), threads=1)
print(backbone.embed(np.zeros((1, 3, 64), np.float32)).shape)
"""


def test_the_runtime_keeps_no_identity_of_the_device_and_nothing_to_send(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    """Where it reports, it leaves a device id and a queue of events in the user's home."""
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FORWARD, str(tiny_bert_pack.path)],
        capture_output=True,
        text=True,
        env=env | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=120,
        check=False,
    )
    assert done.stdout == "(1, 3, 64)\n", done.stderr
    assert list(home.iterdir()) == []
