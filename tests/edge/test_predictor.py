"""Answers from a model file equal those of its experts and its gate, worked out block by block."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.dataset import Dataset, read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.gate import Gate
from fleetune.edge.engine.model import Model, card_for
from fleetune.edge.engine.predictor import Predictor
from fleetune.edge.engine.suffix import forward_chunk
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ConfigError, DataError


def make_model(pack: Pack, mix: Literal["logits", "features"], *, depth: int = 1, max_depth: int = 2) -> Model:
    rng = np.random.default_rng(4)
    layout = Layout.of(pack.manifest, classes=2)
    global_ = Expert(layout, rng.normal(0, 0.1, layout.size).astype(np.float32))
    local = global_.copy()
    local.vector[layout.tail(depth)] = rng.normal(0, 0.1, local.vector[layout.tail(depth)].shape)
    gate = Gate(layout.width, 3, seed=0)
    gate.load({name: rng.normal(0, 0.3, tensor.shape).astype(np.float32) for name, tensor in gate.tensors.items()})
    card = card_for(pack, kind="mixture", job="fedms", run="r", classes=2, max_depth=max_depth, mix=mix)
    return Model(card, global_, local, gate)


@pytest.fixture
def data(tiny_bert_pack: Pack, text_data: Path) -> Dataset:
    return read_dataset(text_data, tiny_bert_pack)


@pytest.mark.parametrize("mix", ["logits", "features"])
def test_a_mixture_answers_as_its_experts_and_its_gate(
    mix: Literal["logits", "features"], tiny_bert_pack: Pack, data: Dataset
) -> None:
    model = make_model(tiny_bert_pack, mix)
    assert model.mixture is not None
    some = np.array([3, 0, 17])
    found = Predictor(tiny_bert_pack, model.choose(None)[1], threads=1).samples(data, some)
    backbone = Backbone(tiny_bert_pack, threads=1)
    start = [(data.embed(backbone, some[i : i + 1]), np.ones((1, 1, n), dtype=np.float32)) for i, n in
             enumerate(data.lengths[some])]  # fmt: skip
    features = []
    for expert in (model.global_, model.local):
        assert expert is not None
        ends = forward_chunk(backbone, range(3), expert, start)
        features.append(np.concatenate([backbone.pool(*end) for end in ends]))
    below = forward_chunk(backbone, range(1), model.global_, start)
    weights = model.mixture.gate.weights(np.concatenate([hidden.mean(axis=1) for hidden, _ in below]))
    wanted = model.mixture.logits(weights, model.mixture.experts(*features))
    assert found.gate is not None
    np.testing.assert_allclose(found.gate, weights, atol=1e-5)
    np.testing.assert_allclose(found.logits, wanted, atol=1e-5)
    assert np.ptp(found.gate[:, 0]) > 1e-3  # the gate tells samples apart
    for name, expert, own in zip(("global", "local"), (model.global_, model.local), features, strict=True):
        assert expert is not None
        alone = Predictor(tiny_bert_pack, model.choose(name)[1], threads=1).samples(data, some)  # type: ignore[arg-type]
        assert alone.gate is None
        np.testing.assert_allclose(alone.logits, expert.logits(own), atol=1e-5)


def test_typed_text_is_answered_as_the_data_file_s(tiny_bert_pack: Pack, data: Dataset, text_data: Path) -> None:
    predictor = Predictor(tiny_bert_pack, make_model(tiny_bert_pack, "logits").choose(None)[1], threads=1)
    texts = [json.loads(line)["text"] for line in text_data.read_text().splitlines()]
    wanted = predictor.samples(data, np.array([5])).probabilities
    np.testing.assert_allclose(predictor.texts([texts[5]]).probabilities, wanted, atol=1e-6)
    with pytest.raises(DataError, match="takes text"):
        predictor.pictures(np.zeros((1, 28, 28), np.uint8))


def test_pictures_of_any_size_are_answered(tiny_dinov2_pack: Pack) -> None:
    predictor = Predictor(tiny_dinov2_pack, make_model(tiny_dinov2_pack, "logits").choose(None)[1], threads=1)
    rng = np.random.default_rng(0)
    found = predictor.pictures(rng.integers(0, 256, (2, 40, 30, 3), dtype=np.uint8))
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-6)
    with pytest.raises(DataError, match="takes pictures"):
        predictor.texts(["good"])


def test_a_global_model_answers_alone_and_has_no_mixture(tiny_bert_pack: Pack, data: Dataset) -> None:
    whole = make_model(tiny_bert_pack, "logits")
    model = Model(whole.card, whole.global_)
    predictor = Predictor(tiny_bert_pack, model.choose(None)[1], threads=1)
    assert model.choose(None)[0] == "global"
    wanted = Predictor(tiny_bert_pack, whole.choose("global")[1], threads=1).samples(data, np.array([1, 2])).logits
    np.testing.assert_allclose(predictor.samples(data, np.array([1, 2])).logits, wanted, atol=1e-6)
    for expert in ("mixture", "local"):
        with pytest.raises(ConfigError, match=f"no {expert}"):
            model.choose(expert)  # type: ignore[arg-type]


def test_the_command_answers_a_text_a_line_and_scores_a_data_file(
    tiny_bert_pack: Pack, text_data: Path, data: Dataset, tmp_path: Path
) -> None:
    model = make_model(tiny_bert_pack, "logits")
    model.write(tmp_path / "model.safetensors")
    command = [sys.executable, "-m", "fleetune.tools.cli", "predict", str(tmp_path / "model.safetensors")]
    command += ["--pack", str(tiny_bert_pack.path), "--threads", "1"]
    typed = subprocess.run(
        command, input="the film is good\n\nso is the plot\n", capture_output=True, text=True, check=True
    )
    answers = [json.loads(line) for line in typed.stdout.splitlines()]
    assert [sorted(answer) for answer in answers] == [["gate", "label", "probabilities"]] * 3  # the empty line too
    scored = subprocess.run([*command, "--data", str(text_data)], capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in scored.stdout.splitlines()]
    test = data.indices("test")
    assert [answer["expected"] for answer in answers] == data.labels[test].tolist()
    predicted = Predictor(tiny_bert_pack, model.choose(None)[1], threads=1).samples(data, test).logits.argmax(axis=1)
    assert [answer["label"] for answer in answers] == predicted.tolist()
    right = int((predicted == data.labels[test]).sum())
    assert f"mixture: {right} of 6 right" in scored.stderr


def predict(pack: Pack, folder: Path, *arguments: str | Path, text: bytes = b"") -> subprocess.CompletedProcess[str]:
    make_model(pack, "logits").write(folder / "model.safetensors")
    command = [sys.executable, "-m", "fleetune.tools.cli", "predict", folder / "model.safetensors"]
    command += ["--pack", pack.path, "--threads", "1", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_data_file_of_test_samples_alone_is_answered(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    data = tmp_path / "test.jsonl"
    data.write_text('{"text": "good film", "label": 0, "split": "test"}\n', encoding="utf-8")
    done = predict(tiny_bert_pack, tmp_path, "--data", data)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_a_label_that_the_model_does_not_know_is_refused(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    data = tmp_path / "test.jsonl"
    row = '{"text": "good film", "label": %d, "split": "test"}\n'
    data.write_text(row % 0 + row % 7, encoding="utf-8")
    done = predict(tiny_bert_pack, tmp_path, "--data", data)
    assert done.returncode == 17
    assert f"{data}, line 2: field label: 7 is out of range" in done.stderr
    assert done.stdout == ""


def test_text_that_is_not_utf_8_is_refused_with_its_line(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    done = predict(tiny_bert_pack, tmp_path, text=b"good\ncaf\xe9\n")
    assert done.returncode == 17
    assert "standard input, line 2: not UTF-8" in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_threads_out_of_range_are_refused(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    done = predict(tiny_bert_pack, tmp_path, "--threads", "-1")
    assert done.returncode == 10
    assert "--threads: -1" in done.stderr


def test_a_reader_that_has_enough_is_no_error(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    make_model(tiny_bert_pack, "logits").write(tmp_path / "model.safetensors")
    text = tmp_path / "texts.txt"
    text.write_text("good film\n" * 500, encoding="utf-8")
    command = f"'{sys.executable}' -m fleetune.tools.cli predict model.safetensors --pack '{tiny_bert_pack.path}'"
    script = f"set -o pipefail; {command} --threads 1 < texts.txt | head -1"
    done = subprocess.run(["/bin/bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 141
    assert done.stderr == ""
