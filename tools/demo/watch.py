"""The live table: where each device of a fleet stands, from the presence messages on the broker."""

from __future__ import annotations

from statistics import fmean

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import Presence, open_envelope
from fleetune.edge.protocol.topics import Topics
from fleetune.profiles.fleet import Fleet

_COLOURS = {"working": "cyan", "online": "green", "idle": "green", "declined": "red", "failed": "red", "offline": "dim"}


class Watch:
    """Listens to a fleet.

    Args:
        broker: Where the broker listens.
        fleet: Whose devices to show.
    """

    def __init__(self, broker: BrokerAddress, fleet: Fleet) -> None:
        self._fleet = fleet
        self._topics = Topics(fleet.name)
        self._presence: dict[str, Presence] = {}
        self._begun: tuple[object, ...] = ()
        self._scores: dict[tuple[object, ...], dict[str, float]] = {}  # job, stage and round → device → accuracy
        topics = [self._topics.presence("+"), self._topics.aggregator_presence]
        self._link = Link(broker, f"{fleet.name}-watch", subscriptions=topics)

    def __enter__(self) -> Watch:
        self._link.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def update(self, timeout: float) -> list[str]:
        """Take what arrives within ``timeout`` seconds; returns a line for each round that began."""
        lines = []
        for event in self._link.events(timeout):
            if isinstance(event, Received):
                try:
                    presence = open_envelope(event.payload, Presence)
                except MessageError:
                    continue  # somebody else's retained message: nothing to show
                self._presence[presence.name] = presence
                place = tuple(presence.facts.get(name) for name in ("job", "stage", "round"))
                if presence.state == "idle" and "test" in presence.facts:
                    self._scores.setdefault(place, {})[presence.name] = float(presence.facts["test"])
                if presence.name == "aggregator" and place not in (self._begun, (None, None, None)):
                    self._begun = place
                    lines.append(self._round())
        return lines

    def line(self) -> str:
        """What the fleet does now, in one line."""
        aggregator = self._presence.get("aggregator")
        if aggregator is None or "job" not in aggregator.facts:
            return aggregator.detail if aggregator else "waits for the aggregator"
        return f"{self._round()}, {aggregator.facts['updates']} of {len(self._fleet.devices)} updates"

    def _round(self) -> str:
        facts = self._presence["aggregator"].facts
        return (
            f"{facts['job']}: {facts['stage']}, round {facts['round']} of {facts['rounds']}, SAL allows "
            f"depth {facts['depth']}{self._accuracy()}"
        )

    def _accuracy(self) -> str:
        """The mean of the last round that all devices of this job have finished."""
        whole = [place for place, scores in self._scores.items() if len(scores) == len(self._fleet.devices)]
        if not whole or whole[-1][0] != self._presence["aggregator"].facts["job"]:
            return ""
        _, stage, number = whole[-1]
        return f", mean accuracy {fmean(self._scores[whole[-1]].values()):.3f} after {stage} {number}"

    def render(self) -> Group:
        """The table."""
        table = Table(expand=True)
        for heading in ("device", "state", "plan", "round", "done", "loss", "accuracy", "up", "down"):
            table.add_column(heading, justify="right" if heading in ("loss", "accuracy", "up", "down") else "left")
        for device in self._fleet.devices:
            presence = self._presence.get(device.id)
            facts = presence.facts if presence else {}
            state = presence.state if presence else "offline"
            plan = f"{facts['plan']} ({facts['bound_by']})" if "plan" in facts else ""
            table.add_row(
                f"{device.id}\n[dim]{device.profile.name}[/dim]",
                Text(state, style=_COLOURS[state]),
                plan,
                f"{facts.get('stage', '')} {facts.get('round', '')}",
                ProgressBar(total=1.0, completed=float(facts.get("progress", 0.0)), width=10),
                f"{facts['loss']:.3f}" if "loss" in facts else "",
                f"{facts['test']:.3f}" if "test" in facts else "",
                _bytes(facts.get("bytes_up", 0)),
                _bytes(facts.get("bytes_down", 0)),
            )
        return Group(table, Text(self.line(), style="bold"))


def _bytes(count: float | int | str | bool) -> str:
    return f"{int(count) / 1024:.0f} KiB"
