"""Malicious devices of the benchmark: what each sends, and what comes of it under a rule that bounds it or none."""

from __future__ import annotations

import gzip
import itertools
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the picture needs fleetune[server]")

from fleetune.edge.pack.pack import Pack
from fleetune.server.job import RuleSettings
from fleetune.server.rules.base import norm_of
from fleetune.tools.assets.datasets import ImageRows
from fleetune.tools.bench.learning import attacks
from fleetune.tools.bench.learning.attack_fleet import Case, Outcome, Scale, World, run_case, write_prefix, write_world
from fleetune.tools.bench.learning.attack_plot import draw
from fleetune.tools.bench.learning.attackers import ATTACKS, BACKDOOR, TARGET, Attack, Knowledge, with_trigger
from support.updates import Tensors, tensors

SCALE = Scale(devices=5, train=60, rounds=3, test=60)
WORLD = World(seed=0, alpha=100.0)
UNBOUNDED = RuleSettings(clip=float("inf"), outlier=float("inf"), weight=float("inf"))


def attack(name: str) -> Attack:
    return next(one for one in ATTACKS if one.name == name)


# --- what is sent -----------------------------------------------------------------------------------------------


@pytest.fixture
def known() -> Knowledge:
    rng = np.random.default_rng(0)
    honest = [tensors(rng, {"blocks.0.query.A": (40,), "head.bias": (9,)}, loc=1.0) for _ in range(6)]
    honest += [{"head.bias": tensor["head.bias"]} for tensor in honest[:1]]  # it trains less than the others
    return Knowledge(own=honest[0], honest=honest, devices=10, malicious=3)


def crafted(name: str, known: Knowledge, seed: int = 0) -> Tensors:
    return attack(name).craft(known, np.random.default_rng(seed))


@pytest.mark.parametrize(("name", "factor"), [
    ("sign flip", -1), ("reversed, x 10", -10), ("reversed, x 1000", -1000), (BACKDOOR, 10 / 3), ("label flip", 1),
])  # fmt: skip
def test_what_is_learned_is_sent_times_a_factor(name: str, factor: float, known: Knowledge) -> None:
    sent = crafted(name, known)
    assert sent.keys() == known.own.keys()
    for key, tensor in known.own.items():
        np.testing.assert_allclose(sent[key], factor * tensor, rtol=1e-6)
        assert sent[key].dtype == np.float32


def test_noise_is_ten_times_as_large_as_an_honest_update_and_never_the_same(known: Knowledge) -> None:
    first, second = crafted("Gaussian", known, 0), crafted("Gaussian", known, 1)
    assert norm_of(first) == pytest.approx(10 * norm_of(known.own), rel=1e-5)
    assert not np.array_equal(first["head.bias"], second["head.bias"])


def test_those_who_collude_send_the_same_close_to_the_honest_mean(known: Knowledge) -> None:
    first, second = crafted("collusion", known, 0), crafted("collusion", known, 1)
    np.testing.assert_array_equal(first["head.bias"], second["head.bias"])
    sent = np.stack([some["blocks.0.query.A"] for some in known.honest[:6]])
    np.testing.assert_allclose(first["blocks.0.query.A"], sent.mean(axis=0) - 1.5 * sent.std(axis=0), rtol=1e-5)


def test_poison_changes_labels_or_marks_every_other_picture() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (6, 28, 28), dtype=np.uint8)
    rows = ImageRows(images, np.array([0, 1, 2, 3, 4, 9]), np.zeros(6, np.uint8))
    flip, backdoor = attack("label flip").poison, attack(BACKDOOR).poison
    assert flip is not None
    assert backdoor is not None
    assert flip(rows, 10).labels.tolist() == [9, 8, 7, 6, 5, 0]
    marked = backdoor(rows, 10)
    assert marked.labels.tolist() == [TARGET, 1, TARGET, 3, TARGET, 9]
    np.testing.assert_array_equal(marked.images[::2], with_trigger(images[::2]))
    np.testing.assert_array_equal(marked.images[1::2], images[1::2])
    assert (with_trigger(images) != images).any(axis=(1, 2)).all()
    assert rows.images is images  # the device's own stay as they are
    assert (images < 200).all()


# --- what comes of it -------------------------------------------------------------------------------------------


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in the form of Fashion-MNIST whose class is where they are bright."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, rows in (("train", 2000), ("t10k", 500)):
        labels = (np.arange(rows) % 10).astype(np.uint8)
        images = rng.integers(0, 30, (rows, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            down, across = divmod(int(label), 4)
            image[9 * down : 9 * down + 9, 7 * across : 7 * across + 7] += 200
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), 1))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), 1))
    return folder


@pytest.fixture(scope="module")
def root(source: Path, tiny_dinov2_pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("worlds")
    files = write_world(root, source, WORLD, SCALE, malicious=2, attacks=ATTACKS)
    names = {file.stem for file in files}
    assert len([name for name in names if name.endswith(BACKDOOR)]) == 2  # what attackers mark is computed apart
    assert not any(name.endswith("flip") for name in names)  # pictures with other labels are the same pictures
    for file in files:
        write_prefix(tiny_dinov2_pack.path, file)
    return root


@pytest.fixture
def run(root: Path, tiny_dinov2_pack: Pack) -> Any:
    def run(rule: RuleSettings, name: str = "", malicious: int = 1) -> Outcome:
        case = Case(WORLD, rule, name, malicious if name else 0)
        return run_case(root, tiny_dinov2_pack.path, SCALE, case)

    return run


def test_a_fleet_learns_and_the_same_run_gives_the_same(run: Any) -> None:
    honest = run(RuleSettings())
    assert honest.accuracy > 0.3  # by chance 0.1
    assert honest == run(RuleSettings())
    assert (honest.refused, honest.refused_honest) == (0, 0)
    assert len(honest.norms) == SCALE.devices * SCALE.rounds


def test_without_bounds_one_device_undoes_everything_and_with_them_it_does_not(run: Any) -> None:
    honest, ruined, bounded = (
        run(RuleSettings()),
        run(UNBOUNDED, "reversed, x 1000"),
        run(RuleSettings(), "reversed, x 1000"),
    )
    assert ruined.accuracy < 0.25
    assert bounded.accuracy > honest.accuracy - 0.2
    assert (ruined.refused, bounded.refused) == (0, SCALE.rounds - 1)  # in the first nothing is typical yet
    assert bounded.refused_honest == 0


def test_a_claim_of_many_samples_is_worth_little(run: Any) -> None:
    name = "sign flip, claims 1000 x"
    assert run(UNBOUNDED, name).accuracy < 0.25
    assert run(RuleSettings("median"), name).accuracy > 0.3
    alone = replace(RuleSettings(), weight=1.0)
    assert run(alone, name) == run(alone, "sign flip")


def test_attackers_learn_from_poisoned_samples(run: Any) -> None:
    honest, flipped = run(UNBOUNDED), run(UNBOUNDED, "label flip", 2)
    assert flipped.accuracy < honest.accuracy
    marked = run(UNBOUNDED, BACKDOOR, 2)
    assert marked.fooled > honest.fooled + 0.3


def test_whoever_attacks_among_few_does_so_among_more() -> None:
    chosen = [World(7, 1.0).malicious(10, count) for count in range(4)]
    assert [len(some) for some in chosen] == [0, 1, 2, 3]
    assert all(some < more for some, more in itertools.pairwise(chosen))
    assert World(7, 1.0).malicious(10, 3) != World(8, 1.0).malicious(10, 3)


# --- what is reported -------------------------------------------------------------------------------------------


def outcome(case: Case) -> Outcome:
    """Of rules without bounds little is left; every seed is a point better than the one before."""
    bounded = case.rule.clip < 1e9
    accuracy = (0.7 if bounded or not case.attack else 0.1) + case.world.seed / 100
    refused = case.malicious if bounded and case.attack == "reversed, x 1000" else 0
    return Outcome(accuracy, 0.9 if case.attack == BACKDOOR else 0.05, refused, 0, (0.8, 1.2))


def test_a_full_run_has_every_attack_share_and_rule_in_its_tables() -> None:
    results = attacks._Results(attacks.FULL, {case: outcome(case) for case in attacks.FULL.cases()})
    clean, attacked, fooled = attacks._grids(attacks.FULL, results)
    assert clean.head == ("classes", "mean, no bounds", "mean", "trimmed-mean", "median", "multi-krum")
    assert len(clean.rows) == 3
    assert len(attacked.rows) == 3 * len(ATTACKS)
    rows = {(name, share): cells for name, share, *cells in attacked.rows}
    assert rows["sign flip", "20 %"] == ["11.0 %", *["71.0 %"] * 4]  # medians over three seeds
    assert fooled.rows[0] == ["none", "0 %", *["5.0 %"] * 5]
    assert fooled.rows[-1] == [BACKDOOR, "30 %", *["90.0 %"] * 5]
    lines = fooled.as_markdown().splitlines()
    assert lines[-1] == "| backdoor | 30 % | " + " | ".join(["90.0 %"] * 5) + " |"
    figures = {one.name: one for one in attacks._figures(attacks.FULL, results)}
    assert figures["sign flip, 30 % malicious, median: accuracy"].spread == (0.7, 0.72)
    assert figures["backdoor, 10 % malicious, mean: fooled by the trigger"].value == 0.9
    notes = list(attacks._notes(attacks.FULL, results))
    assert "norms of honest updates: 0.80 to 1.20 of the median of their round" in notes
    assert f"reversed, x 1000: {3 * 4 * 6} of {3 * 4 * 6 * 8} updates of attackers were refused as outliers" in notes


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    results = attacks._Results(attacks.QUICK, {case: outcome(case) for case in attacks.QUICK.cases()})
    draw(tmp_path / "attacks.png", "a run", list(attacks._curves(attacks.QUICK, results)))
    assert (tmp_path / "attacks.png").read_bytes().startswith(b"\x89PNG")
