"""``fleetune predict``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.tools.commands.options import add_command, add_pack, add_threads, check_threads

if TYPE_CHECKING:
    from fleetune.edge.engine.predictor import Answers, Prediction
    from fleetune.edge.pack.pack import Pack

_AT_ONCE = 16


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "predict",
        summary="classify with what a fleet has learned",
        description=(
            "Classify samples with a model file (docs/model-file.md): a device's STATE/runs/RUN/JOB/model.safetensors\n"
            "or the aggregator's STATE/JOB/model.safetensors. Reads a data file, or one text a line from standard\n"
            "input; prints one JSON object a sample. Needs only the plain install: no torch."
        ),
        examples=(
            "  echo 'a warm, funny film' | fleetune predict model.safetensors --pack packs/minilm\n"
            "  fleetune predict model.safetensors --pack packs/minilm --data samples.jsonl > answers.jsonl\n"
            "  fleetune predict model.safetensors --pack packs/vit --data samples.safetensors --expert global\n"
        ),
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model file")
    add_pack(parser)
    parser.add_argument(
        "--expert",
        choices=("mixture", "global", "local"),
        help="who answers (default: the mixture where the file holds one, else the global expert)",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help="a data file, of which the test samples are classified (default: texts on standard input)",
    )
    add_threads(parser, "answering")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import msgspec

    from fleetune.edge.engine.model import Model
    from fleetune.edge.engine.predictor import Predictor
    from fleetune.edge.methods.pfedmoe.model import SharedAnswers
    from fleetune.edge.pack.pack import Pack
    from fleetune.edge.protocol.modelfile import read_model_file

    check_threads(args.threads)
    pack = Pack.open(args.pack)
    card = read_model_file(args.model)[0]
    predictor: Answers
    if card.kind == "pfedmoe":
        name = args.expert or "mixture"
        predictor = SharedAnswers(args.model, pack, name, threads=args.threads)
    else:
        name, chosen = Model.read(args.model, pack).choose(args.expert)
        predictor = Predictor(pack, chosen, threads=args.threads)
    right = count = 0
    if args.data:
        predictions: Iterator[tuple[Prediction, Any]] = _labelled(args.data, pack, predictor, card.classes)
    else:
        predictions = _typed(predictor)
    for prediction, labels in predictions:
        for row, probabilities in enumerate(prediction.probabilities):
            answer: dict[str, Any] = {
                "label": int(probabilities.argmax()),
                "probabilities": [round(float(p), 4) for p in probabilities],
            }
            if prediction.gate is not None:
                answer["gate"] = [round(float(weight), 4) for weight in prediction.gate[row]]
            if labels is not None:
                answer["expected"] = int(labels[row])
                right += answer["label"] == answer["expected"]
            count += 1
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()
    if args.data:
        print(f"{name}: {right} of {count} right, {100 * right / count:.1f} %", file=sys.stderr)  # noqa: T201


def _typed(predictor: Answers) -> Iterator[tuple[Prediction, None]]:
    """One text a line, answered as it comes; an empty one too, so that answers keep in step with texts."""
    from fleetune.edge.protocol.errors import DataError

    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"standard input, line {number}: not UTF-8: {error}", "send text as UTF-8") from error
        yield predictor.texts([text.strip()]), None


def _labelled(data: Path, pack: Pack, predictor: Answers, classes: int) -> Iterator[tuple[Prediction, Any]]:
    """The test samples of a data file."""
    from fleetune.edge.engine.dataset import read_dataset
    from fleetune.edge.engine.prefix import split

    dataset = read_dataset(data, pack, ("test",))
    test = dataset.indices("test")
    dataset.check_labels(test, classes, "the model", "number the classes as in training")
    for some in split(test, _AT_ONCE):
        yield predictor.samples(dataset, some), dataset.labels[some]
