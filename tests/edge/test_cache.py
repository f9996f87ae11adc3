"""The prefix cache: what it returns is what the blocks compute, and it computes only what is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import Prefix, PrefixCache, token_mask
from fleetune.edge.engine.dataset import Dataset, read_dataset
from fleetune.edge.engine.expert import Expert, FloatArray, Layout
from fleetune.edge.pack.manifest import FILE
from fleetune.edge.pack.pack import Pack


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
    def make(*, micro_batch: int = 5, entries: int = 3) -> PrefixCache:
        return PrefixCache(tmp_path / "cache", backbone, data, micro_batch=micro_batch, entries=entries)

    return make


@pytest.fixture
def expert(tiny_bert_pack: Pack) -> Expert:
    """Adapters that change what every block computes."""
    expert = Expert(Layout.of(tiny_bert_pack.manifest, classes=2))
    expert.vector[:] = np.random.default_rng(2).normal(0, 0.05, expert.vector.shape)
    return expert


def entries(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cache").iterdir()}


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
    for i, (hidden, length) in enumerate(zip(wanted, lengths, strict=True)):
        assert hidden.shape[0] == length
        np.testing.assert_allclose(prefix.hidden[i, :length].astype(np.float32), hidden, rtol=2e-3, atol=4e-3)
        np.testing.assert_allclose(prefix.pooled[i], hidden.mean(axis=0), rtol=2e-3, atol=4e-3)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [0, 1, 2, 3])
def test_an_entry_equals_running_the_blocks(
    boundary: int, make: Callable[..., PrefixCache], backbone: CountingBackbone, data: Dataset, expert: Expert
) -> None:
    prefix = make().prefix(boundary, expert)
    assert prefix.boundary == boundary
    check(prefix, direct(backbone, data, boundary, expert), data.lengths.tolist())


def test_an_entry_that_was_derived_step_by_step_equals_running_the_blocks(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, data: Dataset, expert: Expert
) -> None:
    cache = make(entries=4)
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
    again, _ = prefix.batch(some)
    np.testing.assert_array_equal(again, hidden)


def test_pictures_are_cached_too(tiny_dinov2_pack: Pack, tmp_path: Path) -> None:
    import safetensors.numpy

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    tensors = {"images": images, "labels": np.arange(6) % 2, "split": (np.arange(6) % 3).astype(np.uint8)}
    safetensors.numpy.save_file(tensors, tmp_path / "data.safetensors")
    data = read_dataset(tmp_path / "data.safetensors", tiny_dinov2_pack)
    backbone, expert = (
        Backbone(tiny_dinov2_pack, threads=1),
        Expert(Layout.of(tiny_dinov2_pack.manifest, classes=2)),
    )
    prefix = PrefixCache(tmp_path / "cache", backbone, data, micro_batch=4).prefix(2, expert)
    check(prefix, direct(backbone, data, 2, expert), data.lengths.tolist())


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


def test_the_least_recently_used_entry_goes_first(
    make: Callable[..., PrefixCache], backbone: CountingBackbone, expert: Expert, tmp_path: Path
) -> None:
    cache = make(entries=2)
    for boundary in (1, 3, 1, 2):
        cache.prefix(boundary, expert)
        time.sleep(0.02)
    assert len(entries(tmp_path)) == 2
    backbone.blocks_run()
    cache.prefix(1, expert)
    cache.prefix(2, expert)
    assert backbone.blocks_run() == set()


def test_the_entry_that_was_asked_for_survives_a_limit_of_one(
    make: Callable[..., PrefixCache], expert: Expert, tmp_path: Path
) -> None:
    cache = make(entries=1)
    for boundary in (0, 1, 2):
        prefix = cache.prefix(boundary, expert)
        assert len(entries(tmp_path)) == 1
        assert np.isfinite(prefix.batch(np.array([0]))[0]).all()


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
    make().prefix(2, expert)
    assert len(entries(tmp_path)) == 1


def test_an_entry_whose_file_was_cut_off_is_computed_again(
    make: Callable[..., PrefixCache],
    backbone: CountingBackbone,
    data: Dataset,
    expert: Expert,
    tmp_path: Path,
) -> None:
    make().prefix(1, expert)
    (entry,) = entries(tmp_path)
    file = tmp_path / "cache" / entry / "hidden.npy"
    os.truncate(file, file.stat().st_size // 2)
    prefix = make().prefix(1, expert)
    check(prefix, direct(backbone, data, 1, expert), data.lengths.tolist())
