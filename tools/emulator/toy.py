"""A pack that an emulator can train: its processor does about a hundredth of a board's arithmetic."""

from __future__ import annotations

import shutil
from pathlib import Path

from fleetune.tools.assets import fetch
from fleetune.tools.pack.write import write_pack
from fleetune.tools.staging import staged

WIDTH, BLOCKS, TOKENS = 64, 3, 16


def write_toy_pack(out: Path) -> None:
    """Write a pack of three blocks of BERT, with MiniLM's vocabulary and random weights: it learns little.

    Args:
        out: The pack's folder.

    Raises:
        AssetError: MiniLM cannot be had.
        ConfigError: The ``pack`` extra is missing.
    """
    from fleetune.tools.require import require_pack_extra

    require_pack_extra()
    import torch
    from transformers import BertConfig, BertModel

    source = fetch("minilm")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH,
        num_attention_heads=2,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=BLOCKS,
        max_position_embeddings=TOKENS,
    )
    with staged(out.parent) as scratch:
        BertModel(config).save_pretrained(scratch, safe_serialization=True)
        for name in ("vocab.txt", "tokenizer_config.json"):
            shutil.copyfile(source / name, scratch / name)
        write_pack(scratch, out, name="toy", licence="Apache-2.0", origin="random weights", max_length=TOKENS)
