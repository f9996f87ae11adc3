"""What people write and others made: fleet files, profiles, folders in Hugging Face format, data sets."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
import yaml

from fleetune.edge.protocol.errors import ConfigError, DataError, RunFolderError, UnsupportedBackboneError
from fleetune.profiles.fleet import fleet_files, read_fleet
from fleetune.profiles.profile import read_profile, write_profile
from fleetune.profiles.yamlfile import read_size
from fleetune.tools.assets.datasets import read_rotten_tomatoes
from fleetune.tools.assets.idx import read_idx
from fleetune.tools.demo.folder import RunFolder
from fuzz.mutations import from_seeds, mutate_bytes, mutate_json, mutate_tensors, mutate_yaml, of_lines
from fuzz.target import MIB, Target
from fuzz.targets.device import costs_file

FLEET = b"""schema: 1
fleet: lab
devices:
  - id: cam-1
    profile: raspberry-pi-5
    budget: {memory: 512MiB, cpu_seconds: 10.5, disk: 1GiB}
    serial: "1422521030042"
  - id: cam-2
    profile: own.yaml
    budget: &b
      memory: 1.5GiB
  - {id: cam-3, profile: own.yaml, budget: *b}
"""
PROFILE = b"""schema: 1
name: own
board: A board
tier: t4
sources:
  memory: its maker
  processor.cores: its maker
  processor.core: its maker
  processor.architecture: its maker
  thermal.throttles_c: its maker
  thermal.shuts_down_c: its maker
memory: 2GiB
processor: {cores: 4, core: Cortex-A76, architecture: armv8.2-a}
thermal: {throttles_c: 80, shuts_down_c: 90}
"""
MEASURED = (
    PROFILE
    + yaml.safe_dump(
        {
            "measured": [
                {
                    "taken": "2026-01-01T00:00:00Z",
                    "device": "Raspberry Pi 5",
                    "kernel": "6.6",
                    "memory_mib": 2000.0,
                    "backbone": "minilm",
                    "costs": json.loads(costs_file()) | {"trials": json.loads(costs_file())["trials"][:1]},
                }
            ]
        }
    ).encode()
)


def fleet(data: bytes, folder: Path) -> None:
    (folder / "own.yaml").write_bytes(PROFILE)
    (folder / "fleet.yaml").write_bytes(data)
    found = read_fleet(folder / "fleet.yaml")
    for device in found.devices:
        assert device.budget.memory_mib > 0
        found.device(device.id)
    again = folder / "again"
    again.mkdir(exist_ok=True)
    for name, content in fleet_files(found).items():
        (again / name).write_bytes(content)
    assert [one.id for one in read_fleet(again / "fleet.yaml").devices] == [one.id for one in found.devices]


def profile(data: bytes, folder: Path) -> None:
    (folder / "x.yaml").write_bytes(data)
    found = read_profile("x.yaml", beside=folder)
    write_profile(folder / "again.yaml", found)
    assert read_profile("again.yaml", beside=folder).name == found.name


def size(data: bytes, _folder: Path) -> None:
    assert read_size("--memory", data.decode(errors="surrogateescape")).mib > 0


def options(data: bytes, folder: Path) -> None:
    run = RunFolder(folder)
    words, _, seconds = data.partition(b"\n")
    run.options.write_bytes(words)
    (folder / "seconds").write_bytes(seconds)
    run.claim({"seed": 0, "task": "texts"})
    run.save_seconds(run.seconds + 1)


PIXELS = gzip.compress(bytes((0, 0, 8, 3)) + np.array([2, 3, 4], ">u4").tobytes() + bytes(24), 1)


def idx(data: bytes, folder: Path) -> None:
    (folder / "x.gz").write_bytes(data)
    assert read_idx(folder / "x.gz", 3).ndim == 3


def _gzipped(mutation):  # type: ignore[no-untyped-def]
    def mutate(choices, data):  # type: ignore[no-untyped-def]
        try:
            return gzip.compress(mutation(choices, gzip.decompress(data)), 1)
        except (OSError, EOFError, zlib.error):
            return mutation(choices, data)

    return mutate


REVIEWS = b'movie_name,category,text\nA film,fresh,It is good\nA film,rotten,"It is, bad"\nA film,plot,Somebody\n'


def reviews(data: bytes, folder: Path) -> None:
    from fleetune.tools.assets import datasets

    place = folder / datasets._REVIEWS
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(bz2.compress(data, 1))
    read_rotten_tomatoes(folder)


CONFIG = json.dumps(
    {
        "model_type": "bert", "hidden_act": "gelu", "hidden_size": 64, "num_attention_heads": 2,
        "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 19, "max_position_embeddings": 16,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    }
).encode()  # fmt: skip


def _bert() -> bytes:
    """Tensors of a BERT of one block."""
    block = "encoder.layer.0."
    linear = {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"}
    tensors = {f"{block}{name}.weight": (64, 64) for name in (*linear, "intermediate.dense", "output.dense")}
    tensors |= {name.replace("weight", "bias"): (64,) for name in list(tensors)}
    for norm in (f"{block}attention.output.LayerNorm", f"{block}output.LayerNorm", "embeddings.LayerNorm"):
        tensors |= {f"{norm}.weight": (64,), f"{norm}.bias": (64,)}
    tensors |= {"embeddings.word_embeddings.weight": (19, 64), "embeddings.position_embeddings.weight": (16, 64)}
    tensors |= {"embeddings.token_type_embeddings.weight": (2, 64)}
    data: bytes = safetensors.numpy.save({name: np.zeros(shape, np.float32) for name, shape in tensors.items()})
    return data


BERT = _bert()


def config(data: bytes, folder: Path) -> None:
    from fleetune.tools.pack.checkpoint import read_checkpoint

    (folder / "config.json").write_bytes(data)
    (folder / "model.safetensors").write_bytes(BERT)
    read_checkpoint(folder)


def backbone(data: bytes, folder: Path) -> None:
    from fleetune.tools.pack.checkpoint import read_checkpoint

    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(data)
    read_checkpoint(folder)


TARGETS = [
    Target(
        "fleet file",
        from_seeds([FLEET], mutate_yaml, mutate_yaml, mutate_bytes),
        fleet,
        (ConfigError,),
        memory=4 * MIB,
        slow=True,
    ),
    Target(
        "profile",
        from_seeds([PROFILE], mutate_yaml, mutate_yaml, mutate_bytes),
        profile,
        (ConfigError,),
        memory=8 * MIB,
        slow=True,
    ),
    Target(
        "measured",
        from_seeds([MEASURED], mutate_yaml, mutate_yaml, mutate_bytes),
        profile,
        (ConfigError,),
        memory=8 * MIB,
        slow=True,
    ),
    Target("size", from_seeds([b"512MiB", b"1.5 GiB"], mutate_bytes), size, (ConfigError,)),
    Target(
        "run's options",
        from_seeds([b'{"seed": 0, "task": "texts"}\n12.5\n'], mutate_json, mutate_bytes),
        options,
        (RunFolderError,),
    ),
    Target("pictures of a data set", from_seeds([PIXELS], _gzipped(mutate_bytes), mutate_bytes), idx, (DataError,)),
    Target(
        "reviews", from_seeds([REVIEWS], of_lines(mutate_bytes), mutate_bytes), reviews, (DataError,), memory=16 * MIB
    ),
]
if importlib.util.find_spec("onnx") is not None:
    refused = (UnsupportedBackboneError,)
    TARGETS += [
        Target("backbone's settings", from_seeds([CONFIG], mutate_json, mutate_bytes), config, refused, memory=8 * MIB),
        Target(
            "backbone's tensors", from_seeds([BERT], mutate_tensors, mutate_bytes), backbone, refused, memory=8 * MIB
        ),
    ]
