"""The updates of a round in memory, in place of a journal: for rounds that are led in one process."""

from __future__ import annotations

from fleetune.edge.protocol.codec import Tensors
from fleetune.edge.protocol.messages import Announcement
from fleetune.server.job import RuleSettings
from fleetune.server.journal import Accepted, Typical
from fleetune.server.round import OpenRound
from fleetune.server.rules.base import Bounds
from fleetune.server.strategies.base import NextRound


class HeldRound(OpenRound):
    """An open round whose updates no journal keeps.

    Args:
        announcement: As it was announced.
        plan: What the strategy asked for.
        settings: The rule.
        typical: What was typical of the round before.
    """

    def __init__(
        self, announcement: Announcement, plan: NextRound, settings: RuleSettings, typical: Typical | None
    ) -> None:
        self._held: dict[str, Tensors] = {}
        super().__init__(announcement, plan, Bounds(settings, typical), self._load)

    def _load(self, accepted: Accepted) -> Tensors:
        return self._held[accepted.manifest.device]

    def add(self, accepted: Accepted, tensors: Tensors) -> None:
        """Take an update."""
        self._held[accepted.manifest.device] = tensors
        super().add(accepted, tensors)
