"""The live table: where each device of a fleet stands, from the presence messages on the broker."""

from __future__ import annotations

from statistics import fmean

from rich.console import Group
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import Presence, open_envelope
from fleetune.edge.protocol.topics import Topics
from fleetune.profiles.fleet import Fleet
from fleetune.tools.text import visible

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
                test = _number(presence, "test")
                if presence.state == "idle" and test is not None:
                    self._scores.setdefault(place, {})[presence.name] = test
                if presence.name == "aggregator" and place not in (self._begun, (None, None, None)):
                    self._begun = place
                    lines.append(self._round())
        return lines

    def line(self) -> str:
        """What the fleet does now, in one line."""
        aggregator = self._presence.get("aggregator")
        if aggregator is None or "job" not in aggregator.facts:
            return visible(aggregator.detail) if aggregator else "waits for the aggregator"
        return f"{self._round()}, {_word(aggregator, 'updates')} of {len(self._fleet.devices)} updates"

    def _round(self) -> str:
        names = ("job", "stage", "round", "rounds", "depth")
        job, stage, number, rounds, depth = (_word(self._presence["aggregator"], name) for name in names)
        return f"{job}: {stage}, round {number} of {rounds}, SAL allows depth {depth}{self._accuracy()}"

    def _accuracy(self) -> str:
        """The mean of the last round that all devices of this job have finished."""
        whole = [place for place, scores in self._scores.items() if len(scores) == len(self._fleet.devices)]
        if not whole or whole[-1][0] != self._presence["aggregator"].facts.get("job"):
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
            state = presence.state if presence else "offline"
            plan = f"{_word(presence, 'plan')} ({_word(presence, 'bound_by')})" if _word(presence, "plan") else ""
            figures = (_number(presence, name) for name in ("loss", "test"))
            table.add_row(
                f"{device.id}\n[dim]{escape(device.profile.name)}[/dim]",
                Text(state, style=_COLOURS[state]),
                Text(plan),
                Text(f"{_word(presence, 'stage')} {_word(presence, 'round')}"),
                ProgressBar(total=1.0, completed=_number(presence, "progress") or 0.0, width=10),
                *("" if figure is None else f"{figure:.3f}" for figure in figures),
                *(_kib(presence, name) for name in ("bytes_up", "bytes_down")),
            )
        return Group(table, Text(self.line(), style="bold"))


def _word(presence: Presence | None, name: str) -> str:
    """A fact, whatever it is; empty without one."""
    return "" if presence is None else visible(str(presence.facts.get(name, "")))


def _number(presence: Presence | None, name: str) -> float | None:
    """A fact, if it is a number."""
    found = None if presence is None else presence.facts.get(name)
    return float(found) if isinstance(found, float | int) else None


def _kib(presence: Presence | None, name: str) -> str:
    return f"{(_number(presence, name) or 0) / 1024:.0f} KiB"
