"""How the updates of a round become one: each rule is a file and one line in :data:`RULES`."""

from __future__ import annotations

from fleetune.server.rules.base import Rule
from fleetune.server.rules.coordinates import Median, TrimmedMean
from fleetune.server.rules.krum import MultiKrum
from fleetune.server.rules.mean import Mean

RULES: dict[str, type[Rule]] = {
    "mean": Mean,
    "trimmed-mean": TrimmedMean,
    "median": Median,
    "multi-krum": MultiKrum,
}
