"""Tensors arrive as they left, or as near as their codec says; bytes that are no tensors are refused for a reason."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fleetune.edge.protocol.codec import CODECS, Codec
from fleetune.edge.protocol.codec.numbers import BLOCK
from fleetune.edge.protocol.errors import MessageError

EXACT = [name for name in CODECS if name.startswith("f")]
COARSE = [name for name in CODECS if name.startswith("int")]

names = st.text(st.sampled_from("abc.019_AB"), min_size=1, max_size=12)
shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0)


def tensors(width: int) -> Any:
    floats = st.floats(-60000, 60000, width=width)  # type: ignore[arg-type]
    return st.dictionaries(names, arrays.arrays(np.float32, shapes, elements=floats), max_size=4)


def there_and_back(sent: dict[str, Any], codec: str) -> dict[str, Any]:
    return Codec.named(codec).decode(Codec.named(codec).encode(sent), shapes_of(sent))


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def reason(data: bytes, codec: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why bytes are refused; empty if they are not."""
    try:
        Codec.named(codec).decode(data, shapes)
    except MessageError as error:
        assert error.remedy
        return error.reason
    return ""


@given(tensors(16), st.sampled_from(EXACT))
def test_tensors_that_fit_the_codec_arrive_exactly(sent: dict[str, Any], codec: str) -> None:
    found = there_and_back(sent, codec)
    assert set(found) == set(sent)
    for name, tensor in sent.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(found[name], tensor)


@given(arrays.arrays(np.float32, 20, elements=st.floats(-100, 100, width=32)))
def test_half_precision_rounds_to_eleven_bits(sent: Any) -> None:
    np.testing.assert_allclose(there_and_back({"x": sent}, "f16")["x"], sent, rtol=2**-11, atol=2**-24)


@given(tensors(32), st.sampled_from(COARSE))
def test_whole_numbers_are_off_by_half_a_step_of_their_block(sent: dict[str, Any], codec: str) -> None:
    found = there_and_back(sent, codec)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in sent.items()}
    for name, tensor in sent.items():
        assert found[name].dtype == np.float32
        whole = codec.startswith("int4") and tensor.shape and tensor.shape[-1] % 2 == 0
        levels, spread = (7, 5) if whole else (127, 0)
        for start in range(0, tensor.size, BLOCK):
            some = tensor.reshape(-1)[start : start + BLOCK].astype(np.float64)
            span = max(np.abs(some).max(), spread * np.sqrt(np.square(some).sum() / BLOCK))
            # The scale itself is float16: eleven bits, and nothing below its smallest number.
            off = span / levels / 2 + span * 2**-11 + levels * 2.0**-25
            assert np.abs(found[name].reshape(-1)[start : start + BLOCK] - some).max() <= off * 1.001


def test_a_large_value_spoils_only_its_own_block() -> None:
    sent = np.full((4, BLOCK), 1e-3, np.float32)
    sent[1, 5] = 1000
    plain = np.full((4, BLOCK), 1e-3, np.float32)
    for codec in COARSE:
        found, alone = (there_and_back({"x": some}, codec)["x"] for some in (sent, plain))
        np.testing.assert_array_equal(found[[0, 2, 3]], alone[[0, 2, 3]])
        assert found[1, 5] == pytest.approx(1000, rel=1e-3)


def test_views_are_sent_as_what_they_show() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for view in (array.T, array[:, ::2], array[::-1]):
        for codec in ("f32", "int8"):
            np.testing.assert_allclose(there_and_back({"x": view}, codec)["x"], view, atol=0.05)


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_tensors_give_the_same_bytes_in_any_order(codec: str) -> None:
    a, b = np.ones(3, np.float32), np.zeros(2, np.float32)
    encode = Codec.named(codec).encode
    assert encode({"a": a, "b": b}) == encode({"b": b, "a": a})


def test_fewer_bits_are_fewer_bytes() -> None:
    sent = {"x": np.random.default_rng(0).standard_normal((768, 64)).astype(np.float32)}
    size = {name: len(Codec.named(name).encode(sent)) for name in CODECS}
    assert size["f32"] / size["f16"] == pytest.approx(2, rel=0.01)
    assert size["f32"] / size["int8"] == pytest.approx(4 / (1 + 2 / BLOCK), rel=0.01)
    assert size["f32"] / size["int4"] == pytest.approx(8 / (1 + 4 / BLOCK), rel=0.01)
    assert size["int4+zlib"] < 0.75 * size["int4"]


TENSORS = {"x": np.ones(8, np.float32), "y": np.zeros((2, 3), np.float32)}
SHAPES = shapes_of(TENSORS)
SENT = {name: Codec.named(name).encode(TENSORS) for name in CODECS}
SCALED = {"x": np.ones((2, 64), np.int8), "scales": np.ones(2, np.float16)}
SCALED_SHAPES = {"x": (2, 64)}
save = safetensors.numpy.save


@pytest.mark.parametrize("codec", CODECS)
def test_some_of_the_tensors_are_enough(codec: str) -> None:
    sent = {"y": TENSORS["y"]}
    found = Codec.named(codec).decode(Codec.named(codec).encode(sent), SHAPES)
    assert shapes_of(found) == shapes_of(sent)


@pytest.mark.parametrize(("data", "codec", "why"), [
    (SENT["f16"], "int3", "unknown-codec"),
    (SENT["f16"], "f16+lzma", "unknown-codec"),
    (SENT["f16"], "", "unknown-codec"),
    (SENT["f16"], "f32", "wrong-dtype"),
    (SENT["f16"], "f16+zlib", "malformed"),
    (SENT["f16"], "int8", "wrong-dtype"),
    (SENT["int8"], "int8", ""),
    (SENT["int4"], "int8", "wrong-dtype"),
    (SENT["int8"], "int4", "wrong-dtype"),
    (save({"x": np.ones(8, np.int64)}), "f32", "wrong-dtype"),
    (SENT["f16"][:-1], "f16", "malformed"),
    (SENT["f16"][:9], "f16", "malformed"),
    (SENT["f16"] + b"\0", "f16", "malformed"),
    (b"", "f16", "malformed"),
    (b"\x80\x04K\x01.", "f16", "malformed"),
    (SENT["int4+zlib"][:-1], "int4+zlib", "malformed"),
    (SENT["int4+zlib"] + b"more", "int4+zlib", "malformed"),
    (bytes(4096), "f32", "payload-too-large"),
    (save({"x": np.ones(7, np.float32)}), "f32", "wrong-shape"),
    (save({"x": np.ones((8, 1), np.float32)}), "f32", "wrong-shape"),
    (save({"z": np.ones(8, np.float32)}), "f32", "unexpected-tensor"),
    (save({"x": TENSORS["x"], "z": np.zeros(0, np.float32)}), "f32", "unexpected-tensor"),
    (save({"scales": np.zeros(0, np.float16)}), "f16", "unexpected-tensor"),
    (save({name: np.zeros(0, np.float32) for name in "xyz"}), "f32", "too-many-tensors"),
    (save(TENSORS, {"from": "elsewhere"}), "f32", "malformed"),
])  # fmt: skip
def test_payloads_that_are_refused(data: bytes, codec: str, why: str) -> None:
    assert reason(data, codec, SHAPES) == why


@pytest.mark.parametrize(("parts", "why"), [
    (SCALED, ""),
    (SCALED | {"scales": np.array([1, np.inf], np.float16)}, "not-finite"),
    (SCALED | {"scales": np.array([np.nan, 1], np.float16)}, "not-finite"),
    (SCALED | {"scales": np.ones(3, np.float16)}, "wrong-shape"),
    (SCALED | {"scales": np.ones((2, 1), np.float16)}, "wrong-shape"),
    (SCALED | {"scales": np.ones(2, np.float32)}, "wrong-dtype"),
    ({"x": SCALED["x"]}, "malformed"),
])  # fmt: skip
def test_scales_that_are_refused(parts: dict[str, Any], why: str) -> None:
    assert reason(save(parts), "int8", SCALED_SHAPES) == why


def headed(document: str, data: bytes) -> bytes:
    return len(document).to_bytes(8, "little") + document.encode() + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(("document", "data", "why"), [
    (json.dumps({"x": ENTRY}), bytes(8), ""),
    (json.dumps({"x": ENTRY}) + "   ", bytes(8), ""),
    (f'{{"x": {json.dumps(ENTRY)}, "x": {json.dumps(ENTRY)}}}', bytes(8), "duplicate-tensor"),
    (f'{{"x": {json.dumps(ENTRY)}, "\\u0078": {json.dumps(ENTRY)}}}', bytes(8), "duplicate-tensor"),
    ('{"x": {"dtype": "F16", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8), "duplicate-tensor"),
    (json.dumps({"x": ENTRY | {"dtype": "F8_E4M3"}}), bytes(8), "malformed"),
    (json.dumps({"x": ENTRY | {"shape": [-2]}}), bytes(8), "malformed"),
    (json.dumps({"x": ENTRY | {"shape": [1 << 70]}}), bytes(8), "malformed"),
    (json.dumps({"x": ENTRY | {"shape": [2.0]}}), bytes(8), "malformed"),
    (json.dumps({"x": ENTRY | {"shape": [1] * 9 + [2]}}), bytes(8), "malformed"),
    (json.dumps({"x": ENTRY | {"shape": [0, 1 << 39, 1 << 39], "data_offsets": [0, 0]}}), b"", "malformed"),
    (json.dumps({"x": ENTRY | {"data_offsets": [8, 0]}}), bytes(8), "malformed"),
    (json.dumps({"x": ENTRY | {"data_offsets": [4, 12]}}), bytes(12), "malformed"),
    (json.dumps({"x": ENTRY | {"data_offsets": [0, 8, 16]}}), bytes(8), "malformed"),
    (json.dumps({"x": ENTRY | {"more": 1}}), bytes(8), "malformed"),
    (json.dumps({"x": ENTRY}), bytes(9), "malformed"),
    (json.dumps({"x": ENTRY, "__metadata__": {"a": 1}}), bytes(8), "malformed"),
    (json.dumps({"x": ENTRY}) + " " * 600, bytes(8), "payload-too-large"),
    ('{"x": ' + "[" * 90, b"", "malformed"),
    ("[]", b"", "malformed"),
    ("", b"", "malformed"),
])  # fmt: skip
def test_headers_that_are_refused(document: str, data: bytes, why: str) -> None:
    assert reason(headed(document, data), "f32", {"x": (2,), "y": (40,)}) == why


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_whatever_the_codec(codec: str, bad: float) -> None:
    with np.errstate(invalid="ignore"):
        sent = Codec.named(codec).encode({"x": np.array([1, bad, 2, 3], np.float32)})
    assert reason(sent, codec, {"x": (4,)}) == "not-finite"


@pytest.mark.parametrize("codec", ["f16", "int8", "int4"])
def test_a_value_too_large_for_the_codec_is_noticed(codec: str) -> None:
    with np.errstate(over="ignore"):
        sent = Codec.named(codec).encode({"x": np.array([1e30, 1], np.float32)})
    assert reason(sent, codec, {"x": (2,)}) == "not-finite"


# --- memory -----------------------------------------------------------------------------------------------------

LORA = {f"blocks.{block}.{name}.{side}": (384, 8) for block in range(12) for name in "qv" for side in "AB"}
LORA_BYTES = 4 * 48 * 384 * 8


def bomb(megabytes: int) -> bytes:
    """Megabytes of zeros in a thousandth of that."""
    encoder = zlib.compressobj(9)
    return b"".join(encoder.compress(bytes(1 << 20)) for _ in range(megabytes)) + encoder.flush()


def peak_of_decoding(data: bytes, codec: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, str]:
    """Bytes that it took at most, and why it was refused."""
    tracemalloc.start()
    try:
        why = reason(data, codec, shapes)
        return tracemalloc.get_traced_memory()[1], why
    finally:
        tracemalloc.stop()


@given(tensors(16), st.sampled_from(CODECS))
def test_no_payload_is_larger_than_what_its_tensors_can_take(sent: dict[str, Any], codec: str) -> None:
    assert len(Codec.named(codec).encode(sent)) <= Codec.named(codec).most(shapes_of(sent))


@pytest.mark.parametrize("codec", CODECS)
def test_noise_that_no_codec_can_compress_fits(codec: str) -> None:
    rng = np.random.default_rng(0)
    data = Codec.named(codec).encode(
        {name: rng.uniform(-1, 1, shape).astype(np.float32) for name, shape in LORA.items()}
    )
    most = Codec.named(codec).most(LORA)
    assert len(data) <= most < 1.1 * Codec.named(codec.removesuffix("+zlib")).most(LORA)
    assert reason(data, codec, LORA) == ""


@pytest.mark.parametrize("codec", CODECS)
def test_decoding_takes_little_more_memory_than_the_tensors(codec: str) -> None:
    rng = np.random.default_rng(0)
    data = Codec.named(codec).encode({name: rng.standard_normal(shape, np.float32) for name, shape in LORA.items()})
    peak, why = peak_of_decoding(data, codec, LORA)
    assert why == ""
    assert peak < 3 * LORA_BYTES


@pytest.mark.parametrize(("data", "codec"), [
    (bomb(64), "f32+zlib"),
    (bomb(64), "int4+zlib"),
    (zlib.compress(save({"x": np.zeros(1 << 24, np.int8), "scales": np.zeros(1, np.float16)})), "int8+zlib"),
    (zlib.compress(save({f"{i}": np.zeros(0, np.float32) for i in range(40_000)})), "f32+zlib"),
    (zlib.compress(headed("[" + "[]," * 1_000_000, b"")), "f32+zlib"),
])  # fmt: skip
def test_what_would_take_too_much_memory_is_refused_first(data: bytes, codec: str) -> None:
    peak, why = peak_of_decoding(data, codec, LORA)
    assert why == "payload-too-large"
    assert peak < 3 * LORA_BYTES


@pytest.mark.parametrize("filler", ["[],", "{},", '"":0,', "0,", '"a",'])
def test_a_header_of_rubbish_takes_little_memory(filler: str) -> None:
    shapes = dict.fromkeys(LORA, (1,))
    length = 100 * len(shapes)
    for start, end in (("[", "0]"), ('{"x":[', "0]}"), ("{", '"x":0}')):
        document = start + filler * ((length - len(start) - len(end)) // len(filler)) + end
        peak, why = peak_of_decoding(headed(document, b""), "f32", shapes)
        assert why == "malformed"
        assert peak < 40 * length


@settings(max_examples=300)
@given(
    st.sampled_from(CODECS),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.integers(0, 400),
)
def test_whatever_the_bytes_only_a_message_error_comes_out(
    codec: str, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(SENT[codec])
    for position, value in changes:
        data[position % len(data)] = value
    reason(bytes(data[:length]), codec, SHAPES)
