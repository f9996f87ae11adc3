"""What is said of privacy: by whom something is seen, who has a share in a sum, and who has sent most."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fleetune[server]'")

from fleetune.server.accountant import epsilon
from fleetune.server.job import JobPrivacy
from fleetune.server.privacy import Account, Guarantee, Shares, expected

Z, DELTA = 0.6, 1e-5
PRIVACY = JobPrivacy(Z, clip=0.5, gate_clip=0.02, delta=DELTA)
DEEP, SHALLOW = ("blocks.4.query.B", "blocks.5.query.B", "head.bias"), ("blocks.5.query.B", "head.bias")


def guarantee(*rounds: list[tuple[str, tuple[str, ...], float]], is_sum: bool = True) -> Guarantee:
    """Of rounds, each some updates: device, tensors, weight."""
    account = Account(PRIVACY)
    for updates in rounds:
        shares = Shares()
        for device, tensors, weight in updates:
            shares.add(device, tensors, weight)
        closed = shares.close(is_sum=is_sum)
        if closed is not None:
            account.add(closed)
    found = account.guarantee()
    assert found is not None
    return found


def all_of(devices: str, tensors: tuple[str, ...] = DEEP) -> list[tuple[str, tuple[str, ...], float]]:
    return [(device, tensors, 1.0) for device in devices]


def of_noise(multiplier: float, rounds: int) -> float:
    return pytest.approx(epsilon(rounds / multiplier**2, DELTA), abs=1e-4)  # type: ignore[return-value]


def test_who_sees_a_sum_sees_the_noise_of_all_that_are_in_it() -> None:
    found = guarantee(*[all_of("abcde")] * 9)
    assert found.epsilon["aggregator"] == of_noise(Z, 9)
    assert found.epsilon["model"] == of_noise(Z * math.sqrt(5), 9)
    assert found.epsilon["device"] == of_noise(Z * math.sqrt(4), 9)  # its own noise hides nothing from it
    assert (found.rounds, found.most_updates, found.fewest_devices) == (9, 9, 5)


def test_one_device_hides_from_nobody_behind_others() -> None:
    found = guarantee(all_of("a"))
    assert found.epsilon["model"] == found.epsilon["device"] == found.epsilon["aggregator"] == of_noise(Z, 1)


def test_a_block_that_few_devices_trained_has_the_noise_of_few() -> None:
    found = guarantee([*all_of("ab", DEEP), *all_of("cdefgh", SHALLOW)])
    assert found.epsilon["model"] == of_noise(Z * math.sqrt(2), 1)
    assert found.fewest_devices == 2


def test_the_device_that_sent_most_is_the_one_that_counts() -> None:
    found = guarantee(all_of("abc"), all_of("ab"), all_of("a"))
    assert found.most_updates == 3
    assert found.epsilon["aggregator"] == of_noise(Z, 3)
    spent = sum(1 / (Z**2 * devices) for devices in (3, 2, 1))
    assert found.epsilon["model"] == pytest.approx(epsilon(spent, DELTA), abs=1e-4)


def test_who_takes_part_in_fewer_rounds_gives_away_less() -> None:
    always, in_turns = guarantee(*[all_of("ab")] * 4), guarantee(*[all_of("ab"), all_of("cd")] * 2)
    for view, found in in_turns.epsilon.items():
        assert found < always.epsilon[view]


def test_a_late_update_brings_less_noise() -> None:
    found = guarantee([("a", DEEP, 1.0), ("b", DEEP, 0.5)])
    assert found.epsilon["model"] == of_noise(Z * math.sqrt(1.25), 1)


def test_two_updates_of_one_device_in_a_sum_can_change_it_twice_as_much() -> None:
    found = guarantee([("a", DEEP, 1.0), ("a", DEEP, 1.0), ("b", DEEP, 1.0)])
    assert found.epsilon["model"] == of_noise(Z * math.sqrt(3) / 2, 1)
    assert found.epsilon["aggregator"] == of_noise(Z, 2)


def test_behind_a_median_nobody_hides_another() -> None:
    """What is proved of sums is proved of no other rule; its result is worth what each update alone is worth."""
    found = guarantee(*[all_of("abcde")] * 9, is_sum=False)
    assert set(found.epsilon.values()) == {found.epsilon["aggregator"]}
    assert found.epsilon["model"] == of_noise(Z, 9)
    assert found.fewest_devices == 1


def test_a_round_in_which_nothing_is_sent_costs_nothing() -> None:
    assert guarantee(all_of("ab"), all_of("ab", ())) == guarantee(all_of("ab"))


def test_what_is_expected_is_what_comes_if_all_answer() -> None:
    assert expected(PRIVACY, 9, 5) == guarantee(*[all_of("abcde")] * 9)
    assert Account(PRIVACY).guarantee() is None


def test_in_words_it_names_all_that_it_follows_from() -> None:
    words = guarantee(*[all_of("abcde")] * 9).in_words()
    for part in ("δ = 1e-05", "at most 9 updates in 9 rounds", "0.6 times the clip", "at least 5 devices"):
        assert part in words
