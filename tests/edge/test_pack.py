"""Opening a pack: whole packs give exact weights; anything else is refused before it is used."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fleetune.edge.pack.manifest import FILE, GRAPHS, WEIGHTS_FILE
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.tensorfile import TensorFile
from fleetune.edge.protocol.errors import PackError
from fleetune.edge.protocol.files import file_sha256

Json = dict[str, Any]


@pytest.fixture
def copy(tiny_bert_pack: Pack, tmp_path: Path) -> Path:
    """A pack of one's own, to damage."""
    folder = tmp_path / "pack"
    shutil.copytree(tiny_bert_pack.path, folder)
    return folder


def edit(folder: Path, change: Callable[[Json], object]) -> None:
    file = folder / FILE
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_whole_pack_opens(copy: Path, tiny_bert_pack: Pack) -> None:
    assert Pack.open(copy).sha256 == tiny_bert_pack.sha256


@pytest.mark.parametrize("verify", [True, False])
def test_a_folder_without_a_manifest_is_not_a_pack(tmp_path: Path, verify: bool) -> None:
    with pytest.raises(PackError, match=f"{tmp_path} is not a pack.*manifest.json"):
        Pack.open(tmp_path, verify=verify)


@pytest.mark.parametrize(
    "name", [WEIGHTS_FILE, "vocab.txt", *(f"{stem}.onnx" for stem in GRAPHS), "suffix_1.onnx", "suffix_3.onnx"]
)
def test_a_missing_file_is_named(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(PackError, match=f"{copy / name} is missing"):
        Pack.open(copy, verify=False)


def test_one_altered_bit_of_any_file_is_noticed(copy: Path) -> None:
    names = sorted(file.name for file in copy.iterdir() if file.name != FILE)
    assert {WEIGHTS_FILE, "vocab.txt", "suffix_3.onnx", *(f"{stem}.onnx" for stem in GRAPHS)} <= set(names)
    for name in names:
        for position in (0, (copy / name).stat().st_size // 2, -1):
            flip(copy / name, position)
            with pytest.raises(PackError, match=f"{copy / name} is not the file that was packed.*SHA-256"):
                Pack.open(copy)
            flip(copy / name, position)
    Pack.open(copy)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "vocab.txt", "embed.onnx", "suffix_3.onnx"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_noticed(name: str, verify: bool, copy: Path) -> None:
    file = copy / name
    data = file.read_bytes()
    for length in (len(data) - 1, 0):
        file.write_bytes(data[:length])
        with pytest.raises(PackError, match=f"{file}.*{length} bytes instead of {len(data)}"):
            Pack.open(copy, verify=verify)


@pytest.mark.parametrize("more", [{}, {"sparsity": 0.5}])
def test_a_pack_of_a_newer_fleetune_says_which_one_to_install(copy: Path, more: Json) -> None:
    edit(copy, lambda manifest: manifest.update(schema=2, kit="7.8.9", **more))
    with pytest.raises(PackError, match=r"schema 2 .*7\.8\.9") as caught:
        Pack.open(copy)
    assert "use Fleetune 7.8.9" in caught.value.remedy


def test_a_pack_of_a_newer_fleetune_that_does_not_say_which_asks_for_a_newer_one(copy: Path) -> None:
    edit(copy, lambda manifest: (manifest.pop("kit"), manifest.update(schema=9)))
    with pytest.raises(PackError, match=r"schema 9 .*this Fleetune reads schema 1") as caught:
        Pack.open(copy)
    assert "use Fleetune in a newer version" in caught.value.remedy


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "..", ".", "a" * 300, "a\0"])
def test_a_file_outside_the_pack_is_never_opened(name: str, copy: Path) -> None:
    (copy.parent / "outside").write_text("secret")
    entry = {"bytes": 6, "sha256": file_sha256(copy.parent / "outside")}
    edit(copy, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(PackError):
        Pack.open(copy)


def test_a_file_that_leads_out_of_the_pack_is_named(copy: Path) -> None:
    edit(copy, lambda manifest: manifest["files"].update({"../outside": {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(PackError, match=r"'\.\./outside', which lies outside the pack"):
        Pack.open(copy)


@pytest.mark.parametrize("name", ["../vocab.txt", "other.txt"])
def test_a_vocabulary_that_the_pack_does_not_list_is_refused(name: str, copy: Path) -> None:
    shutil.copyfile(copy / "vocab.txt", copy / name)
    edit(copy, lambda manifest: manifest["text"].update(vocabulary=name))
    with pytest.raises(PackError, match=r"vocab\.txt|other\.txt"):
        Pack.open(copy)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "pool.onnx"])
def test_a_manifest_that_leaves_out_a_file_is_refused(name: str, copy: Path) -> None:
    edit(copy, lambda manifest: manifest["files"].pop(name))
    with pytest.raises(PackError, match=f"lists no {name}"):
        Pack.open(copy)


def test_a_manifest_that_is_too_large_is_refused_before_it_is_parsed(copy: Path) -> None:
    with (copy / FILE).open("ab") as file:
        file.write(b" " * (1 << 20))
    with pytest.raises(PackError, match=r"manifest\.json is larger than 1048576 bytes"):
        Pack.open(copy)


@pytest.mark.parametrize(("change", "field"), [
    (lambda manifest: manifest.update(blocks="three"), "blocks"),
    (lambda manifest: manifest.pop("rank"), "rank"),
    (lambda manifest: manifest.update(surprise=1), "surprise"),
    (lambda manifest: manifest["backbone"].update(sha256=5), "backbone.sha256"),
    (lambda manifest: manifest["targets"].update(query=[64]), "targets"),
    (lambda manifest: manifest.update(blocks=10**12), "blocks"),  # each has names of two graphs
    (lambda manifest: manifest.update(blocks=0), "blocks"),
    (lambda manifest: manifest.update(width=-64), "width"),
    (lambda manifest: manifest.update(width=10**30), "width"),
    (lambda manifest: manifest.update(kit="1\n2"), "kit"),
    (lambda manifest: manifest["text"].update(max_length=2), "text.max_length"),
    (lambda manifest: manifest.update(text=None), "text or pictures"),
    (lambda manifest: manifest["quantisation"].update(code=[0.0] * 999), "quantisation.code"),
])  # fmt: skip
def test_a_manifest_that_does_not_fit_the_schema_names_the_field(
    change: Callable[[Json], object], field: str, copy: Path
) -> None:
    edit(copy, change)
    with pytest.raises(PackError, match=f"manifest.json: .*{field}"):
        Pack.open(copy)


@pytest.mark.parametrize(("change", "says"), [
    ({"kind": "cnn"}, "extractor.kind: cnn does not fit text"),
    ({"kind": "rnn"}, "extractor.kind"),
    ({"representation": 1 << 20}, "extractor.representation"),
    ({"gate": 0}, "extractor.gate"),
    ({"shapes": {"extractor.fc1.weight": [1 << 20, 1 << 20]}}, "extractor.shapes: 1099511627776 values in all"),
    ({"shapes": {"extractor.fc1.bias": [8]}}, "extractor.shapes: extractor.fc1.bias is not a tensor"),
    ({"shapes": {"head.weight": [8, 8]}}, "extractor.shapes: head.weight is not a tensor"),
    ({"shapes": {"extractor.fc1.codes": [8, 8]}}, "extractor.shapes: extractor.fc1.codes is not a tensor"),
    ({"shapes": {"extractor.fc1.weight": [8] * 5}}, "extractor.shapes"),
])  # fmt: skip
def test_an_extractor_that_cannot_be_is_refused_before_memory_is_taken(
    change: Json, says: str, sharing_packs: tuple[Pack, Pack], tmp_path: Path
) -> None:
    shutil.copytree(sharing_packs[0].path, tmp_path / "pack")
    edit(tmp_path / "pack", lambda manifest: manifest["extractor"].update(change))
    with pytest.raises(PackError, match=f"manifest.json: .*{says}"):
        Pack.open(tmp_path / "pack")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b'{"schema": 1, "kit": "\xff"}', b"[" * 100_000])
def test_a_manifest_that_is_not_json_is_refused(raw: bytes, copy: Path) -> None:
    (copy / FILE).write_bytes(raw)
    with pytest.raises(PackError, match=r"manifest\.json"):
        Pack.open(copy)


def test_a_depth_without_its_graph_is_refused(copy: Path) -> None:
    edit(copy, lambda manifest: manifest.update(blocks=4))
    with pytest.raises(PackError, match=r"lists no suffix_4\.onnx"):
        Pack.open(copy)


def test_weights_of_more_blocks_than_the_manifest_says_are_refused(copy: Path) -> None:
    edit(copy, lambda manifest: manifest.update(blocks=2))
    with pytest.raises(PackError, match=WEIGHTS_FILE):
        Pack.open(copy).weights()


# --- weights ------------------------------------------------------------------------------------------------


def test_weights_equal_what_bitsandbytes_dequantises(tiny_bert_pack: Pack) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install 'fleetune[pack]'")
    stored = safetensors.numpy.load_file(tiny_bert_pack.path / WEIGHTS_FILE)
    manifest = tiny_bert_pack.manifest
    assert manifest.quantisation.block_size == 64
    weights = tiny_bert_pack.weights()
    for index in range(manifest.blocks):
        block = weights.block(index)
        matrices = [name for name in block if f"blocks.{index}.{name}.codes" in stored]
        assert len(matrices) == 6
        for name in block:
            if name not in matrices:
                np.testing.assert_array_equal(block[name], stored[f"blocks.{index}.{name}"])
                continue
            state = functional.QuantState(
                absmax=torch.from_numpy(stored[f"blocks.{index}.{name}.absmax"].reshape(-1)),
                shape=torch.Size(block[name].shape),
                code=torch.tensor(manifest.quantisation.code),
                blocksize=64,
                quant_type="nf4",
                dtype=torch.float32,
            )
            codes = torch.from_numpy(stored[f"blocks.{index}.{name}.codes"].reshape(-1, 1))
            np.testing.assert_array_equal(block[name], functional.dequantize_4bit(codes, state).numpy(), err_msg=name)


def test_rows_of_a_table_equal_the_same_rows_of_the_whole_table(tiny_bert_pack: Pack) -> None:
    weights = tiny_bert_pack.weights()
    stored = safetensors.numpy.load_file(tiny_bert_pack.path / WEIGHTS_FILE)
    codes, absmax = stored["tokens.table.codes"], stored["tokens.table.absmax"]
    code = np.array(tiny_bert_pack.manifest.quantisation.code, dtype=np.float32)
    table = code[np.stack([codes >> 4, codes & 15], axis=2)].reshape(len(codes), -1, 64) * absmax[..., None]
    table = table.reshape(len(codes), -1)
    some = np.array([[5, 5, 0], [len(codes) - 1, 7, 33]])
    np.testing.assert_array_equal(weights.rows("tokens.table", some), table[some])


def test_dequantising_into_buffers_overwrites_them_and_allocates_no_matrix(tiny_bert_pack: Pack) -> None:
    weights = tiny_bert_pack.weights()
    wanted = {name: array.copy() for name, array in weights.block(2).items()}
    buffers = weights.block(0)
    again = weights.block(2, buffers)
    for name, array in again.items():
        np.testing.assert_array_equal(array, wanted[name])
        if array.ndim == 2:
            assert array is buffers[name]


def test_weights_cannot_be_written(tiny_bert_pack: Pack) -> None:
    bias = tiny_bert_pack.weights().block(0)["query.bias"]
    with pytest.raises(ValueError, match="read-only"):
        bias[0] = 1


@pytest.mark.parametrize(("change", "why"), [
    ({"blocks.0.query.weight.codes": np.zeros((64, 32), np.int8)}, "int8 of rank 2, not uint8"),
    ({"blocks.0.query.weight.codes": np.zeros(2048, np.uint8)}, "uint8 of rank 1"),
    ({"blocks.0.query.weight.codes": np.zeros((64, 16), np.uint8)}, "no scale for each 64 values"),
    ({"blocks.0.query.weight.absmax": np.zeros((32, 1), np.float32)}, "no scale for each 64 values"),
    ({"blocks.0.query.weight.absmax": None}, "no scale"),
    ({"blocks.0.query.weight.codes": None}, "belongs to no codes"),
    ({"blocks.0.query.bias": np.zeros(64, np.float16)}, "float16, not float32"),
    ({"blocks.0": np.zeros(1, np.float32)}, "blocks"),
    ({"blocks.9.query.bias": np.zeros(64, np.float32)}, "3 blocks"),
])  # fmt: skip
def test_weights_that_no_step_could_use_are_refused_when_they_are_opened(
    change: dict[str, Any], why: str, copy: Path
) -> None:
    weights = safetensors.numpy.load_file(copy / WEIGHTS_FILE) | change
    safetensors.numpy.save_file({n: t for n, t in weights.items() if t is not None}, copy / WEIGHTS_FILE)
    size, sha256 = (copy / WEIGHTS_FILE).stat().st_size, file_sha256(copy / WEIGHTS_FILE)
    edit(copy, lambda manifest: manifest["files"].update({WEIGHTS_FILE: {"bytes": size, "sha256": sha256}}))
    with pytest.raises(PackError, match=why):
        Pack.open(copy).weights()


def test_rows_that_a_table_lacks_are_refused(tiny_bert_pack: Pack) -> None:
    weights = tiny_bert_pack.weights()
    rows = weights.count("tokens.table")
    weights.rows("tokens.table", np.array([rows - 1]))
    with pytest.raises(PackError, match=f"row {rows} is asked for"):
        weights.rows("tokens.table", np.array([[0, rows]]))


# --- the mapped file ----------------------------------------------------------------------------------------

WHOLE = safetensors.numpy.save(
    {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "label": np.array([1, -2, 3]),
        "none": np.zeros((0, 4), np.float32),
        "picture": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
        "scalar": np.array(1.5, dtype=np.float32),
    }
)


def file_of(header: object, body: bytes = b"\0" * 64) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def read_all(data: bytes, folder: Path) -> None:
    file = folder / "x.safetensors"
    file.write_bytes(data)
    tensors = TensorFile(file)
    for name in tensors:
        np.asarray(tensors[name]).sum()


def test_a_mapped_file_holds_what_was_saved(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    wanted, found = safetensors.numpy.load(WHOLE), TensorFile(tmp_path / "x.safetensors")
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_released_pages_are_read_again(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    found = TensorFile(tmp_path / "x.safetensors")
    label = found["label"]
    found.release()
    np.testing.assert_array_equal(label, [1, -2, 3])


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"nothing\.safetensors"):
        TensorFile(tmp_path / "nothing.safetensors")


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> Json:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize("data", [
    b"",
    b"1234567",
    struct.pack("<Q", 1 << 62) + b"{}",
    struct.pack("<Q", 40) + b"{}",
    file_of(b"{"),
    file_of(b"[]"),
    file_of({"x": 1}),
    file_of(entry([4], 0, 15)),
    file_of(entry([4], 56, 72)),
    file_of(entry([4], -16, 0)),
    file_of(entry([4], 16, 0)),
    file_of(entry([1 << 62, 4], 0, 16)),
    file_of(entry([4], 0, 16, "BF16")),
    file_of(entry([-2, -2], 0, 16)),
    file_of(entry([2.0, 2.0], 0, 16)),
    file_of(b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], "\xff": 1}}'),
    file_of(b'{"\xff": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
    file_of(b'{"x": ' + b"[" * 100_000),
])  # fmt: skip
def test_a_malformed_header_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"x\.safetensors"):
        read_all(data, tmp_path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(WHOLE)),
)
@example([(9, 255)], len(WHOLE))
def test_whatever_the_bytes_only_a_pack_error_comes_out(
    tmp_path: Path, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(WHOLE)
    for position, value in changes:
        data[position] = value
    try:
        read_all(bytes(data[: max(length, 8)]), tmp_path)
    except PackError as error:
        assert error.remedy


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_whatever_the_header_only_a_pack_error_comes_out(tmp_path: Path, header: object) -> None:
    try:
        read_all(file_of({"x": header}), tmp_path)
    except PackError as error:
        assert error.remedy
