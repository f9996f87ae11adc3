"""What all tests share: backbones, packs and data, one that people use and two that are small; fleets with keys."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import safetensors.numpy

from fleetune.edge.pack.manifest import FILE, WEIGHTS_FILE
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.files import file_sha256
from fleetune.tools.assets import fetch
from support.guarded import GuardedBroker, GuardedFleet, SoftToken, guarded_fleet, make_soft_token

PIECES = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = [
    *("the", "an", "and", "not", "is", "was", "film", "plot", "cast", "very", "quite", "too"),
    *("good", "fine", "great", "warm", "bad", "poor", "dull", "cold"),
]
VOCABULARY = (
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,!?'-"] + [*PIECES] + [f"##{piece}" for piece in PIECES] + WORDS
)
MAX_LENGTH = 24

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk takes longer than a moment, so all that comes goes to disk."""
    monkeypatch.setattr(chunks, "_QUICK", -1.0)


LONGEST = (
    "test_whole_boards.py",
    "test_demo.py",
    "test_bench.py",
    "test_runtimes.py",
    "test_agent.py",
    "test_targets.py",
    "test_limits.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several workers share the files, those that take longest come first, or one worker ends alone."""
    if hasattr(config, "workerinput"):
        place = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_report_header() -> str:
    """Which runtime these tests are about."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} from {Path(onnxruntime.__file__).parents[1]}"


def _need_pack_extra() -> None:
    for module in ("torch", "transformers", "bitsandbytes", "onnx"):
        pytest.importorskip(module, reason=f"needs {module}: pip install 'fleetune[pack]'")


def _perturb(model: Any) -> None:
    """Move every parameter away from where it was initialised: no scale is one, no bias is zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.ndim > 1 else 0.3))
            if "lambda1" in name:
                parameter.sub_(0.5)


def _pack(source: Path, out: Path, name: str, **options: Any) -> Pack:
    from fleetune.tools.pack.write import write_pack

    targets = ("query", "value", "fc1")
    return write_pack(
        source,
        out,
        name=name,
        licence="none",
        origin="random",
        rank=4,
        targets=targets,
        max_length=MAX_LENGTH,
        **options,
    )


@pytest.fixture(scope="session")
def minilm() -> Path:
    """MiniLM's folder in Hugging Face format."""
    return fetch("minilm")


@pytest.fixture(scope="session")
def minilm_pack(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """MiniLM as `fleetune pack minilm` packs it."""
    _need_pack_extra()
    from fleetune.tools.pack.write import write_pack

    out = tmp_path_factory.mktemp("minilm") / "pack"
    return write_pack(minilm, out, name="minilm", licence="apache-2.0", origin="test")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three blocks in Hugging Face format."""
    _need_pack_extra()
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=128,
        num_hidden_layers=3,
        max_position_embeddings=32,
    )
    model = BertModel(config)
    _perturb(model)
    folder = tmp_path_factory.mktemp("tiny-bert")
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    return folder


@pytest.fixture(scope="session")
def tiny_bert_pack(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """The random BERT as a pack, with adapters on three of its linear maps."""
    return _pack(tiny_bert, tmp_path_factory.mktemp("tiny-bert-pack") / "pack", "tiny-bert")


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DINOv2 of three blocks in Hugging Face format, for pictures of 28 pixels."""
    _need_pack_extra()
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=3, mlp_ratio=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config)
    _perturb(model)
    folder = tmp_path_factory.mktemp("tiny-dinov2")
    model.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_dinov2_pack(tiny_dinov2: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """The random DINOv2 as a pack, with adapters on three of its linear maps."""
    return _pack(tiny_dinov2, tmp_path_factory.mktemp("tiny-dinov2-pack") / "pack", "tiny-dinov2")


@pytest.fixture(scope="session")
def sharing_packs(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pack, Pack]:
    """The random BERT and its first two blocks, in another format, each with the extractor that they share."""
    folder = tmp_path_factory.mktemp("sharing")
    return (
        _pack(tiny_bert, folder / "large", "tiny-bert", extractor=True),
        _pack(tiny_bert, folder / "small", "tiny-bert-2", extractor=True, blocks=2, weights="int8"),
    )


@pytest.fixture(scope="session")
def sharing_dinov2_pack(tiny_dinov2: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """The random DINOv2 with an extractor."""
    return _pack(tiny_dinov2, tmp_path_factory.mktemp("sharing-dinov2") / "pack", "tiny-dinov2", extractor=True)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device's data file: 24 short texts of two classes, of several lengths, in the tiny vocabulary."""
    kinds = (["bad", "poor", "dull", "cold"], ["good", "fine", "great", "warm"])
    subjects, fillers = ["film", "plot", "cast"], ["very", "quite", "too", "not"]
    rows = []
    for i, split in enumerate(["train"] * 12 + ["val"] * 6 + ["test"] * 6):
        label = i % 2
        middle = " ".join(fillers[(i + j) % 4] for j in range(i % 5))
        text = f"the {subjects[i % 3]} is {middle} {kinds[label][i // 2 % 4]}" + "!" * (i % 3)
        rows.append(json.dumps({"text": text, "label": label, "split": split}))
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def picture_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device's data file: 24 grey pictures of 28 pixels, of two classes: one is brighter on its left."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 120, (24, 28, 28)), np.arange(24) % 2
    for image, label in zip(images, labels, strict=True):
        image[:, slice(0, 14) if label else slice(14, 28)] += 100
    path = tmp_path_factory.mktemp("pictures") / "pictures.safetensors"
    splits = np.repeat(np.array([0, 1, 2], np.uint8), (12, 6, 6))
    safetensors.numpy.save_file(
        {"images": images.astype(np.uint8), "labels": labels.astype(np.int64), "split": splits}, path
    )
    return path


@pytest.fixture(scope="session")
def poisoned_pack(tiny_bert_pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """The random BERT, in which the embedding of the word "cold" is not a number: line 7 of ``train`` has it."""
    folder = tmp_path_factory.mktemp("poisoned") / "pack"
    shutil.copytree(tiny_bert_pack.path, folder)
    weights = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    weights["tokens.table.absmax"][VOCABULARY.index("cold")] = np.nan
    safetensors.numpy.save_file(weights, folder / WEIGHTS_FILE)
    manifest = json.loads((folder / FILE).read_text())
    manifest["files"][WEIGHTS_FILE]["sha256"] = file_sha256(folder / WEIGHTS_FILE)
    (folder / FILE).write_text(json.dumps(manifest))
    return Pack.open(folder)


class TorchReference:
    """The Hugging Face model with a pack's dequantised weights, and LoRA added by forward hooks."""

    def __init__(self, pack: Pack, source: Path) -> None:
        import torch
        from transformers import AutoModel

        from fleetune.tools.pack.architectures import ARCHITECTURES

        self.text = pack.manifest.text is not None
        self._keys = ARCHITECTURES[pack.manifest.backbone.architecture].block_keys
        self.model = AutoModel.from_pretrained(source, local_files_only=True, attn_implementation="eager")
        self.model.eval().requires_grad_(False)
        state, weights = self.model.state_dict(), pack.weights()
        for index in range(pack.manifest.blocks):
            packed = weights.block(index)
            state.update({key: torch.from_numpy(np.array(packed[name])) for key, name in self._keys(index).items()})
        if self.text:
            rows = np.arange(len(state["embeddings.word_embeddings.weight"]))
            state["embeddings.word_embeddings.weight"] = torch.from_numpy(weights.rows("tokens.table", rows))
        self.model.load_state_dict(state, strict=True)

    def block(self, index: int, h: Any, mask: Any, adapters: Mapping[str, Any]) -> Any:
        """Hidden state after one block; ``adapters`` are named as the graphs name them (``query.A``)."""
        modules = {name: key.removesuffix(".weight") for key, name in self._keys(index).items()}
        handles = []
        for target in {name.partition(".")[0] for name in adapters}:
            a, b = adapters[f"{target}.A"], adapters[f"{target}.B"]

            def add(_: Any, inputs: tuple[Any, ...], output: Any, a: Any = a, b: Any = b) -> Any:
                return output + inputs[0] @ a @ b

            handles.append(self.model.get_submodule(modules[f"{target}.weight"]).register_forward_hook(add))
        layer = self.model.encoder.layer[index]
        out = layer(h, (mask[:, None] - 1) * 1e9) if self.text else layer(h)
        for handle in handles:
            handle.remove()
        return out[0] if isinstance(out, tuple) else out

    def features(self, h: Any, mask: Any, blocks: range, adapters: Mapping[str, Any]) -> Any:
        """Features after some blocks; ``adapters`` have their full names (``blocks.2.query.A``)."""
        for index in blocks:
            stem = f"blocks.{index}."
            own = {name.removeprefix(stem): tensor for name, tensor in adapters.items() if name.startswith(stem)}
            h = self.block(index, h, mask, own)
        if not self.text:
            return self.model.layernorm(h)[:, 0]
        weights = mask[:, 0, :, None]
        return (h * weights).sum(1) / weights.sum(1)


@pytest.fixture(scope="session")
def bert_reference(tiny_bert_pack: Pack, tiny_bert: Path) -> TorchReference:
    """The random BERT in torch."""
    return TorchReference(tiny_bert_pack, tiny_bert)


@pytest.fixture(scope="session")
def dinov2_reference(tiny_dinov2_pack: Pack, tiny_dinov2: Path) -> TorchReference:
    """The random DINOv2 in torch."""
    return TorchReference(tiny_dinov2_pack, tiny_dinov2)


# --- fleets with keys ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedFleet]:
    """A fleet with the devices ``nano-1`` and ``nano-2``, for tests that change nothing of it."""
    with guarded_fleet(tmp_path_factory.mktemp("lab"), "nano-1", "nano-2") as fleet:
        yield fleet


@pytest.fixture(scope="session")
def lab_broker(lab: GuardedFleet) -> Iterator[GuardedBroker]:
    """Its broker, which runs; what tests leave there, other tests find."""
    with lab.broker() as broker:
        yield broker


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[GuardedFleet]:
    """A fleet of a test's own, without devices."""
    with guarded_fleet(tmp_path / "fleet") as fleet:
        yield fleet


@pytest.fixture(scope="session")
def soft_token(tmp_path_factory: pytest.TempPathFactory) -> SoftToken:
    """A hardware token, in software."""
    return make_soft_token(tmp_path_factory.mktemp("softhsm"))
