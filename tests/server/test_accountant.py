"""ε from noise and rounds, beside the closed form and beside an accountant that knows nothing of it."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fleetune[server]'")

import dp_accounting
import mpmath
from dp_accounting.pld import PLDAccountant

from fleetune.server.accountant import epsilon, noise_for


def delta_of(epsilon: float, sigma: float) -> float:
    """Balle and Wang (2018), theorem 8, for a sensitivity of 1; in 60 digits, as it is e^ε times a tail."""
    with mpmath.workdps(60):
        half, shift = mpmath.mpf(1) / (2 * sigma), mpmath.mpf(epsilon) * sigma
        ahead, behind = mpmath.ncdf(half - shift), mpmath.ncdf(-half - shift)
        return float(ahead - mpmath.exp(epsilon) * behind)


@pytest.mark.parametrize("noise", [0.4, 0.8, 1.5, 5.0])
@pytest.mark.parametrize("rounds", [1, 9, 100])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_epsilon_is_that_of_the_closed_form(noise: float, rounds: int, delta: float) -> None:
    found = epsilon(rounds / noise**2, delta)
    sigma = noise / math.sqrt(rounds)  # k Gaussian mechanisms are one with σ/√k
    if found == 0:
        assert delta_of(0.0, sigma) <= delta
    else:
        assert delta_of(found, sigma) == pytest.approx(delta, rel=1e-5)


def test_more_rounds_and_less_noise_give_away_more() -> None:
    by_rounds = [epsilon(rounds / 4, 1e-5) for rounds in range(1, 40)]
    assert by_rounds == sorted(by_rounds)
    assert len(set(by_rounds)) == len(by_rounds)
    by_noise = [epsilon(9 / noise**2, 1e-5) for noise in (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)]
    assert by_noise == sorted(by_noise)
    assert epsilon(0.0, 1e-5) == 0.0


def test_rounds_with_different_noise_compose_as_another_accountant_says() -> None:
    noises = [1.5, 2.0, 2.0, 4.0, 1.2]
    other = PLDAccountant()
    for noise in noises:
        other.compose(dp_accounting.GaussianDpEvent(noise))
    found = epsilon(sum(noise**-2 for noise in noises), 1e-5)
    assert found == pytest.approx(other.get_epsilon(1e-5), rel=1e-3)


@pytest.mark.parametrize("wanted", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("devices", [1, 20, 1000])
def test_the_noise_for_an_epsilon_gives_that_epsilon(wanted: float, devices: int) -> None:
    noise = noise_for(wanted, 1e-5, 9, devices)
    assert epsilon(9 / (noise**2 * devices), 1e-5) == pytest.approx(wanted, rel=1e-6)
