"""What a number of noisy sums give away: ε for a δ.

Gaussian mechanisms compose exactly: rounds whose noise is z₁, z₂, … times what one device can change are together one
mechanism with z = (Σ zᵢ⁻²)^(−1/2) (Dong, Roth and Su 2019, corollary 3.3). ε and δ of one are Balle and Wang's (2018,
theorem 8), as `dp-accounting` computes them.
"""

from __future__ import annotations

import math

from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian


def epsilon(spent: float, delta: float) -> float:
    """ε of a composition.

    Args:
        spent: Σ z⁻² over its rounds; 0 for none.
        delta: δ, between 0 and 1.
    """
    return float(get_epsilon_gaussian(1 / math.sqrt(spent), delta)) if spent else 0.0


def noise_for(epsilon: float, delta: float, rounds: int, devices: int) -> float:
    """Noise z that each of ``devices`` adds, so that ``rounds`` sums of all of them are (ε, δ)-private.

    Args:
        epsilon: ε, above 0.
        delta: δ, between 0 and 1.
        rounds: Rounds in which a device's update counts.
        devices: Devices whose noise is in each sum; 1 for whoever sees every update alone.
    """
    return float(get_sigma_gaussian(epsilon, delta)) * math.sqrt(rounds / devices)
