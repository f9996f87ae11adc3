"""Writes an export, holds it against the device's engine, and moves it into place."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import onnxruntime

from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.mixture import Mixture
from fleetune.edge.engine.model import ExpertName, Model
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ConfigError, FleetuneError, RunFolderError
from fleetune.tools.export.adapter import adapter_run, write_adapter, write_card
from fleetune.tools.export.compare import Comparison, Run, compare, onnx_run
from fleetune.tools.export.engine import Engine, batches, probe
from fleetune.tools.export.huggingface import torch_model, write_backbone
from fleetune.tools.export.int8 import Preset, preset_here, quantise
from fleetune.tools.export.network import network
from fleetune.tools.export.unpacked import Unpacked

Format = Literal["onnx", "onnx-int8", "peft"]

TOLERANCE = 1e-4
"""Largest error of an export in float32, relative to the engine's largest logit."""


@dataclass(frozen=True)
class Report:
    """What was exported.

    Attributes:
        path: The file or folder.
        bytes: Size of all its files.
        format: Its format.
        expert: What it computes.
        preset: Instruction set of an int8 file.
        probe: The export beside the engine on made-up samples.
        data: The same on test samples of the user's, if there are any.
    """

    path: Path
    bytes: int
    format: Format
    expert: ExpertName
    preset: Preset | None
    probe: Comparison
    data: Comparison | None


def export(
    file: Path,
    pack: Pack,
    out: Path,
    *,
    to: Format,
    expert: ExpertName | None = None,
    preset: Preset | None = None,
    data: Path | None = None,
    with_backbone: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Report:
    """Export a model file.

    The result appears whole or not at all, and only if it computes what the engine does.

    Args:
        file: The model file.
        pack: The pack that it was trained on.
        out: Where the file or folder goes; must not exist.
        to: ``onnx``, ``onnx-int8`` or ``peft``.
        expert: What to export; by default the mixture, or the global expert where there is no other.
        preset: Instruction set of an int8 file; this machine's by default.
        data: A data file whose test samples are compared too: what was trained on says little about new samples.
        with_backbone: Whether a PEFT folder also gets the pack's weights in Hugging Face format.
        on_step: Is told what happens next.

    Raises:
        ConfigError: The options do not go together, or the file does not hold the expert.
        ModelError: The model file cannot be used with this pack.
        DataError: The data file cannot be used.
        RunFolderError: ``out`` exists.
        FleetuneError: The export does not compute what the engine does.
    """
    if preset is not None and to != "onnx-int8":
        raise ConfigError(f"--preset: {to} has none", "leave it out, or use --format onnx-int8")
    if with_backbone and to != "peft":
        raise ConfigError(f"--with-backbone: {to} holds the backbone", "leave it out, or use --format peft")
    if out.exists():
        raise RunFolderError(f"{out} exists", "name another path with --out, or delete it first")
    on_step("reads the model")
    model = Model.read(file, pack)
    samples = None if data is None else read_dataset(data, pack, needed=("test",))
    name, chosen = model.choose(expert)
    if to == "peft" and isinstance(chosen, Mixture):
        raise ConfigError(
            "--expert: PEFT has no mixture of two experts and a gate",
            "use --expert global or --expert local, or --format onnx",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        engine, backbone = Engine(pack, chosen), Unpacked.of(pack)
        on_step(f"writes the {name if name == 'mixture' else f'{name} expert'}")
        if isinstance(chosen, Expert) and to == "peft":
            made = Path(scratch) / "adapter"
            run = _write_peft(made, pack, backbone, model, chosen, name, with_backbone=with_backbone)
        else:
            made = Path(scratch) / "model.onnx"
            made.write_bytes(network(backbone, chosen, _properties(pack, model, name)).SerializeToString())
            run = onnx_run(made)
        on_step("compares it with the device's engine")
        made_up = compare(run, engine, [probe(pack)])
        if not made_up.relative <= TOLERANCE:
            raise _wrong(f"differ from the engine's by {made_up.relative:.1e}, rounding explains {TOLERANCE:g}", out)
        if to == "onnx-int8":
            preset = preset or preset_here()
            on_step(f"quantises it for {preset}")
            quantise(made, preset)
            run = onnx_run(made)
            made_up = compare(run, engine, [probe(pack)])
            if not math.isfinite(made_up.difference):
                raise _wrong("are not finite", out)
        on_data = None
        if samples is not None:
            unseen = samples.indices("test")
            on_step(f"compares it on {len(unseen)} samples")
            on_data = compare(run, engine, batches(samples, pack, unseen))
        size = sum(path.stat().st_size for path in (made, *made.rglob("*")) if path.is_file())
        made.rename(out)
    return Report(out, size, to, name, preset, made_up, on_data)


def _wrong(how: str, out: Path) -> FleetuneError:
    return FleetuneError(
        f"the export's answers {how}; {out} was not written",
        f"report it, with the versions of Fleetune and onnxruntime ({onnxruntime.__version__})",
    )


def _write_peft(
    folder: Path,
    pack: Pack,
    backbone: Unpacked,
    model: Model,
    expert: Expert,
    name: ExpertName,
    *,
    with_backbone: bool,
) -> Run:
    folder.mkdir()
    reference = torch_model(backbone)
    base = "backbone" if with_backbone else pack.manifest.backbone.id
    write_adapter(folder, pack, backbone, expert, base=base)
    write_card(folder, pack, model.card, name, with_backbone=with_backbone)
    if with_backbone:
        write_backbone(reference, pack, folder / "backbone")
    return adapter_run(folder, reference, pack)


def _properties(pack: Pack, model: Model, expert: ExpertName) -> dict[str, str]:
    """The metadata of an ONNX file: where it comes from, and what its input must look like."""
    manifest, card = pack.manifest, model.card
    found = {
        "kit": version("fleetune"),
        "expert": expert,
        "job": card.job,
        "run": card.run,
        "pack": card.pack,
        "backbone": manifest.backbone.id,
        "backbone_sha256": card.backbone,
        "licence": manifest.backbone.licence,
    }
    if expert == "mixture":
        found["mix"] = card.mix
    if manifest.text is not None:
        found |= {"lowercase": str(manifest.text.lowercase).lower(), "max_length": str(manifest.text.max_length)}
    if manifest.image is not None:
        image = manifest.image
        found |= {"mean": ",".join(map(str, image.mean)), "std": ",".join(map(str, image.std))}
    return {f"fleetune.{name}": value for name, value in found.items()}
