"""``fleetune export``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command, add_pack


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "export",
        summary="turn a run's model file into ONNX, int8 or PEFT",
        description=(
            "Turn a run's model file into what others run. MODEL is the model.safetensors of a device\n"
            "(STATE/runs/RUN/JOB/, both experts and the gate) or of the aggregator (STATE/JOB/, the global expert).\n\n"
            "  onnx       one self-contained file for any ONNX Runtime: input_ids and attention_mask, or\n"
            "             pixel_values, to logits; a mixture also gives the gate's weights\n"
            "  onnx-int8  the same, dynamically quantised; name the instruction set of the machine that will run it\n"
            "  peft       a folder with LoRA adapters and a head for PEFT on torch; not for a mixture. Adapters were\n"
            "             trained on the quantised weights: on the original backbone the logits differ a little; on\n"
            "             the one that --with-backbone writes beside them they are equal\n\n"
            "Every export is held against the device's engine before it is moved into place. Needs the `pack` extra."
        ),
        examples=(
            "  fleetune export nano-1/runs/5f2c/fedms/model.safetensors --pack packs/minilm --out nano-1.onnx\n"
            "  fleetune export aggregator/fedms/model.safetensors --pack packs/minilm --format onnx-int8 \\\n"
            "                  --preset arm64 --data samples.jsonl --out global.onnx\n"
            "  fleetune export aggregator/fedms/model.safetensors --pack packs/minilm --format peft \\\n"
            "                  --with-backbone --out global-peft\n"
        ),
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="model.safetensors of a run")
    add_pack(parser)
    parser.add_argument("--out", metavar="PATH", type=Path, required=True, help="file or folder; must not exist")
    parser.add_argument(
        "--format", choices=("onnx", "onnx-int8", "peft"), default="onnx", help="what to write (default: %(default)s)"
    )
    parser.add_argument(
        "--expert",
        choices=("mixture", "global", "local"),
        help="what to export (default: mixture, or global where MODEL holds no other)",
    )
    parser.add_argument(
        "--preset",
        choices=("arm64", "avx2", "avx512", "avx512_vnni"),
        help="with onnx-int8: instruction set (default: this machine's)",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help="data file; says how often the export and the device's engine agree on its test samples",
    )
    parser.add_argument(
        "--with-backbone", action="store_true", help="with peft: also write the pack's weights in Hugging Face format"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.tools.require import require_pack_extra

    require_pack_extra()

    import dataclasses

    from fleetune.edge.pack.pack import Pack
    from fleetune.tools.export.write import export
    from fleetune.tools.terminal import open_console, show_steps

    console = open_console(stderr=True)
    with show_steps(console) as say:
        report = export(
            args.model,
            Pack.open(args.pack),
            args.out,
            to=args.format,
            expert=args.expert,
            preset=args.preset,
            data=args.data,
            with_backbone=args.with_backbone,
            on_step=say,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2, default=str))  # noqa: T201
        return
    what = "the mixture" if report.expert == "mixture" else f"the {report.expert} expert"
    preset = f" for {report.preset}" if report.preset else ""
    console.print(
        f"{report.path}: {what} as {report.format}{preset}, {report.bytes / 2**20:.1f} MiB\n"
        f"made-up samples: logits differ from the device engine's by {report.probe.difference:.1e} at most "
        f"({report.probe.relative:.1e} of the largest)",
        soft_wrap=True,
    )
    if report.data is not None:
        console.print(
            f"{args.data}: the same class on {report.data.agreement:.1%} of {report.data.samples} test samples, "
            f"logits differ by {report.data.difference:.1e} at most",
            soft_wrap=True,
        )
