"""``fleetune export``: what is written computes what torch does; what is refused leaves nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import safetensors
import safetensors.numpy

from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.gate import Gate
from fleetune.edge.engine.model import Model, card_for
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.wordpiece import WordPiece
from fleetune.edge.protocol.errors import ConfigError, FleetuneError, ModelError, RunFolderError
from fleetune.edge.protocol.modelfile import FILE

torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")
pytest.importorskip("optimum", reason="needs optimum: pip install 'fleetune[pack]'")
from fleetune.tools.export import write  # noqa: E402
from fleetune.tools.export.engine import Engine, probe  # noqa: E402
from fleetune.tools.export.int8 import Preset, preset_here  # noqa: E402
from fleetune.tools.export.write import ExpertName, export  # noqa: E402
from fleetune.tools.pack.write import write_pack  # noqa: E402

Array = np.ndarray[Any, Any]
CLASSES = 3
KINDS = ("bert", "dinov2")
WHAT: tuple[tuple[ExpertName, str], ...] = (
    ("mixture", "logits"), ("mixture", "features"), ("global", "logits"), ("local", "logits"),
)  # fmt: skip


def random_model(pack: Pack, mix: Any = "logits", depth: int = 2) -> Model:
    """Experts that differ in the top ``depth`` blocks and the head; the gate looks below the top two."""
    rng = np.random.default_rng(0)
    layout = Layout.of(pack.manifest, CLASSES)
    global_ = Expert(layout, rng.normal(0, 0.1, layout.size).astype(np.float32))
    local = global_.copy()
    local.vector[layout.tail(depth)] += rng.normal(0, 0.1, local.vector[layout.tail(depth)].shape)
    gate = Gate(layout.width, 5, seed=0)
    for tensor in gate.tensors.values():
        tensor[...] = rng.normal(0, 0.2, tensor.shape)
    card = card_for(pack, kind="mixture", job="fedms", run="r1", classes=CLASSES, max_depth=2, mix=mix)
    return Model(card, global_, local, gate)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture
def pack(kind: str, request: pytest.FixtureRequest) -> Pack:
    found: Pack = request.getfixturevalue(f"tiny_{kind}_pack")
    return found


def write_model(folder: Path, pack: Pack, mix: str = "logits") -> Path:
    random_model(pack, mix).write(folder / FILE)
    return folder / FILE


def feeds(pack: Pack, batch: int, length: int = 9) -> dict[str, Array]:
    """Samples that no export is compared on while it is written; of several texts all but one are padded."""
    rng = np.random.default_rng(batch)
    if pack.manifest.image:
        size = pack.manifest.image.size
        return {"pixel_values": rng.standard_normal((batch, 3, size, size), dtype=np.float32)}
    mask = (np.arange(length) < np.arange(length, length - batch, -1)[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(0, 90, mask.shape), "attention_mask": mask}


def in_torch(reference: Any, model: Model, expert: ExpertName, some: dict[str, Array]) -> tuple[Array, Array]:
    """Logits and the gate's weights, from the Hugging Face model and LoRA by hooks."""
    assert model.mixture is not None
    mixture, depth = model.mixture, model.card.blocks
    tensors = {name: torch.from_numpy(value) for name, value in some.items()}
    if "input_ids" in tensors:
        mask = tensors["attention_mask"][:, None].float()
        hidden = reference.model.embeddings(input_ids=tensors["input_ids"])
    else:
        hidden = reference.model.embeddings(tensors["pixel_values"])
        mask = torch.ones(len(hidden), 1, hidden.shape[1])

    def features(of: Expert) -> Array:
        symbols = {name: torch.from_numpy(t) for name, t in of.tensors.items() if name.startswith("blocks.")}
        found: Array = reference.features(hidden, mask, range(depth), symbols).numpy()
        return found

    there = hidden
    for index in range(mixture.boundary):
        adapters = {name: torch.from_numpy(t) for name, t in mixture.global_.adapters(index).items()}
        there = reference.block(index, there, mask, adapters)
    gate = mixture.gate.weights(((mask @ there)[:, 0] / mask.sum(2)).numpy())
    if expert != "mixture":
        one = mixture.global_ if expert == "global" else mixture.local
        return one.logits(features(one)), gate
    experts = mixture.experts(features(mixture.global_), features(mixture.local))
    return mixture.logits(gate, experts), gate


def error(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def session(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])


# --- ONNX -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("expert", "mix"), WHAT)
def test_onnx_computes_what_torch_and_the_engine_do(
    expert: ExpertName, mix: str, kind: str, pack: Pack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = random_model(pack, mix)
    report = export(write_model(tmp_path, pack, mix), pack, tmp_path / "out.onnx", to="onnx", expert=expert)
    assert report.probe.relative < 1e-5
    running = session(report.path)
    names = [output.name for output in running.get_outputs()]
    assert names == (["logits", "gate"] if expert == "mixture" else ["logits"])
    chosen = {"mixture": model.mixture, "global": model.global_, "local": model.local}[expert]
    assert chosen is not None
    engine = Engine(pack, chosen)
    for some in (feeds(pack, 1), feeds(pack, 1, 1), feeds(pack, 5)):
        logits, gate = in_torch(request.getfixturevalue(f"{kind}_reference"), model, expert, some)
        found = dict(zip(names, running.run(names, some), strict=True))
        assert error(found["logits"], logits) < 1e-5
        assert error(engine.run(some)["logits"], logits) < 1e-5
        if expert == "mixture":
            assert error(found["gate"], gate) < 1e-5
            assert gate.std() > 0.01


def test_the_gate_looks_under_the_global_expert(
    kind: str, pack: Pack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, some = random_model(pack, depth=3), feeds(pack, 3)
    model.write(tmp_path / FILE)
    report = export(tmp_path / FILE, pack, tmp_path / "out.onnx", to="onnx")
    logits, gate = in_torch(request.getfixturevalue(f"{kind}_reference"), model, "mixture", some)
    assert model.mixture is not None
    for found in (
        dict(zip(("logits", "gate"), session(report.path).run(None, some), strict=True)),
        Engine(pack, model.mixture).run(some),
    ):
        assert error(found["logits"], logits) < 1e-5
        assert error(found["gate"], gate) < 1e-5


@pytest.mark.parametrize("weights", ["int8", "fp32"])
def test_packs_with_other_weights_are_exported(weights: Any, tiny_bert: Path, tmp_path: Path) -> None:
    pack = write_pack(
        tiny_bert, tmp_path / "pack", name="t", licence="none", origin="t", max_length=24, weights=weights
    )
    model = random_model(pack)
    model.write(tmp_path / FILE)
    some = feeds(pack, 3)
    report = export(tmp_path / FILE, pack, tmp_path / "out.onnx", to="onnx")
    assert model.mixture is not None
    wanted = Engine(pack, model.mixture).run(some)["logits"]
    assert error(session(report.path).run(["logits"], some)[0], wanted) < 1e-5


def test_padding_changes_nothing(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    report = export(write_model(tmp_path, tiny_bert_pack), tiny_bert_pack, tmp_path / "out.onnx", to="onnx")
    running, some = session(report.path), feeds(tiny_bert_pack, 1)
    padded = {name: np.pad(value, ((0, 0), (0, 7))) for name, value in some.items()}
    for short, long in zip(running.run(None, some), running.run(None, padded), strict=True):
        np.testing.assert_allclose(short, long, rtol=1e-5, atol=1e-6)


def test_what_both_experts_share_is_stored_once(pack: Pack, tmp_path: Path) -> None:
    model = random_model(pack)
    local = model.global_.copy()
    local.tensors["blocks.2.query.B"][...] += 1
    Model(model.card, model.global_, local, model.gate).write(tmp_path / FILE)
    one, both = (
        export(tmp_path / FILE, pack, tmp_path / f"{name}.onnx", to="onnx", expert=name)
        for name in ("global", "mixture")
    )
    query, head, gate = 64 * 64, 65 * CLASSES, 64 * 12
    names = 2500  # what the second pass and the gate take in nodes
    assert 0 <= both.bytes - one.bytes - 4 * (query + head + gate) < 4 * names


def test_the_file_says_what_it_is(pack: Pack, tmp_path: Path) -> None:
    report = export(write_model(tmp_path, pack), pack, tmp_path / "out.onnx", to="onnx", expert="local")
    found = session(report.path).get_modelmeta().custom_metadata_map
    assert found["fleetune.expert"] == "local"
    assert found["fleetune.pack"] == pack.sha256
    assert found["fleetune.licence"] == "none"
    assert (found["fleetune.job"], found["fleetune.run"]) == ("fedms", "r1")


def test_the_mixture_is_the_default_and_else_the_global_expert(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    file = write_model(tmp_path, tiny_bert_pack)
    assert export(file, tiny_bert_pack, tmp_path / "1.onnx", to="onnx").expert == "mixture"
    model = random_model(tiny_bert_pack)
    Model(msgspec.structs.replace(model.card, kind="global"), model.global_).write(file)
    assert export(file, tiny_bert_pack, tmp_path / "2.onnx", to="onnx").expert == "global"


def test_experts_that_differ_in_their_heads_alone_are_exported(pack: Pack, tmp_path: Path) -> None:
    model = random_model(pack)
    local = model.global_.copy()
    local.tensors["head.bias"][...] += 1
    Model(model.card, model.global_, local, model.gate).write(tmp_path / FILE)
    assert export(tmp_path / FILE, pack, tmp_path / "out.onnx", to="onnx").probe.relative < 1e-5


# --- int8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["arm64", "avx2", "avx512", "avx512_vnni"])
def test_int8_loads_and_stays_near(preset: Preset, pack: Pack, tmp_path: Path) -> None:
    """Each of 18 matrices in a row adds about 0.4 % (rms), a step in 255: together 2 %, and twice that with 7 bits."""
    file = write_model(tmp_path, pack)
    exact = export(file, pack, tmp_path / "exact.onnx", to="onnx")
    report = export(file, pack, tmp_path / "int8.onnx", to="onnx-int8", preset=preset)
    assert (report.preset, report.format) == (preset, "onnx-int8")
    assert report.bytes < 0.6 * exact.bytes  # of the small picture model the patches' matrix is a fifth
    running = session(report.path)
    assert running.get_modelmeta().custom_metadata_map["fleetune.preset"] == preset
    wanted, found = (np.concatenate([run.run(["logits"], feeds(pack, n))[0] for n in (5, 6, 7)]) for run in (
        session(exact.path), running
    ))  # fmt: skip
    moved = np.sqrt(((found - wanted) ** 2).mean()) / wanted.std()
    overflows = preset in ("arm64", "avx512_vnni") and preset_here() in ("avx2", "avx512")
    assert 0 < moved < (np.inf if overflows else 0.06)


def test_the_preset_is_this_machines_by_default(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    file = write_model(tmp_path, tiny_bert_pack)
    report = export(file, tiny_bert_pack, tmp_path / "out.onnx", to="onnx-int8", expert="global")
    assert report.preset == preset_here()


def test_a_users_samples_say_how_often_both_agree(tiny_bert_pack: Pack, text_data: Path, tmp_path: Path) -> None:
    file = write_model(tmp_path, tiny_bert_pack)
    exact = export(file, tiny_bert_pack, tmp_path / "1.onnx", to="onnx", data=text_data).data
    rounded = export(file, tiny_bert_pack, tmp_path / "2.onnx", to="onnx-int8", data=text_data).data
    assert exact is not None
    assert rounded is not None
    assert (exact.samples, exact.agreement) == (6, 1.0)
    assert exact.relative < 1e-5
    assert rounded.difference > 100 * exact.difference
    assert rounded.agreement > 0.6


# --- PEFT -----------------------------------------------------------------------------------------------------------


def peft_logits(model: Any, folder: Path, some: dict[str, Array]) -> Array:
    """Logits of a backbone with the adapters of a folder, loaded by the PEFT library."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'fleetune[dev]'")
    from safetensors.torch import load_file

    loaded = peft.PeftModel.from_pretrained(model, folder).eval()
    head = load_file(folder / "head.safetensors")
    tensors = {name: torch.from_numpy(value) for name, value in some.items()}
    with torch.no_grad():
        hidden = loaded(**tensors).last_hidden_state
        if "attention_mask" in tensors:
            mask = tensors["attention_mask"][..., None]
            features = (hidden * mask).sum(1) / mask.sum(1)
        else:
            features = hidden[:, 0]
        found: Array = torch.nn.functional.linear(features, head["weight"], head["bias"]).numpy()
    return found


@pytest.mark.parametrize("expert", ["global", "local"])
def test_peft_loads_the_adapters_onto_the_hugging_face_backbone(
    expert: ExpertName, kind: str, pack: Pack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModel

    reference = request.getfixturevalue(f"{kind}_reference")
    report = export(write_model(tmp_path, pack), pack, tmp_path / "out", to="peft", expert=expert)
    assert report.probe.relative < 1e-5
    some = feeds(pack, 5)
    wanted, _ = in_torch(reference, random_model(pack), expert, some)
    backbone = AutoModel.from_pretrained(request.getfixturevalue(f"tiny_{kind}"), local_files_only=True)
    original = peft_logits(backbone, tmp_path / "out", some)
    assert 1e-3 < error(original, wanted) < 0.5  # NF4 against the weights before it
    backbone = AutoModel.from_pretrained(request.getfixturevalue(f"tiny_{kind}"), local_files_only=True)
    backbone.load_state_dict(reference.model.state_dict())
    assert error(peft_logits(backbone, tmp_path / "out", some), wanted) < 1e-5


def test_the_lines_of_the_model_card_work(
    kind: str, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install 'fleetune[dev]'")
    file, out = write_model(tmp_path, pack), tmp_path / "out"
    export(file, pack, out, to="peft", expert="local", with_backbone=True)
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(out)
    found: dict[str, Any] = {}
    exec(code[1], found)  # noqa: S102
    if kind == "bert":
        some = {name: found["batch"][name].numpy() for name in ("input_ids", "attention_mask")}
        tokeniser = WordPiece(pack.path / "vocab.txt", lowercase=True, max_length=24)
        assert some["input_ids"].tolist() == [tokeniser.encode("A film to see twice.")]
    else:
        some = {"pixel_values": ((found["pictures"] - found["mean"]) / found["std"]).numpy()}
    model = random_model(pack)
    assert model.local is not None
    wanted = Engine(pack, model.local).run(some)["logits"]
    assert error(found["logits"].numpy(), wanted) < 1e-5


def test_the_model_card_names_backbone_pack_and_licence(pack: Pack, tmp_path: Path) -> None:
    export(write_model(tmp_path, pack), pack, tmp_path / "out", to="peft", expert="global")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert all(word in text for word in (pack.manifest.backbone.id, pack.manifest.backbone.sha256, pack.sha256, "none"))
    assert not (tmp_path / "out" / "backbone").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def renumber(file: Path) -> None:
    with safetensors.safe_open(file, framework="numpy") as opened:
        card = json.loads(opened.metadata()["fleetune"]) | {"schema": 2, "kit": "9.1"}
    tensors = safetensors.numpy.load_file(file)
    file.write_bytes(safetensors.numpy.save(tensors, metadata={"fleetune": json.dumps(card)}))


def keep_global(file: Path) -> None:
    with safetensors.safe_open(file, framework="numpy") as opened:
        card = json.loads(opened.metadata()["fleetune"]) | {"kind": "global"}
    tensors = {name: t for name, t in safetensors.numpy.load_file(file).items() if name.startswith("global.")}
    file.write_bytes(safetensors.numpy.save(tensors, metadata={"fleetune": json.dumps(card)}))


REFUSED: list[tuple[Callable[[Path], object], dict[str, Any], type[FleetuneError], str]] = [
    (truncate, {}, ModelError, "is damaged"),
    (renumber, {}, ModelError, "schema 2"),
    (Path.unlink, {}, ModelError, "is not a file"),
    (keep_global, {"expert": "local"}, ConfigError, "--expert: .* holds the global expert alone"),
    (keep_global, {"expert": "mixture"}, ConfigError, "--expert: .* holds the global expert alone"),
    (str, {"to": "peft"}, ConfigError, "--expert: PEFT has no mixture"),
    (str, {"preset": "arm64"}, ConfigError, "--preset"),
    (str, {"with_backbone": True}, ConfigError, "--with-backbone"),
    (str, {"data": Path("nowhere.jsonl")}, FleetuneError, "nowhere.jsonl"),
]


@pytest.mark.parametrize(("change", "options", "kind_of_error", "message"), REFUSED)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    change: Callable[[Path], object],
    options: dict[str, Any],
    kind_of_error: type[FleetuneError],
    message: str,
    tiny_bert_pack: Pack,
    tmp_path: Path,
) -> None:
    file = write_model(tmp_path, tiny_bert_pack)
    change(file)
    with pytest.raises(kind_of_error, match=message) as caught:
        export(file, tiny_bert_pack, tmp_path / "out", **{"to": "onnx", **options})
    assert caught.value.remedy
    assert {path.name for path in tmp_path.iterdir()} <= {FILE}


def test_a_model_of_another_pack_is_refused(tiny_bert_pack: Pack, tiny_dinov2_pack: Pack, tmp_path: Path) -> None:
    file = write_model(tmp_path, tiny_bert_pack)
    with pytest.raises(ModelError, match=str(tiny_dinov2_pack.path)) as caught:
        export(file, tiny_dinov2_pack, tmp_path / "out", to="onnx")
    assert tiny_bert_pack.sha256 in caught.value.remedy


def test_nothing_is_overwritten(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("keep me")
    with pytest.raises(RunFolderError, match=str(out)):
        export(write_model(tmp_path, tiny_bert_pack), tiny_bert_pack, out, to="onnx")
    assert out.read_text() == "keep me"


@pytest.mark.parametrize("to", ["onnx", "onnx-int8", "peft"])
def test_an_export_that_computes_something_else_is_not_written(
    to: Any, tiny_bert_pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph or the adapters of another expert stand for a fault of the exporter or of the runtime."""
    other = random_model(tiny_bert_pack).local
    for name, place in (("network", 1), ("write_adapter", 3)):
        real = getattr(write, name)

        def wrong(*arguments: Any, real: Any = real, place: int = place, **options: Any) -> Any:
            return real(*arguments[:place], other, *arguments[place + 1 :], **options)

        monkeypatch.setattr(write, name, wrong)
    file = write_model(tmp_path, tiny_bert_pack)
    with pytest.raises(FleetuneError, match="differ from the engine's") as caught:
        export(file, tiny_bert_pack, tmp_path / "out", to=to, expert="global")
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


# --- the command ----------------------------------------------------------------------------------------------------


def fleetune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleetune.tools.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_the_file_and_a_report(tiny_bert_pack: Pack, text_data: Path, tmp_path: Path) -> None:
    file, out = write_model(tmp_path, tiny_bert_pack), tmp_path / "new" / "out.onnx"
    options = ("--pack", tiny_bert_pack.path, "--out", out, "--expert", "global", "--data", text_data, "--json")
    done = fleetune("export", file, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["path"], report["bytes"]) == (str(out), out.stat().st_size)
    assert (report["format"], report["expert"], report["data"]["samples"]) == ("onnx", "global", 6)
    assert report["probe"]["difference"] < 1e-4
    again = fleetune("export", file, *options)
    assert again.returncode == 18
    assert f"error: {out} exists" in again.stderr


def test_the_probe_has_padding_and_is_always_the_same(tiny_bert_pack: Pack) -> None:
    one, two = probe(tiny_bert_pack), probe(tiny_bert_pack)
    np.testing.assert_array_equal(one["input_ids"], two["input_ids"])
    assert len(set(one["attention_mask"].sum(axis=1))) > 1
