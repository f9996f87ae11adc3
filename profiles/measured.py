"""What `fleetune profile` measured on a device, as it stands in the device's profile beside what is declared."""

from __future__ import annotations

from typing import Annotated

import msgspec

from fleetune.edge.protocol.messages import encode
from fleetune.edge.resources.costs import Costs

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Trials of one pack on one device.

    Attributes:
        taken: When, in UTC, by the device's own clock.
        device: The board's name in its device tree, or the processor's where there is none.
        kernel: Release of its kernel.
        memory_mib: Memory that the kernel manages.
        backbone: Name of the pack's backbone.
        costs: The trials, and the versions and the power mode that they are of.
        key: Id of the device's key; absent while it has none.
        signature: Ed25519 signature of :meth:`signed`, in hexadecimal; absent while the device has no key.
    """

    taken: str
    device: str
    kernel: str
    memory_mib: _Positive
    backbone: str
    costs: Costs
    key: str | None = None
    signature: str | None = None

    def signed(self) -> bytes:
        """Canonical bytes of everything but the signature."""
        return encode(msgspec.structs.replace(self, key=None, signature=None))

    @property
    def contradiction(self) -> tuple[str, str] | None:
        """The first field that cannot be true beside the others, and why; None if all of them can."""
        for index, trial in enumerate(self.costs.trials):
            field = f"costs.trials[{index}]"
            if not trial.base_mib <= trial.frozen_mib <= trial.peak_mib:
                return f"{field}.peak_mib", "a peak only grows: base_mib, then frozen_mib, then peak_mib"
            if trial.peak_mib > self.memory_mib:
                return f"{field}.peak_mib", f"{trial.peak_mib:g} MiB are more than the machine's {self.memory_mib:g}"
        return None

    def replaces(self, other: Measured) -> bool:
        """Whether this is a newer measurement of the same: one pack, as many threads, one power mode."""
        return all(
            getattr(self.costs, name) == getattr(other.costs, name) for name in ("pack", "threads", "power_mode")
        )
