"""``fleetune pack``: a pack computes what torch does; what cannot be packed is refused and leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.pack.manifest import FILE, WEIGHTS_FILE, File
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import (
    ConfigError,
    FleetuneError,
    PackError,
    RunFolderError,
    UnsupportedBackboneError,
)
from fleetune.edge.protocol.files import file_sha256

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fleetune[pack]'")
torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'fleetune[pack]'")
from safetensors.torch import load_file, save_file  # noqa: E402

from fleetune.tools.pack.architectures import LINEARS  # noqa: E402
from fleetune.tools.pack.check import check_pack  # noqa: E402
from fleetune.tools.pack.write import write_pack  # noqa: E402

Edit = Callable[[Path], object]


def write(source: Path, out: Path, **options: Any) -> Pack:
    return write_pack(source, out, name="test", licence="none", origin="test", **options)


def worst(checks: list[Any]) -> str:
    return ", ".join(f"{check.what}: {check.error:.1e}" for check in checks if not check.passed)


def copy(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# --- a pack computes what torch computes --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_dinov2"])
def test_the_check_passes(kind: str, request: pytest.FixtureRequest) -> None:
    checks = check_pack(request.getfixturevalue(f"{kind}_pack"), request.getfixturevalue(kind))
    names = {check.what for check in checks}
    assert {
        "embedding",
        "features",
        "features: grad.h",
        "block 0: forward",
        "block 2: grad.h",
    } <= names
    assert not worst(checks)


@pytest.mark.parametrize("kind", ["large", "small", "pictures"])
def test_the_check_passes_for_packs_that_share_an_extractor(kind: str, request: pytest.FixtureRequest) -> None:
    pack, source = sharing(kind, request)
    checks = check_pack(pack, source)
    depth = pack.manifest.blocks
    assert {
        "extractor: representation",
        "gate: gradients",
        f"mixture of depth {depth}, fused: gradients of the private model",
        f"mixture of depth {depth}, block by block: gradients of the extractor",
    } <= {check.what for check in checks}
    assert not worst(checks)


def sharing(kind: str, request: pytest.FixtureRequest) -> tuple[Pack, Path]:
    """A pack with an extractor, and the backbone that it was made from."""
    if kind == "pictures":
        return request.getfixturevalue("sharing_dinov2_pack"), request.getfixturevalue("tiny_dinov2")
    packs: tuple[Pack, Pack] = request.getfixturevalue("sharing_packs")
    return packs[kind == "small"], request.getfixturevalue("tiny_bert")


def test_the_check_passes_for_minilm(minilm_pack: Pack, minilm: Path) -> None:
    assert not worst(check_pack(minilm_pack, minilm))


def test_the_check_passes_with_an_adapter_on_every_linear_map(tiny_dinov2: Path, tmp_path: Path) -> None:
    pack = write(tiny_dinov2, tmp_path / "pack", targets=LINEARS, rank=1)
    assert set(pack.manifest.targets) == set(LINEARS)
    assert not worst(check_pack(pack, tiny_dinov2))


def test_the_check_passes_for_pictures_of_another_size(tiny_dinov2: Path, tmp_path: Path) -> None:
    pack = write(tiny_dinov2, tmp_path / "pack", image_size=56)
    assert pack.manifest.image is not None
    assert pack.manifest.image.size == 56
    assert not worst(check_pack(pack, tiny_dinov2))


@pytest.mark.parametrize(("kind", "batch", "length"), [
    ("bert", 1, 1), ("bert", 2, 7), ("bert", 5, 24), ("dinov2", 1, 5), ("dinov2", 4, 5),
])  # fmt: skip
def test_gradients_equal_torch_for_any_batch_and_length(
    kind: str, batch: int, length: int, request: pytest.FixtureRequest
) -> None:
    pack: Pack = request.getfixturevalue(f"tiny_{kind}_pack")
    reference = request.getfixturevalue(f"{kind}_reference")
    rng = np.random.default_rng(batch)
    expert = Expert.initial(Layout.of(pack.manifest, classes=2), seed=0)
    expert.vector[:] = rng.normal(0, 0.1, expert.vector.shape)
    hidden, upstream = (rng.standard_normal((batch, length, 64), dtype=np.float32) for _ in range(2))
    mask = np.ones((batch, 1, length), dtype=np.float32)
    if kind == "bert":
        mask[0, 0, max(1, length // 3) :] = 0
    adapters = expert.adapters(1)
    backbone = Backbone(pack, threads=1)
    found = backbone.backward(1, hidden, mask, adapters, upstream)
    h = torch.tensor(hidden, requires_grad=True)
    symbols = {name: torch.tensor(array, requires_grad=True) for name, array in adapters.items()}
    y = reference.block(1, h, torch.tensor(mask), symbols)
    wanted = torch.autograd.grad(y, [h, *symbols.values()], torch.tensor(upstream))
    for name, grad in zip(["h", *symbols], wanted, strict=True):
        scale = max(float(grad.abs().max()), 1e-3)  # one token attends to itself alone: exact zeros for the query
        assert np.abs(found[f"grad.{name}"] - grad.numpy()).max() / scale < 1e-5, name


# --- a check that must fail ---------------------------------------------------------------------------------


def alter(pack: Pack, folder: Path, tensor: str, change: Callable[[np.ndarray[Any, Any]], None]) -> Pack:
    """A copy of a pack with one tensor changed and a manifest that agrees with it."""
    import safetensors.numpy

    shutil.copytree(pack.path, folder)
    file = folder / WEIGHTS_FILE
    tensors = safetensors.numpy.load_file(file)
    change(tensors[tensor])
    safetensors.numpy.save_file(tensors, file)
    files = pack.manifest.files | {WEIGHTS_FILE: File(bytes=file.stat().st_size, sha256=file_sha256(file))}
    (folder / FILE).write_bytes(msgspec.json.encode(msgspec.structs.replace(pack.manifest, files=files)))
    return Pack.open(folder)


def check_fails(pack: Pack, source: Path) -> bool:
    try:
        return bool(worst(check_pack(pack, source)))
    except FleetuneError:
        return True


def flip_one_code(array: np.ndarray[Any, Any]) -> None:
    array[3, 5] ^= 0x0F


def shift_one_value(array: np.ndarray[Any, Any]) -> None:
    array.reshape(-1)[7] += 0.25


@pytest.mark.parametrize(("tensor", "change"), [
    ("blocks.1.fc1.weight.codes", flip_one_code),
    ("blocks.1.fc1.weight.absmax", shift_one_value),
    ("blocks.1.fc1.bias", shift_one_value),
    ("patch.weight", shift_one_value),
    ("final_norm.weight", shift_one_value),
    ("positions.table", shift_one_value),
])  # fmt: skip
def test_the_check_detects_one_altered_weight(
    tensor: str,
    change: Callable[[np.ndarray[Any, Any]], None],
    tiny_dinov2_pack: Pack,
    tiny_dinov2: Path,
    tmp_path: Path,
) -> None:
    assert check_fails(alter(tiny_dinov2_pack, tmp_path / "pack", tensor, change), tiny_dinov2)


@pytest.mark.parametrize(("graph", "says"), [
    ("extractor", {"extractor: representation"}),
    ("gate_train", {"gate: weights"}),
    ("gate_backward", {"gate: gradients"}),
    ("mixture_2", {"mixture of depth 2, fused: gradients of the extractor"}),
    ("mixture_0", {f"mixture of depth {depth}, block by block: gradients of the extractor" for depth in (1, 2)}),
])  # fmt: skip
def test_the_check_detects_an_altered_graph_of_the_mixture(
    graph: str, says: set[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pack, source = sharing("small", request)
    shutil.copytree(pack.path, tmp_path / "pack")
    file = tmp_path / "pack" / f"{graph}.onnx"
    model = onnx.load(file)
    for node in model.graph.node:
        node.op_type = {"Relu": "Tanh", "Sigmoid": "Tanh", "Sqrt": "Abs"}.get(node.op_type, node.op_type)
    onnx.save(model, file)
    files = pack.manifest.files | {file.name: File(bytes=file.stat().st_size, sha256=file_sha256(file))}
    (tmp_path / "pack" / FILE).write_bytes(msgspec.json.encode(msgspec.structs.replace(pack.manifest, files=files)))
    failed = {check.what for check in check_pack(Pack.open(tmp_path / "pack"), source) if not check.passed}
    assert failed >= says
    assert all(what.startswith(("mixture", "gate", "extractor")) for what in failed)


@pytest.mark.parametrize("tensor", ["tokens.table.codes", "embed_norm.bias"])
def test_the_check_detects_an_altered_embedding(
    tensor: str, tiny_bert_pack: Pack, tiny_bert: Path, tmp_path: Path
) -> None:
    change = flip_one_code if tensor.endswith("codes") else shift_one_value
    assert check_fails(alter(tiny_bert_pack, tmp_path / "pack", tensor, change), tiny_bert)


def test_the_check_detects_another_backbone(tiny_bert_pack: Pack, tiny_bert: Path, tmp_path: Path) -> None:
    other = copy(tiny_bert, tmp_path / "other")
    edit_tensors(other, lambda tensors: tensors["encoder.layer.0.output.dense.bias"].add_(1))
    assert check_fails(tiny_bert_pack, other)


# --- the same bytes every time ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_dinov2"])
def test_writing_twice_gives_the_same_bytes(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(kind)
    first, second = (write(source, tmp_path / name, max_length=24) for name in ("first", "second"))
    names = sorted(file.name for file in first.path.iterdir())
    assert names == sorted(file.name for file in second.path.iterdir())
    for name in names:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    assert first.sha256 == second.sha256


# --- backbones that cannot be packed ------------------------------------------------------------------------


def drop(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("encoder.layer.1.output.dense.weight"))


def leave_over(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"classifier.weight": torch.zeros(2, 64)}))


def misshape(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"encoder.layer.2.attention.self.key.weight": torch.zeros(64, 32)}))


def misshape_around_the_blocks(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"embeddings.LayerNorm.weight": torch.zeros(32)}))


def misshape_positions(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"embeddings.position_embeddings.weight": torch.zeros(16, 64)}))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def shrink_vocabulary_of_the_weights(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"embeddings.word_embeddings.weight": torch.ones(50, 64)}))


BROKEN: dict[str, tuple[Edit, str]] = {
    "a missing tensor": (drop, "model.safetensors.*encoder.layer.1.output.dense.weight"),
    "a tensor too many": (leave_over, "model.safetensors.*classifier.weight"),
    "a wrong shape": (
        misshape, r"model.safetensors: block 2: key.weight has shape \(64, 32\), expected \(64, 64\)"
    ),
    "a wrong shape around the blocks": (misshape_around_the_blocks, "model.safetensors.*embed"),
    "too few positions": (misshape_positions, "model.safetensors.*position"),
    "a vocabulary larger than its table": (
        shrink_vocabulary_of_the_weights, "vocab.txt|word_embeddings|tokens.table"
    ),
    "truncated weights": (truncate, "model.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no vocabulary": (lambda folder: (folder / "vocab.txt").unlink(), "vocab.txt"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a configuration that is not JSON": (
        lambda folder: (folder / "config.json").write_text("{"), "config.json"
    ),
    "a configuration that is a list": (
        lambda folder: (folder / "config.json").write_text("[]"), "config.json"
    ),
    "an unknown architecture": (
        lambda folder: edit_config(folder, model_type="t5"), "config.json: field model_type.*'t5'"
    ),
    "another activation": (
        lambda folder: edit_config(folder, hidden_act="relu"), "config.json: field hidden_act.*'relu'"
    ),
    "a configuration without a size": (
        lambda folder: edit_config(folder, hidden_size=None), "config.json.*hidden_size"
    ),
    "a size that is not a number": (
        lambda folder: edit_config(folder, num_attention_heads="two"), "config.json.*num_attention_heads"
    ),
    "a configuration nested without end": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is not JSON"
    ),
    "a configuration that is too large": (
        lambda folder: (folder / "config.json").write_text(" " * (1 << 21)), "config.json.*more than 1048576 bytes"
    ),
    "more blocks than any backbone has": (
        lambda folder: edit_config(folder, num_hidden_layers=10**12), "config.json: field num_hidden_layers"
    ),
    "no epsilon": (
        lambda folder: edit_config(folder, layer_norm_eps=None), "config.json: field layer_norm_eps.*None"
    ),
    "an epsilon that is not a number": (
        lambda folder: edit_config(folder, layer_norm_eps="small"), "config.json: field layer_norm_eps.*'small'"
    ),
    "a vocabulary that is not UTF-8": (
        lambda folder: (folder / "vocab.txt").write_bytes(b"\xff\n"), "vocab.txt cannot be read"
    ),
    "tokeniser settings that are not JSON": (
        lambda folder: (folder / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_backbone_that_does_not_fit_is_refused_and_leaves_nothing(what: str, tiny_bert: Path, tmp_path: Path) -> None:
    edit, message = BROKEN[what]
    source = copy(tiny_bert, tmp_path / "source")
    edit(source)
    with pytest.raises(UnsupportedBackboneError, match=message):
        write(source, tmp_path / "out" / "pack", max_length=24)
    assert not list(tmp_path.glob("out/*"))
    assert not list(tmp_path.glob("out/.*"))


@pytest.mark.parametrize("kind", ["int8", "fp32"])
def test_other_weights_pass_the_check_and_hold_what_they_promise(kind: Any, tiny_bert: Path, tmp_path: Path) -> None:
    pack = write(tiny_bert, tmp_path / "pack", max_length=24, weights=kind)
    assert not worst(check_pack(pack, tiny_bert))
    original = load_file(tiny_bert / "model.safetensors")
    for key, found in (
        ("encoder.layer.1.output.dense.weight", pack.weights().block(1)["fc2.weight"]),
        ("embeddings.word_embeddings.weight", pack.weights().rows("tokens.table", np.arange(5))),
    ):
        wanted = original[key].numpy()[: len(found)]
        blocks = np.abs(wanted).reshape(-1, 64).max(axis=1, keepdims=True)
        allowed = blocks / 254 * 1.0001 if kind == "int8" else 0 * blocks  # half a step
        assert (np.abs(found - wanted).reshape(-1, 64) <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_packed_as_their_values(dtype: Any, tiny_bert: Path, tmp_path: Path) -> None:
    source = copy(tiny_bert, tmp_path / "source")
    edit_tensors(source, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    bias = load_file(source / "model.safetensors")["encoder.layer.0.output.dense.bias"].float().numpy()
    pack = write(source, tmp_path / "pack", max_length=24)
    np.testing.assert_array_equal(pack.weights().block(0)["fc2.bias"], bias)


def test_a_width_that_nf4_blocks_do_not_divide_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=8, hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=1)
    BertModel(config).save_pretrained(tmp_path / "source", safe_serialization=True)
    (tmp_path / "source" / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    for kind in ("nf4", "int8"):
        with pytest.raises(UnsupportedBackboneError, match=r"blocks\.0\.query\.weight: a matrix with 32 columns"):
            write(tmp_path / "source", tmp_path / "pack", max_length=64, weights=kind)
    assert write(tmp_path / "source", tmp_path / "pack", max_length=64, weights="fp32").manifest.width == 32


def test_a_vision_backbone_for_one_channel_is_refused(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        num_channels=1,
    )
    Dinov2Model(config).save_pretrained(tmp_path / "source", safe_serialization=True)
    with pytest.raises(UnsupportedBackboneError, match=r"num_channels|patch"):
        write(tmp_path / "source", tmp_path / "pack")


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"targets": ["query", "pooler"]}, "--targets: pooler"),
    ({"targets": []}, "--targets: none"),
    ({"rank": 0}, "--rank: 0"),
    ({"rank": 65}, "--rank: 65"),
    ({"max_length": 2}, "--max-length: 2"),
    ({"max_length": 33}, "--max-length: 33"),
])  # fmt: skip
def test_an_option_out_of_range_is_named_and_nothing_is_written(
    options: dict[str, Any], message: str, tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        write(tiny_bert, tmp_path / "pack", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [15, 0, -14])
def test_an_image_size_that_no_patch_divides_is_refused(size: int, tiny_dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(
        (ConfigError, UnsupportedBackboneError), match=rf"image size of {size}\D|--image-size: {size}\D"
    ):
        write(tiny_dinov2, tmp_path / "pack", image_size=size)
    assert not list(tmp_path.iterdir())


def test_an_image_size_for_a_text_backbone_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, UnsupportedBackboneError), match=r"image size of 28\D|--image-size: 28\D"):
        write(tiny_bert, tmp_path / "pack", image_size=28)


def test_a_folder_that_exists_is_not_touched(tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    out.mkdir()
    (out / "mine").write_text("keep me")
    with pytest.raises(RunFolderError, match=str(out)):
        write(tiny_bert, out)
    assert [file.name for file in out.iterdir()] == ["mine"]
    assert (out / "mine").read_text() == "keep me"


def test_a_failure_in_the_middle_leaves_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    def stop(step: str) -> None:
        if step.startswith("compile"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tiny_bert, tmp_path / "pack", max_length=16, on_step=stop)
    assert not list(tmp_path.iterdir())


def test_a_pack_is_not_checked_against_another_backbone(tiny_bert: Path, tiny_dinov2_pack: Pack) -> None:
    with pytest.raises(PackError, match="made from other weights"):
        check_pack(tiny_dinov2_pack, tiny_bert)
