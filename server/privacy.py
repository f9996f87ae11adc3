"""What an aggregator says of the privacy that its devices had: for whom, how much, and by which rounds.

Every device adds noise before anything leaves it, so the aggregator, and whoever listens on the way, sees one update
with the noise of one device. Whoever sees only sums sees the noise of all that are in the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from fleetune.server.job import JobPrivacy

FILE = "privacy.json"

SUMS = frozenset({"mean"})
"""Rules whose result is a sum, in which the noise of one device hides another; of other rules nothing is claimed."""

VIEWS = ("model", "device", "aggregator")
"""Against whom: whoever has the model or sees what is broadcast; another device of the fleet, which sees the same and
knows its own noise; whoever sees each update alone."""


class RoundPrivacy(msgspec.Struct, frozen=True):
    """What a round's sum hides behind. Weights are the factors of late updates, and 1 of all others.

    Attributes:
        devices: Device → weights of its updates in the sum: one, or more where late ones came in.
        noise: Sum of the squared weights, in the tensor that has the least: so many devices' noise is in it. 0 where
            the rule makes no sum: then each device hides behind its own noise alone.
        known: What is left of it to the device that knows its own noise, in the tensor that has the least.
    """

    devices: dict[str, list[float]]
    noise: float
    known: float


@dataclass
class Shares:
    """Who has a share in each tensor of a round that is open."""

    devices: dict[str, list[float]] = field(default_factory=dict)
    _noise: dict[str, float] = field(default_factory=dict)
    _largest: dict[str, float] = field(default_factory=dict)

    def add(self, device: str, tensors: Iterable[str], weight: float) -> None:
        """Take a private update of a device, with the names of its tensors."""
        names = list(tensors)
        if names:
            self.devices.setdefault(device, []).append(weight)
        for name in names:
            self._noise[name] = self._noise.get(name, 0.0) + weight**2
            self._largest[name] = max(self._largest.get(name, 0.0), weight**2)

    def close(self, *, is_sum: bool) -> RoundPrivacy | None:
        """What it comes to; nothing if no device sent anything."""
        if not self._noise:
            return None
        if not is_sum:
            return RoundPrivacy(self.devices, 0.0, 0.0)
        # A device alone in a tensor hides from no other that has a share in it.
        known = min(noise - self._largest[name] or noise for name, noise in self._noise.items())
        return RoundPrivacy(self.devices, min(self._noise.values()), known)


class Guarantee(msgspec.Struct, frozen=True):
    """The file ``privacy.json``: (ε, δ)-differential privacy of each device as a whole, of the rounds so far.

    Attributes:
        epsilon: :data:`VIEWS` → ε of the device that has the largest.
        delta: δ.
        noise: Standard deviation of a device's noise, over the clip; ε follows from it, whatever the clip is.
        clip: L2 norm that an update of the expert was cut to.
        gate_clip: L2 norm that an update of the gate's adapter was cut to.
        rounds: Closed rounds in which updates came.
        most_updates: Updates of the device that sent most.
        fewest_devices: Devices, at least, whose noise is in every tensor of every sum.
    """

    epsilon: dict[str, float]
    delta: float
    noise: float
    clip: float
    gate_clip: float
    rounds: int
    most_updates: int
    fewest_devices: float

    def in_words(self) -> str:
        """One line for a log."""
        model, device, aggregator = (self.epsilon[view] for view in VIEWS)
        fewest = "one device's" if self.fewest_devices == 1 else f"{self.fewest_devices:.3g} devices'"
        return (
            f"each device as a whole has ε = {model:.3g} against whoever has the model, {device:.3g} against another "
            f"device, {aggregator:.3g} against whoever sees its updates (δ = {self.delta:g}): at most "
            f"{self.most_updates} updates in {self.rounds} rounds, each with noise of {self.noise:.3g} times the clip, "
            f"at least {fewest} noise in a sum"
        )


class Account:
    """Adds up what the rounds of a job have given away.

    Args:
        privacy: What the job asks of its devices.
    """

    def __init__(self, privacy: JobPrivacy) -> None:
        self._privacy = privacy
        self._spent: dict[str, dict[str, float]] = {}  # device → view → Σ z⁻²
        self._updates: dict[str, int] = {}
        self._rounds, self._fewest = 0, float("inf")

    def add(self, round_: RoundPrivacy) -> None:
        """Take a closed round."""
        self._rounds += 1
        self._fewest = min(self._fewest, round_.noise or 1.0)
        scale = self._privacy.noise**-2
        for device, weights in round_.devices.items():
            together, spent = sum(weights) ** 2, self._spent.setdefault(device, {})
            alone = float(len(weights))
            sums = (together / round_.noise, together / round_.known) if round_.noise else (alone, alone)
            for view, cost in zip(VIEWS, (*sums, alone), strict=True):
                spent[view] = spent.get(view, 0.0) + cost * scale
            self._updates[device] = self._updates.get(device, 0) + len(weights)

    def guarantee(self) -> Guarantee | None:
        """What it comes to; nothing before a round with updates is closed."""
        if not self._rounds:
            return None
        from fleetune.server.accountant import epsilon  # the only part that needs more than the plain install

        privacy = self._privacy
        worst = {view: max(spent[view] for spent in self._spent.values()) for view in VIEWS}
        return Guarantee(
            {view: round(epsilon(spent, privacy.delta), 4) for view, spent in worst.items()},
            privacy.delta,
            privacy.noise,
            privacy.clip,
            privacy.gate_clip,
            self._rounds,
            max(self._updates.values()),
            round(self._fewest, 4),
        )


def others(devices: int) -> int:
    """Devices whose noise one of them does not know; one that is alone hides from nobody among them."""
    return max(1, devices - 1)


def expected(privacy: JobPrivacy, rounds: int, devices: int) -> Guarantee | None:
    """What it will come to if so many devices answer each of so many rounds with the same tensors."""
    account = Account(privacy)
    for _ in range(rounds):
        account.add(RoundPrivacy({str(number): [1.0] for number in range(devices)}, devices, others(devices)))
    return account.guarantee()
