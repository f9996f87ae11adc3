"""Tensors arrive as they left, or as near as their codec says; bytes that are no tensors are refused for a reason."""

from __future__ import annotations

import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fleetune.edge.protocol.codec import CODECS, MAX_VALUES, Codec
from fleetune.edge.protocol.codec.numbers import BLOCK
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.messages import MAX_PAYLOAD

EXACT = [name for name in CODECS if name.startswith("f")]
COARSE = [name for name in CODECS if name.startswith("int")]

names = st.text(st.sampled_from("abc.019_AB"), min_size=1, max_size=12)
shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0)


def tensors(width: int) -> Any:
    floats = st.floats(-60000, 60000, width=width)  # type: ignore[arg-type]
    return st.dictionaries(names, arrays.arrays(np.float32, shapes, elements=floats), max_size=4)


def there_and_back(sent: dict[str, Any], codec: str) -> dict[str, Any]:
    return Codec.named(codec).decode(Codec.named(codec).encode(sent))


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


SENT = {
    name: Codec.named(name).encode({"x": np.ones(8, np.float32), "y": np.zeros((2, 3), np.float32)}) for name in CODECS
}
SCALED = {"x": np.ones((2, 64), np.int8), "scales": np.ones(2, np.float16)}


@pytest.mark.parametrize(("data", "codec", "why"), [
    (SENT["f16"], "int3", "unknown-codec"),
    (SENT["f16"], "f16+lzma", "unknown-codec"),
    (SENT["f16"], "", "unknown-codec"),
    (SENT["f16"], "f32", "wrong-dtype"),
    (SENT["f16"], "f16+zlib", "malformed"),
    (SENT["f16"], "int8", "malformed"),
    (SENT["int8"], "int8", ""),
    (SENT["int4"], "int8", "wrong-dtype"),
    (safetensors.numpy.save({"x": np.ones(3, np.int64)}), "f16", "wrong-dtype"),
    (SENT["f16"][:-1], "f16", "malformed"),
    (SENT["f16"][:9], "f16", "malformed"),
    (b"", "f16", "malformed"),
    (b"\x80\x04K\x01.", "f16", "malformed"),
    (Codec.named("f16").encode({"x": np.array([1, np.nan], np.float32)}), "f16", "not-finite"),
    (Codec.named("f32").encode({"x": np.array([[np.inf]], np.float32)}), "f32", "not-finite"),
    (safetensors.numpy.save(SCALED | {"scales": np.array([1, np.inf], np.float16)}), "int8", "not-finite"),
    (safetensors.numpy.save(SCALED | {"scales": np.ones(3, np.float16)}), "int8", "malformed"),
    (safetensors.numpy.save(SCALED | {"scales": np.ones(2, np.float32)}), "int8", "wrong-dtype"),
    (safetensors.numpy.save({"x": SCALED["x"]}), "int8", "malformed"),
    (SENT["int4+zlib"][:-1], "int4+zlib", "malformed"),
    (SENT["int4+zlib"] + b"more", "int4+zlib", "malformed"),
])  # fmt: skip
def test_payloads_that_are_refused(data: bytes, codec: str, why: str) -> None:
    found = ""
    try:
        Codec.named(codec).decode(data)
    except MessageError as error:
        found = error.reason
        assert error.remedy
    assert found == why


@pytest.mark.parametrize("codec", ["f16", "int8", "int4"])
def test_a_value_too_large_for_the_codec_is_noticed(codec: str) -> None:
    with np.errstate(over="ignore"):
        sent = Codec.named(codec).encode({"x": np.array([1e30, 1], np.float32)})
    with pytest.raises(MessageError, match="not finite"):
        Codec.named(codec).decode(sent)


def test_a_payload_that_is_too_large_is_refused() -> None:
    with pytest.raises(MessageError) as caught:
        Codec.named("f16").decode(bytes(MAX_PAYLOAD + 1))
    assert caught.value.reason == "payload-too-large"


def bomb() -> bytes:
    """A gigabyte of zeros in a megabyte."""
    encoder = zlib.compressobj(9)
    return b"".join(encoder.compress(bytes(1 << 24)) for _ in range(64)) + encoder.flush()


@pytest.mark.parametrize(("data", "codec"), [
    (bomb(), "f32+zlib"),
    (zlib.compress(safetensors.numpy.save({"x": np.zeros(MAX_VALUES + 1, np.int8), "scales": np.zeros(1, np.float16)})),
     "int8+zlib"),
    (zlib.compress(safetensors.numpy.save({f"{i}": np.zeros(0, np.float32) for i in range(40_000)})), "f32+zlib"),
])  # fmt: skip
def test_what_would_take_too_much_memory_is_refused_first(data: bytes, codec: str) -> None:
    tracemalloc.start()
    with pytest.raises(MessageError) as caught:
        Codec.named(codec).decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason == "payload-too-large"
    assert peak < 3 * MAX_PAYLOAD


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
    try:
        Codec.named(codec).decode(bytes(data[:length]))
    except MessageError as error:
        assert error.reason
