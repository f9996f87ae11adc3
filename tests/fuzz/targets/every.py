"""Every parser of bytes from the network or the disk."""

from __future__ import annotations

from fuzz.target import Target
from fuzz.targets import aggregator, device, flashing, identities, machine, messages, settings, sides

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (messages, sides, device, aggregator, settings, machine, identities, flashing)
    for target in module.TARGETS
}
"""Name → target."""
