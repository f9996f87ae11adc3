"""A pack's backbone in torch: the Hugging Face model itself, which a pack's graphs are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fleetune.edge.pack.pack import Pack
from fleetune.tools.pack.architectures import ARCHITECTURES
from fleetune.tools.pack.checkpoint import is_matrix


def torch_backbone(pack: Pack, source: Path) -> Any:
    """The Hugging Face model with the pack's dequantised weights."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(source, local_files_only=True, attn_implementation="eager")
    model = AutoModel.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    original = AutoModel.from_pretrained(source, local_files_only=True, attn_implementation="eager").state_dict()
    architecture = ARCHITECTURES[pack.manifest.backbone.architecture]
    weights = pack.weights()
    for index in range(pack.manifest.blocks):
        packed = weights.block(index)
        for key, name in architecture.block_keys(index).items():
            original[key] = torch.from_numpy(np.array(packed[name]))
    if pack.manifest.text:
        rows = np.arange(original["embeddings.word_embeddings.weight"].shape[0])
        original["embeddings.word_embeddings.weight"] = torch.from_numpy(weights.rows("tokens.table", rows))
    model.load_state_dict(original, strict=True)
    return model


def torch_block(layer: Any, h: Any, mask: Any, adapters: dict[str, Any], pack: Pack) -> Any:
    """One Hugging Face layer with LoRA added through forward hooks on its linear maps."""
    architecture = pack.manifest.backbone.architecture
    stem = "encoder.layer.0."
    modules = {
        name.removesuffix(".weight"): key.removeprefix(stem).removesuffix(".weight")
        for key, name in ARCHITECTURES[architecture].block_keys(0).items()
        if is_matrix(name)
    }
    handles = []
    for target in pack.manifest.targets:
        a, b = adapters[f"{target}.A"], adapters[f"{target}.B"]

        def add(_: Any, inputs: tuple[Any, ...], output: Any, a: Any = a, b: Any = b) -> Any:
            return output + inputs[0] @ a @ b

        handles.append(layer.get_submodule(modules[target]).register_forward_hook(add))
    out = layer(h, (mask[:, None] - 1) * 1e9) if pack.manifest.text else layer(h)
    for handle in handles:
        handle.remove()
    return out[0] if isinstance(out, tuple) else out


def torch_pool(model: Any, h: Any, mask: Any, pack: Pack) -> Any:
    """Features [b, d] of what the last block puts out."""
    if pack.manifest.text:
        weights = mask[:, 0, :, None]
        return (h * weights).sum(1) / weights.sum(1)
    return model.layernorm(h)[:, 0]
