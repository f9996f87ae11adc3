"""The prefix cache: what it returns is what the blocks compute, and it computes only what is not there."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import RESERVE, PrefixCache, room
from fleetune.edge.engine.dataset import Dataset, read_dataset
from fleetune.edge.engine.entry import FILE as ENTRY
from fleetune.edge.engine.entry import HIDDEN, POOLED
from fleetune.edge.engine.expert import Expert, FloatArray, Layout
from fleetune.edge.engine.prefix import CHUNK, ComputedPrefix, Prefix, split, token_mask
from fleetune.edge.engine.tokens import CODECS
from fleetune.edge.pack.manifest import FILE
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import DataError, FileAccessError


class CountingBackbone(Backbone):
    """Counts how often a block runs forward."""

    def __init__(self, pack: Pack) -> None:
        super().__init__(pack, threads=1)
        self.runs: list[int] = []
        self.stop_after: int | None = None

    def forward(
        self, block: int, hidden: FloatArray, mask: FloatArray, adapters: Mapping[str, FloatArray]
    ) -> FloatArray:
        if self.stop_after is not None and len(self.runs) >= self.stop_after:
            raise KeyboardInterrupt
        self.runs.append(block)
        return super().forward(block, hidden, mask, adapters)

    def blocks_run(self) -> set[int]:
        """Blocks that ran since the last call."""
        found, self.runs = set(self.runs), []
        return found


@pytest.fixture
def backbone(tiny_bert_pack: Pack) -> CountingBackbone:
    return CountingBackbone(tiny_bert_pack)


@pytest.fixture
def data(text_data: Path, tiny_bert_pack: Pack) -> Dataset:
    return read_dataset(text_data, tiny_bert_pack)


@pytest.fixture
def make(backbone: CountingBackbone, data: Dataset, tmp_path: Path) -> Callable[..., PrefixCache]:
    def make(*, micro_batch: int = 5, codec: Any = "f16", limit: int | None = None) -> PrefixCache:
        return PrefixCache(tmp_path / "cache", backbone, data, micro_batch=micro_batch, codec=codec, limit=limit)

    return make


@pytest.fixture
def expert(tiny_bert_pack: Pack) -> Expert:
    """Adapters that change what every block computes."""
    expert = Expert(Layout.of(tiny_bert_pack.manifest, classes=2))
    expert.vector[:] = np.random.default_rng(2).normal(0, 0.05, expert.vector.shape)
    return expert


def entries(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cache").iterdir()}


def size(folder: Path) -> int:
    """Bytes of a cache's files."""
    return sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())


def direct(backbone: Backbone, data: Dataset, boundary: int, expert: Expert) -> list[FloatArray]:
    """The hidden state of each sample, computed alone."""
    found = []
    for i in range(len(data)):
        hidden = data.embed(backbone, np.array([i]))
        mask = token_mask(data.lengths[[i]], hidden.shape[1])
        for block in range(boundary):
            hidden = backbone.forward(block, hidden, mask, expert.adapters(block))
        found.append(hidden[0])
    return found


def check(prefix: Prefix, wanted: list[FloatArray], lengths: list[int]) -> None:
    """Within what float16 keeps."""
    for i, (hidden, length) in enumerate(zip(wanted, lengths, strict=True)):
        found, mask = prefix.batch(np.array([i]))
        assert found.shape == (1, length, hidden.shape[1])
        assert mask.all()
        np.testing.assert_allclose(found[0], hidden, rtol=2e-3, atol=4e-3)
        np.testing.assert_allclose(prefix.pooled[i], hidden.mean(axis=0), rtol=2e-3, atol=4e-3)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [0, 1, 2, 3])
def test_an_entry_equals_running_the_blocks(
    boundary: int, make: Callable[..., PrefixCache], backbone: CountingBackbone, data: Dataset, expert: Expert
) -> None:
    prefix = make().prefix(boundary, expert)
    assert prefix.boundary == boundary
    check(prefix, direct(backbone, data, boundary, expert), data.lengths.tolist())


@pytest.mark.parametrize("boundary", [0, 2])
def test_int8_stays_within_its_error(
    boundary: int, make: Callable[..., PrefixCache], backbone: CountingBackbone, data: Dataset, expert: Expert
) -> None:
    prefix = make(codec="int8").prefix(boundary, expert)
    worst = 0.0
    for i, wanted in enumerate(direct(backbone, data, boundary, expert)):
        found, _ = prefix.batch(np.array([i]))
        share = np.abs(found[0] - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
        worst = max(worst, float(share.max()))
        np.testing.assert_allclose(prefix.pooled[i], wanted.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert 1 / 1000 < worst <= 1.001 / 254


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("codec", ["f16", "int8"])
def test_tokens_of_any_size_are_stored_within_the_codecs_error(codec: Any) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((7, 64), dtype=np.float32) * np.float32(10) ** np.arange(-3, 4)[:, None]
    hidden[2] = 0
    found = np.empty_like(hidden)
    CODECS[codec].decode(CODECS[codec].encode(hidden), found)
    error = np.abs(found - hidden)
    allowed = np.abs(hidden) / 2**11 + 2**-25 if codec == "f16" else np.abs(hidden).max(axis=1, keepdims=True) / 254
    assert (error <= 1.001 * allowed).all()
    assert error.any()
    assert not found[2].any()


@pytest.mark.parametrize(("codec", "token"), [("f16", 2 * 64), ("int8", 64 + 4)])
def test_an_entry_costs_its_tokens_and_no_padding(
    codec: str, token: int, make: Callable[..., PrefixCache], data: Dataset, expert: Expert, tmp_path: Path
) -> None:
    make(codec=codec).prefix(1, expert)
    (entry,) = entries(tmp_path)
    description = (tmp_path / "cache" / entry / ENTRY).stat().st_size
    assert size(tmp_path) == data.lengths.sum() * token + len(data) * 64 * 4 + description
    assert description < 1024
    assert data.lengths.min() < data.lengths.max()


def test_an_entry_that_was_derived_step_by_step_equals_running_the_blocks(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, data: Dataset, expert: Expert
) -> None:
    cache = make()
    for boundary in range(4):
        prefix = cache.prefix(boundary, expert)
    check(prefix, direct(backbone, data, 3, expert), data.lengths.tolist())


def test_boundaries_without_adapters_below_them_have_entries_of_their_own(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, data: Dataset, expert: Expert
) -> None:
    fresh = Expert.initial(expert.layout, seed=0)
    cache = make()
    for boundary in (1, 2):
        check(cache.prefix(boundary, fresh), direct(backbone, data, boundary, fresh), data.lengths.tolist())


def test_a_batch_is_cut_to_its_longest_sample_and_masked(
    make: Callable[..., PrefixCache], data: Dataset, expert: Expert
) -> None:
    prefix = make().prefix(1, expert)
    some = np.array([int(data.lengths.argmin()), int(np.argsort(data.lengths)[len(data) // 2])])
    hidden, mask = prefix.batch(some)
    longest = int(data.lengths[some].max())
    assert longest < data.lengths.max()
    assert hidden.shape == (2, longest, 64)
    assert hidden.dtype == mask.dtype == np.float32
    assert mask.sum(axis=(1, 2)).tolist() == data.lengths[some].tolist()
    assert not hidden[0, data.lengths[some[0]] :].any()


def test_samples_come_in_the_order_in_which_they_are_asked_for(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, data: Dataset, expert: Expert
) -> None:
    prefix, wanted = make().prefix(1, expert), direct(backbone, data, 1, expert)
    some = np.random.default_rng(0).permutation(len(data))[:7]
    hidden, _ = prefix.batch(some)
    for row, i in zip(hidden, some, strict=True):
        np.testing.assert_allclose(row[: data.lengths[i]], wanted[i], rtol=2e-3, atol=4e-3)


def test_batches_share_one_buffer_and_chunks_have_their_own(
    make: Callable[..., PrefixCache], data: Dataset, expert: Expert
) -> None:
    prefix = make().prefix(1, expert)
    groups = split(np.argsort(data.lengths)[::-1], 6)
    first, second = prefix.batch(groups[0])[0], prefix.batch(groups[1])[0]
    assert np.shares_memory(first, second)
    parts = prefix.chunk(groups)
    for some, (hidden, mask) in zip(groups, parts, strict=True):
        again, real = prefix.batch(some)
        np.testing.assert_array_equal(hidden, again)
        np.testing.assert_array_equal(mask, real)


@pytest.mark.parametrize("codec", ["f16", "int8"])
def test_reading_allocates_no_hidden_states(
    codec: str, make: Callable[..., PrefixCache], data: Dataset, expert: Expert
) -> None:
    prefix = make(codec=codec).prefix(1, expert)
    groups = [np.arange(len(data)), *split(np.arange(len(data)), 8)]
    for _ in prefix.parts(groups):  # the buffer grows to what is asked for
        pass
    tracemalloc.start()
    for hidden, _ in prefix.parts(groups):
        least = hidden.nbytes
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12_000 < least


@pytest.fixture
def pictures(tiny_dinov2_pack: Pack, tmp_path: Path) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    tensors = {"images": images, "labels": np.arange(6) % 2, "split": (np.arange(6) % 3).astype(np.uint8)}
    safetensors.numpy.save_file(tensors, tmp_path / "data.safetensors")
    return read_dataset(tmp_path / "data.safetensors", tiny_dinov2_pack)


def test_pictures_are_cached_too(tiny_dinov2_pack: Pack, pictures: Dataset, tmp_path: Path) -> None:
    backbone = Backbone(tiny_dinov2_pack, threads=1)
    expert = Expert(Layout.of(tiny_dinov2_pack.manifest, classes=2))
    prefix = PrefixCache(tmp_path / "cache", backbone, pictures, micro_batch=4).prefix(2, expert)
    check(prefix, direct(backbone, pictures, 2, expert), pictures.lengths.tolist())


# --- what is computed again ---------------------------------------------------------------------------------


def test_a_second_request_computes_nothing(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert, tmp_path: Path
) -> None:
    make().prefix(2, expert)
    (entry,) = entries(tmp_path)
    files = {file.name: file.stat() for file in (tmp_path / "cache" / entry).iterdir()}
    assert backbone.blocks_run() == {0, 1}
    for cache in (make(), make(micro_batch=2)):  # a new one, as after a restart
        cache.prefix(2, expert)
    assert backbone.blocks_run() == set()
    assert entries(tmp_path) == {entry}
    for name, before in files.items():
        after = (tmp_path / "cache" / entry / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_higher_entry_starts_from_the_one_below(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert
) -> None:
    cache = make()
    cache.prefix(1, expert)
    assert backbone.blocks_run() == {0}
    cache.prefix(3, expert)
    assert backbone.blocks_run() == {1, 2}
    cache.prefix(2, expert)
    assert backbone.blocks_run() == {1}


@pytest.mark.parametrize("side", ["A", "B"])
def test_an_adapter_that_changed_below_the_boundary_gives_another_entry(
    side: str, make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert, tmp_path: Path
) -> None:
    cache = make()
    before = cache.prefix(2, expert).pooled.copy()
    backbone.blocks_run()
    expert.tensors[f"blocks.1.fc1.{side}"] += 0.5
    after = cache.prefix(2, expert).pooled
    assert backbone.blocks_run() == {0, 1}
    assert len(entries(tmp_path)) == 2
    assert np.abs(after - before).max() > 0.01


def test_only_the_blocks_above_the_change_run_again(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert
) -> None:
    cache = make()
    cache.prefix(1, expert)
    cache.prefix(3, expert)
    backbone.blocks_run()
    expert.tensors["blocks.1.query.B"] += 0.5
    cache.prefix(3, expert)
    assert backbone.blocks_run() == {1, 2}


def test_an_adapter_above_the_boundary_changes_nothing(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert
) -> None:
    cache = make()
    cache.prefix(2, expert)
    backbone.blocks_run()
    expert.tensors["blocks.2.fc1.B"] += 0.5
    expert.tensors["head.weight"] += 0.5
    cache.prefix(2, expert)
    assert backbone.blocks_run() == set()


def test_an_adapter_whose_b_is_zero_counts_as_none(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert
) -> None:
    cache = make()
    cache.prefix(3, Expert(expert.layout))
    backbone.blocks_run()
    for seed in (1, 2):
        cache.prefix(3, Expert.initial(expert.layout, seed))
    assert backbone.blocks_run() == set()
    touched = Expert.initial(expert.layout, 1)
    touched.tensors["blocks.0.value.B"][1, 2] = 0.5
    cache.prefix(3, touched)
    assert backbone.blocks_run() == {0, 1, 2}


def test_the_same_adapters_in_another_block_give_another_entry(
    make: Callable[..., PrefixCache], expert: Expert, tmp_path: Path
) -> None:
    cache = make()
    for block in (0, 1):
        moved = Expert(expert.layout)
        for name in ("fc1.A", "fc1.B"):
            moved.tensors[f"blocks.{block}.{name}"][...] = expert.tensors[f"blocks.0.{name}"]
        cache.prefix(2, moved)
    assert len(entries(tmp_path)) == 2


def test_another_data_file_or_another_pack_gives_another_entry(
    make: Callable[..., PrefixCache],
    backbone: CountingBackbone,
    expert: Expert,
    tiny_bert_pack: Pack,
    text_data: Path,
    tmp_path: Path,
) -> None:
    make().prefix(1, expert)
    backbone.blocks_run()
    other = tmp_path / "other.jsonl"
    other.write_text(text_data.read_text().replace("good", "fine"))
    changed = read_dataset(other, tiny_bert_pack)
    PrefixCache(tmp_path / "cache", backbone, changed, micro_batch=4).prefix(1, expert)
    assert backbone.blocks_run() == {0}
    assert len(entries(tmp_path)) == 2
    shutil.copytree(tiny_bert_pack.path, tmp_path / "pack")
    manifest = tmp_path / "pack" / FILE
    manifest.write_text(manifest.read_text().replace('"tiny-bert"', '"altered"'))
    altered = CountingBackbone(Pack.open(tmp_path / "pack"))
    PrefixCache(tmp_path / "cache", altered, read_dataset(text_data, altered.pack), micro_batch=4).prefix(1, expert)
    assert altered.blocks_run() == {0}
    assert len(entries(tmp_path)) == 3


# --- what is kept -------------------------------------------------------------------------------------------


@pytest.fixture
def one(make: Callable[..., PrefixCache], expert: Expert, tmp_path: Path) -> int:
    """Bytes of an entry."""
    make().prefix(1, expert)
    found = size(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    return found


def test_the_least_recently_used_entry_goes_first(
    one: int, make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert, tmp_path: Path
) -> None:
    cache = make(limit=2 * one)
    for boundary in (3, 2, 3, 1):
        cache.prefix(boundary, expert)
        time.sleep(0.02)
    assert len(entries(tmp_path)) == 2
    backbone.blocks_run()
    cache.prefix(1, expert)
    cache.prefix(3, expert)
    assert backbone.blocks_run() == set()


def test_entries_together_stay_below_the_limit(
    one: int, make: Callable[..., PrefixCache], expert: Expert, tmp_path: Path
) -> None:
    for limit, most in ((one, 1), (2 * one - 1, 1), (2 * one, 2), (5 * one // 2, 2)):
        cache = make(limit=limit)
        for boundary in (0, 1, 2, 3, 1, 0):
            prefix = cache.prefix(boundary, expert)
            assert len(entries(tmp_path)) <= most
            assert size(tmp_path) <= limit
            assert prefix.recomputed == 0
            assert np.isfinite(prefix.batch(np.array([0]))[0]).all()
        assert len(entries(tmp_path)) == most
        assert cache.missing == 0


def test_the_entry_below_is_started_from_if_there_is_room_for_both_however_old_it_is(
    one: int,
    make: Callable[..., PrefixCache],
    backbone: CountingBackbone,
    data: Dataset,
    expert: Expert,
    tmp_path: Path,
) -> None:
    cache = make(limit=2 * one)
    cache.prefix(1, expert)
    (below,) = entries(tmp_path)
    cache.prefix(3, Expert(expert.layout))
    (other,) = entries(tmp_path) - {below}
    later = time.time() + 1000  # of a board that wakes up in the past
    os.utime(tmp_path / "cache" / other, (later, later))
    backbone.blocks_run()
    prefix = cache.prefix(3, expert)
    assert backbone.blocks_run() == {1, 2}
    check(prefix, direct(backbone, data, 3, expert), data.lengths.tolist())


def test_without_room_for_both_an_entry_is_computed_from_the_samples(
    one: int,
    make: Callable[..., PrefixCache],
    backbone: CountingBackbone,
    data: Dataset,
    expert: Expert,
    tmp_path: Path,
) -> None:
    cache = make(limit=one)
    cache.prefix(1, expert)
    backbone.blocks_run()
    prefix = cache.prefix(2, expert)
    assert backbone.blocks_run() == {0, 1}
    assert len(entries(tmp_path)) == 1
    check(prefix, direct(backbone, data, 2, expert), data.lengths.tolist())


def free(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """Pretend that the disk has this many free bytes."""
    usage = shutil.disk_usage("/")._replace(free=left)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_the_disks_reserve_stays_free(
    one: int, make: Callable[..., PrefixCache], expert: Expert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, RESERVE + one - 1)
    cache = make(limit=100 * one)
    assert cache.prefix(1, expert).recomputed == 1
    assert cache.missing == 1
    assert not (tmp_path / "cache").exists()
    free(monkeypatch, RESERVE + one)
    assert cache.prefix(1, expert).recomputed == 0
    assert cache.missing == 0


def test_old_entries_make_room_when_the_disk_is_full(
    one: int, make: Callable[..., PrefixCache], expert: Expert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make()
    cache.prefix(0, expert)
    cache.prefix(1, expert)
    free(monkeypatch, RESERVE)
    assert room(tmp_path / "cache") == size(tmp_path)
    assert cache.prefix(2, expert).recomputed == 0
    assert len(entries(tmp_path)) == 2
    assert size(tmp_path) <= 2 * one
    free(monkeypatch, RESERVE - 2 * one)  # something else has taken it: what is there stays as it is
    before = entries(tmp_path)
    assert cache.prefix(3, expert).recomputed == 3
    assert entries(tmp_path) == before
    assert cache.prefix(2, expert).recomputed == 0


# --- without room -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [0, 2, 3])
def test_without_room_the_blocks_run_for_each_batch(
    boundary: int,
    make: Callable[..., PrefixCache],
    backbone: CountingBackbone,
    data: Dataset,
    expert: Expert,
    tmp_path: Path,
) -> None:
    prefix = make(limit=100).prefix(boundary, expert)
    assert isinstance(prefix, ComputedPrefix)
    wanted = direct(backbone, data, boundary, expert)
    backbone.blocks_run()
    for _ in range(2):
        for some in split(np.arange(len(data)), 7):
            hidden, mask = prefix.batch(some)
            assert mask.sum(axis=(1, 2)).tolist() == data.lengths[some].tolist()
            for row, i in zip(hidden, some, strict=True):
                np.testing.assert_allclose(row[: data.lengths[i]], wanted[i], atol=1e-5)
        assert backbone.blocks_run() == set(range(boundary))
    np.testing.assert_allclose(prefix.pooled, [hidden.mean(axis=0) for hidden in wanted], atol=1e-5)
    assert not (tmp_path / "cache").exists()


def test_several_micro_batches_share_the_work_of_dequantising(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, data: Dataset, expert: Expert
) -> None:
    prefix = make(codec="none").prefix(3, expert)
    groups = split(np.arange(len(data)), 4)
    backbone.runs = []
    parts = [(hidden.copy(), mask.copy()) for hidden, mask in prefix.parts(groups)]
    assert backbone.runs == sorted(backbone.runs)  # all micro-batches go through a block before the next one
    for some, (hidden, _) in zip(groups, parts, strict=True):
        np.testing.assert_array_equal(hidden, prefix.batch(some)[0])


def test_many_groups_come_in_their_order_and_not_all_at_once(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, data: Dataset, expert: Expert
) -> None:
    prefix = make(codec="none").prefix(1, expert)
    groups = split(np.random.default_rng(0).permutation(np.tile(np.arange(len(data)), 5)), 7)
    backbone.runs = []
    found = prefix.parts(groups)
    parts = [(next(found)[1].copy(), len(backbone.runs))]
    parts += [(mask.copy(), len(backbone.runs)) for _, mask in found]
    for some, (mask, _) in zip(groups, parts, strict=True):
        assert mask.sum(axis=(1, 2)).tolist() == data.lengths[some].tolist()
    assert parts[0][1] == CHUNK // 7  # as many groups as make a chunk
    assert parts[-1][1] == len(groups)


def test_means_are_computed_once_and_adapters_may_change_meanwhile(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert
) -> None:
    cache = make(codec="none")
    before = expert.copy()
    pooled = cache.prefix(2, expert).pooled
    backbone.blocks_run()
    assert cache.prefix(2, expert).pooled is pooled
    assert backbone.blocks_run() == set()
    prefix = cache.prefix(2, expert)
    hidden = prefix.batch(np.array([0, 1]))[0].copy()
    expert.vector[:] = 0
    np.testing.assert_array_equal(prefix.batch(np.array([0, 1]))[0], hidden)
    assert np.abs(cache.prefix(2, expert).pooled - pooled).max() > 0.01
    np.testing.assert_array_equal(cache.prefix(2, before).pooled, pooled)


def test_that_there_is_no_room_is_said_once_with_what_is_missing(
    one: int, make: Callable[..., PrefixCache], expert: Expert, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make(limit=one - 20 * 1024)
    with caplog.at_level(logging.WARNING):
        for boundary in (1, 2, 1):
            cache.prefix(boundary, expert)
    assert cache.missing == 20 * 1024
    (line,) = caplog.messages
    assert f"an entry takes {one / (1 << 20):.2f} MiB, 0.02 MiB more than there is" in line


@pytest.mark.parametrize("stop_at", range(1, 7))
def test_a_disk_that_is_full_after_all_leaves_nothing_and_the_blocks_run(
    stop_at: int, make: Callable[..., PrefixCache], expert: Expert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th time that something is forced onto the disk, it is full."""
    failing(monkeypatch, stop_at, errno.ENOSPC)
    cache = make()
    prefix = cache.prefix(1, expert)
    assert (prefix.recomputed == 1) is (cache.missing > 0) is (stop_at <= 5)
    assert len(list((tmp_path / "cache").iterdir())) <= 1
    assert not list((tmp_path / "cache").glob(".*"))
    assert np.isfinite(prefix.batch(np.arange(5))[0]).all()


def failing(monkeypatch: pytest.MonkeyPatch, stop_at: int, code: int) -> None:
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


# --- what is damaged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", range(1, 6))
def test_a_disk_that_fails_leaves_a_whole_entry_or_none(
    stop_at: int,
    make: Callable[..., PrefixCache],
    backbone: CountingBackbone,
    data: Dataset,
    expert: Expert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(monkeypatch, stop_at, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        make().prefix(1, expert)
    monkeypatch.undo()
    assert not list((tmp_path / "cache").glob(".*"))
    check(make().prefix(1, expert), direct(backbone, data, 1, expert), data.lengths.tolist())


def test_an_interrupted_computation_leaves_nothing(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert, tmp_path: Path
) -> None:
    backbone.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        make(micro_batch=4).prefix(2, expert)
    assert entries(tmp_path) == set()
    backbone.stop_after = None
    make().prefix(2, expert)
    assert len(entries(tmp_path)) == 1


KILLED = """
import os, sys
from pathlib import Path
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.pack.pack import Pack

class Killed(Backbone):
    def forward(self, *_):
        os._exit(9)

pack = Pack.open(Path(sys.argv[1]))
data = read_dataset(Path(sys.argv[2]), pack)
expert = Expert(Layout.of(pack.manifest, classes=2))
PrefixCache(Path(sys.argv[3]), Killed(pack, threads=1), data, micro_batch=4).prefix(1, expert)
"""


def test_what_a_killed_process_left_behind_is_cleared_away(
    make: Callable[..., PrefixCache], expert: Expert, tiny_bert_pack: Pack, text_data: Path, tmp_path: Path
) -> None:
    arguments = [str(tiny_bert_pack.path), str(text_data), str(tmp_path / "cache")]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode == 9
    assert list((tmp_path / "cache").iterdir())
    make().prefix(2, expert)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [
    lambda entry: cut(entry / HIDDEN),
    lambda entry: cut(entry / POOLED),
    lambda entry: cut(entry / ENTRY),
    lambda entry: flip(entry / HIDDEN, 1000),
    lambda entry: flip(entry / HIDDEN, -1),
    lambda entry: flip(entry / POOLED, 3),
    lambda entry: flip(entry / ENTRY, 9),
    lambda entry: flip(entry / ENTRY, -9),
    lambda entry: (entry / ENTRY).write_bytes(b"[" * 100_000),
    lambda entry: (entry / HIDDEN).unlink(),
    lambda entry: (entry / POOLED).unlink(),
    lambda entry: (entry / ENTRY).unlink(),
    lambda entry: [file.unlink() for file in entry.iterdir()],
], ids=[
    "hidden cut", "means cut", "description cut", "hidden flipped", "last bit flipped", "means flipped",
    "description flipped", "hash flipped", "description nested", "no hidden", "no means", "no description", "empty",
])  # fmt: skip
@pytest.mark.parametrize("boundary", [1, 3])
def test_a_damaged_entry_is_noticed_and_computed_again(
    boundary: int,
    damage: Callable[[Path], object],
    make: Callable[..., PrefixCache],
    backbone: CountingBackbone,
    data: Dataset,
    expert: Expert,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make().prefix(1, expert)
    (entry,) = entries(tmp_path)
    damage(tmp_path / "cache" / entry)
    backbone.blocks_run()
    prefix = make().prefix(boundary, expert)  # itself, or as the one to start from
    assert backbone.blocks_run() == set(range(boundary))
    assert f"{entry} is damaged" in caplog.text
    check(prefix, direct(backbone, data, boundary, expert), data.lengths.tolist())


@pytest.mark.parametrize("what", ["boundary", "codec"])
def test_an_entry_of_something_else_under_this_name_is_noticed(
    what: str,
    make: Callable[..., PrefixCache],
    backbone: CountingBackbone,
    data: Dataset,
    expert: Expert,
    tmp_path: Path,
) -> None:
    make().prefix(1, expert)
    (mine,) = entries(tmp_path)
    other = make(codec="int8").prefix(1, expert) if what == "codec" else make().prefix(0, expert)
    (foreign,) = entries(tmp_path) - {mine}
    assert other.boundary == (1 if what == "codec" else 0)
    shutil.rmtree(tmp_path / "cache" / mine)
    (tmp_path / "cache" / foreign).rename(tmp_path / "cache" / mine)
    check(make().prefix(1, expert), direct(backbone, data, 1, expert), data.lengths.tolist())


def test_an_entry_is_hashed_when_it_is_first_opened_and_not_again(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert, tmp_path: Path
) -> None:
    make().prefix(1, expert)
    cache = make()
    cache.prefix(1, expert)
    (entry,) = entries(tmp_path)
    flip(tmp_path / "cache" / entry / POOLED, 0)
    backbone.blocks_run()
    cache.prefix(1, expert)
    assert backbone.blocks_run() == set()
    make().prefix(1, expert)
    assert backbone.blocks_run() == {0}


def test_a_file_that_is_cut_off_while_it_is_in_use_is_named(
    make: Callable[..., PrefixCache], data: Dataset, expert: Expert, tmp_path: Path
) -> None:
    prefix = make().prefix(1, expert)
    (entry,) = entries(tmp_path)
    cut(tmp_path / "cache" / entry / HIDDEN)
    with pytest.raises(FileAccessError, match=f"{entry}/{HIDDEN} was cut off"):
        prefix.batch(np.arange(len(data)))


# --- what is not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["f16", "int8"])
def test_a_sample_whose_hidden_state_is_not_finite_is_named_by_its_line(
    codec: Any, poisoned_pack: Pack, text_data: Path, tmp_path: Path
) -> None:
    data = read_dataset(text_data, poisoned_pack)
    cache = PrefixCache(tmp_path / "cache", Backbone(poisoned_pack, threads=1), data, micro_batch=4, codec=codec)
    with pytest.raises(DataError, match=f"{text_data}, line (7|15|23): the hidden state before block 1 is not finite"):
        cache.prefix(1, Expert(Layout.of(poisoned_pack.manifest, classes=2)))
    assert entries(tmp_path) == set()


def test_a_hidden_state_that_float16_cannot_hold_is_refused_and_int8_can(
    tiny_dinov2_pack: Pack, pictures: Dataset, tmp_path: Path
) -> None:
    expert = Expert.initial(Layout.of(tiny_dinov2_pack.manifest, classes=2), seed=0)
    expert.tensors["blocks.0.fc1.B"][...] = 1e6
    backbone = Backbone(tiny_dinov2_pack, threads=1)
    large = max(float(np.abs(hidden).max()) for hidden in direct(backbone, pictures, 1, expert))
    assert 65504 < large < np.inf
    with pytest.raises(DataError, match=r"safetensors, samples? \d.*: the hidden state .*, as f16, is not finite"):
        PrefixCache(tmp_path / "cache", backbone, pictures, micro_batch=4).prefix(1, expert)
    stored = PrefixCache(tmp_path / "cache", backbone, pictures, micro_batch=4, codec="int8").prefix(1, expert)
    assert np.isfinite(stored.batch(np.arange(6))[0]).all()
