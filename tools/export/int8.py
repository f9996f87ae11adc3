"""Dynamic quantisation to int8 with optimum: weights as int8, activations quantised while the model runs."""

from __future__ import annotations

import logging
import platform
import tempfile
from pathlib import Path
from typing import Literal

import onnx
from onnx import helper

Preset = Literal["arm64", "avx2", "avx512", "avx512_vnni"]
"""Instruction set that a quantised file is made for."""

_FLAGS: dict[str, Preset] = {"avx512_vnni": "avx512_vnni", "avx512f": "avx512"}
"""Flag of ``/proc/cpuinfo`` → preset, the best first."""


def preset_here() -> Preset:
    """The preset of this machine."""
    if platform.machine() in ("aarch64", "arm64"):
        return "arm64"
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="ascii", errors="replace").split() if info.is_file() else []
    return next((preset for flag, preset in _FLAGS.items() if flag in flags), "avx2")


def quantise(file: Path, preset: Preset) -> None:
    """Quantise the matrices of the blocks and the token table of an exported ONNX file, in place.

    What stands around the blocks stays in float32: the patches' matrix, head and gate, which are small.

    Args:
        file: As :func:`~fleetune.tools.export.network.network` builds it.
        preset: The instruction set.
    """
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig
    from transformers import PretrainedConfig

    model = onnx.load(file)
    constants = {constant.name for constant in model.graph.initializer}
    place = {"MatMul": 1, "Gather": 0}  # which input is the weight
    nodes = [n.name for n in model.graph.node if n.op_type in place and n.input[place[n.op_type]] in constants]
    # Without VNNI two products of 8 bits are summed in 16, which overflows unless weights keep to 7 bits.
    narrow = {"reduce_range": True} if preset == "avx512" else {}
    config = getattr(AutoQuantizationConfig, preset)(
        is_static=False, per_channel=True, nodes_to_quantize=nodes, operators_to_quantize=list(place), **narrow
    )
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        logging.disable(logging.INFO)  # a line for every matrix, by the root logger
        try:
            ORTQuantizer(file, config=PretrainedConfig()).quantize(config, save_dir=scratch, file_suffix=None)
        finally:
            logging.disable(logging.NOTSET)
        made = onnx.load(next(Path(scratch).glob("*.onnx")))
    properties = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(made, properties | {"fleetune.preset": preset})
    file.write_bytes(made.SerializeToString())
