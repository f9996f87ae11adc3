"""A pack's backbone as a Hugging Face model, with the very weights that the device computes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.pack.pack import Pack
from fleetune.tools.export.unpacked import Unpacked

FloatArray = NDArray[np.float32]


def torch_model(backbone: Unpacked) -> Any:
    """The backbone in torch, with dequantised weights.

    What the pack has folded into its positions (token types; a picture's class token and the patches' bias) is zero.
    """
    import torch
    from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

    geometry, outer = backbone.geometry, backbone.outer
    common = {
        "hidden_size": geometry.width,
        "num_hidden_layers": geometry.blocks,
        "num_attention_heads": geometry.heads,
        "layer_norm_eps": geometry.epsilon,
    }
    zeros = np.zeros((1, geometry.width), dtype=np.float32)
    image = backbone.manifest.image
    if image is None:
        config = BertConfig(
            **common,
            vocab_size=len(outer["tokens.table"]),
            intermediate_size=geometry.hidden,
            max_position_embeddings=geometry.length,
        )
        model = BertModel(config, add_pooling_layer=False)
        folded = {"types.table": np.repeat(zeros, 2, axis=0)}
    else:
        config = Dinov2Config(
            **common,
            mlp_ratio=geometry.hidden // geometry.width,
            image_size=image.size,
            patch_size=image.patch,
        )
        model = Dinov2Model(config)
        folded = {
            "class_token": zeros[None],
            "positions.table": outer["positions.table"][None],
            "patch.weight": outer["patch.weight"].reshape(geometry.width, 3, image.patch, image.patch),
            "patch.bias": zeros[0],
        }
    state = {key: (outer | folded)[name] for key, name in backbone.architecture.outer_keys().items()}
    if image is not None:
        state["embeddings.mask_token"] = zeros
    for index, block in enumerate(backbone.blocks):
        state |= {key: block[name] for key, name in backbone.architecture.block_keys(index).items()}
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()}, strict=True)
    return model.eval().requires_grad_(False)


def write_backbone(model: Any, pack: Pack, folder: Path) -> None:
    """Write a model of :func:`torch_model` in Hugging Face format, with the tokeniser of a text pack."""
    model.save_pretrained(folder, safe_serialization=True)
    text = pack.manifest.text
    if text is not None:
        shutil.copyfile(pack.path / text.vocabulary, folder / "vocab.txt")
        settings = {"do_lower_case": text.lowercase, "model_max_length": text.max_length}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
