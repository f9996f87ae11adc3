"""One expert as a folder that the PEFT library loads: its adapters, the head beside them, and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.engine.expert import Expert
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.modelfile import Card
from fleetune.tools.export.compare import Run
from fleetune.tools.export.engine import Feeds
from fleetune.tools.export.unpacked import Unpacked

FloatArray = NDArray[np.float32]

CONFIG, WEIGHTS, HEAD, CARD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "README.md"
_STEM = "base_model.model."
"""What PEFT puts before the names of the backbone's modules."""


def write_adapter(folder: Path, pack: Pack, backbone: Unpacked, expert: Expert, *, base: str) -> None:
    """Write adapters and head.

    PEFT's A is [r, in] and its B [out, r], so both are transposed; α = r, so nothing is scaled. The head is one of
    torch, [classes, d].

    Args:
        folder: Exists, and is empty.
        pack: The pack.
        backbone: The same, dequantised.
        expert: What is written.
        base: Name or folder of the backbone, for PEFT.
    """
    modules = [_modules(backbone, index) for index in range(backbone.geometry.blocks)]
    tensors = {
        f"{_STEM}{modules[block][target]}.lora_{side}.weight": expert.tensors[f"blocks.{block}.{target}.{side}"].T
        for block in range(backbone.geometry.blocks)
        for target in pack.manifest.targets
        for side in "AB"
    }
    first = (modules[0][target].replace(".", r"\.") for target in pack.manifest.targets)
    config = {
        "peft_type": "LORA",
        "task_type": None,  # PEFT's own tasks would not let pictures through
        "base_model_name_or_path": base,
        "r": pack.manifest.rank,
        "lora_alpha": pack.manifest.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Of the modules' last names some are those of others too: output.dense, attention.output.dense.
        "target_modules": "|".join(name.replace(r"layer\.0", r"layer\.\d+") for name in first),
    }
    head = {"weight": expert.tensors["head.weight"].T, "bias": expert.tensors["head.bias"]}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name, some in ((WEIGHTS, tensors), (HEAD, head)):
        arrays = {key: np.ascontiguousarray(value) for key, value in some.items()}
        safetensors.numpy.save_file(arrays, folder / name, metadata={"format": "pt"})


def _modules(backbone: Unpacked, index: int) -> dict[str, str]:
    """Linear map of a block → its module in the Hugging Face model."""
    keys = backbone.architecture.block_keys(index)
    return {name.removesuffix(".weight"): key.removesuffix(".weight") for key, name in keys.items()}


def adapter_run(folder: Path, model: Any, pack: Pack) -> Run:
    """The files of a folder on a torch backbone: each ``B A α / r`` is added to the weight that it names.

    This is what PEFT's ``merge_and_unload`` does; ``model`` is changed.
    """
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    found, head = load_file(folder / WEIGHTS), load_file(folder / HEAD)
    with torch.no_grad():
        for name, a in found.items():
            stem, side, _ = name.rsplit(".", 2)
            if side == "lora_A":
                update = found[f"{stem}.lora_B.weight"] @ a * (config["lora_alpha"] / config["r"])
                model.get_submodule(stem.removeprefix(_STEM)).weight += update

    def run(feeds: Feeds) -> dict[str, FloatArray]:
        with torch.no_grad():
            out = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).last_hidden_state
            if pack.manifest.text is not None:
                mask = torch.from_numpy(feeds["attention_mask"])[..., None].float()
                features = (out * mask).sum(1) / mask.sum(1)
            else:
                features = out[:, 0]
            logits: FloatArray = torch.nn.functional.linear(features, head["weight"], head["bias"]).numpy()
        return {"logits": logits}

    return run


def write_card(folder: Path, pack: Pack, card: Card, expert: str, *, with_backbone: bool) -> None:
    """Write the model card: what the folder is, and how to use it.

    Args:
        folder: The folder.
        pack: The pack.
        card: The card of the model file.
        expert: Which expert it is.
        with_backbone: Whether the folder also holds the weights that the adapters were trained on.
    """
    manifest = pack.manifest
    text, image, origin = manifest.text, manifest.image, manifest.backbone
    if text is not None:
        use = _TEXT.format(length=text.max_length)
    else:
        assert image is not None
        use = _PICTURES.format(size=image.size, mean=image.mean, std=image.std)
    base = "backbone" if with_backbone else f"path/to/{origin.id}"
    (folder / CARD).write_text(
        _CARD.format(
            backbone=origin,
            expert=expert,
            card=card,
            targets=", ".join(card.targets),
            weights=_SAME if with_backbone else _OTHER,
            base=json.dumps(base),
            use=use,
        ),
        encoding="utf-8",
    )


_CARD = """\
# {backbone.id}: the {expert} expert of the job {card.job}

LoRA adapters and a head of {card.classes} classes, trained with Fleetune.

| | |
|---|---|
| backbone | {backbone.id}, {backbone.architecture}, `model.safetensors` with the SHA-256 `{card.backbone}` |
| its licence | {backbone.licence} |
| pack | SHA-256 `{card.pack}` |
| run | {card.run} |
| adapters | rank {card.rank} on {targets} of {card.blocks} blocks |

{weights}

In this folder, with torch, transformers and peft:

```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

base = {base}
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), ".").eval()
head = load_file("head.safetensors")
{use}logits = torch.nn.functional.linear(features, head["weight"], head["bias"])
```
"""

_SAME = "`backbone/` holds the weights that the adapters were trained on: the pack's, in float32."

_OTHER = """\
The adapters were trained on the pack's quantised weights; on the original ones the logits differ a little. With
`--with-backbone`, `fleetune export` writes the pack's weights as a Hugging Face folder too."""

_TEXT = """
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer(["A film to see twice."], padding=True, truncation=True, max_length={length}, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"][..., None]
features = (hidden * mask).sum(1) / mask.sum(1)
"""

_PICTURES = """
pictures = torch.rand(1, 3, {size}, {size})  # yours, from 0 to 1
mean, std = (torch.tensor(values)[:, None, None] for values in ({mean}, {std}))
with torch.no_grad():
    features = model(pixel_values=(pictures - mean) / std).last_hidden_state[:, 0]
"""
