"""A fleet has one aggregator: the one that came first stays, and says where it stands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.edge.protocol.identity.credential import AGGREGATOR, Sender
from fleetune.edge.protocol.link import Link
from fleetune.edge.protocol.messages import KIT, Announcement, Presence, PresenceState, shortened
from fleetune.edge.protocol.topics import Topics

log = logging.getLogger(__name__)

_CLAIM_AFTER = 0.5
"""Seconds in which the broker shows whether another aggregator is there."""

_RIVAL_PATIENCE = 30.0
"""Seconds after which a broker has noticed that a client is gone; the keep-alive is 15."""

_SPEAK_EVERY = 0.5
"""Seconds between two words on how far a round is."""

Facts = dict[str, float | int | str | bool]

OWN = Sender("aggregator", AGGREGATOR)
"""Who signs what an aggregator says: this one, or another of the same fleet."""


class Leadership:
    """This aggregator's place in its fleet.

    Args:
        topics: Of the fleet.
        run: The run that it leads.
        facts: Tells what a presence shows.
    """

    def __init__(self, topics: Topics, run: str, facts: Callable[[], Facts]) -> None:
        self._topics, self._run, self._facts = topics, run, facts
        self.boot = time.time_ns() // 1_000_000
        self.claimed = False
        self._rival: Presence | None = None
        self._rival_lives = False
        self._abandoned: set[str] = set()
        self._taken_back: list[str] = []
        self._said: tuple[PresenceState, str] = ("online", "starts")
        self._unsaid: tuple[PresenceState, str] | None = None
        self._spoke = 0.0

    def will(self) -> tuple[str, Presence]:
        """What the broker says when this process dies."""
        return self._topics.aggregator_presence, self._presence("offline", "the connection broke")

    def claim(self, link: Link, pump: Callable[[float], None]) -> None:
        """Make sure that this is the fleet's only aggregator.

        One whose machine died is gone after a while. What a broker kept of one over a restart of its own nobody takes
        back; so whoever is there is asked to say so.

        Args:
            link: To the broker.
            pump: Looks at what comes for so many seconds.

        Raises:
            RunFailedError: Another one leads the fleet.
        """
        now = time.monotonic()
        look, give_up = now + _CLAIM_AFTER, now + _RIVAL_PATIENCE
        while self._rival is not None or time.monotonic() < look:
            if time.monotonic() > give_up:
                if self._rival_lives:
                    raise self._not_alone()
                log.warning("the aggregator that the broker remembers does not answer; this one leads")
                break
            before = self._rival
            pump(0.1)
            if self._rival is not None and before is None:
                log.warning("another aggregator leads the fleet %s; waits for it to leave", self._topics.fleet)
                # Whoever leads contradicts who says that nobody does.
                self._publish(link, "offline", "waits for the one that leads", retain=False)
        self.claimed = True
        self.say(link, "online", "starts")
        for topic in self._abandoned:
            self._take_back(link, topic)

    def _not_alone(self) -> RunFailedError:
        return RunFailedError(
            f"another aggregator leads the fleet {self._topics.fleet}", "stop that one, or give this fleet another name"
        )

    def meet(self, link: Link, raw: bytes, *, retained: bool) -> None:
        """Another aggregator's presence, or one's own; the one that came first stays.

        Args:
            link: To the broker.
            raw: What came.
            retained: Whether the broker has kept it from earlier: then nobody may be there.

        Raises:
            RunFailedError: Both came at once, and the other one was first.
        """
        presence = link.seals.open(self._topics.aggregator_presence, raw, Presence, OWN)
        if presence.boot == self.boot:
            return
        there = presence.state not in ("offline", "failed")
        if not self.claimed:
            if there:
                self._rival, self._rival_lives = presence, self._rival_lives or not retained
            elif self._rival is not None and presence.boot == self._rival.boot:
                self._rival, self._rival_lives = None, False
        elif there and presence.boot < self.boot:  # both came at once
            raise self._not_alone()
        else:  # a late Will must not say that nobody is there
            self.say_again(link)

    def clear(self, link: Link, topic: str, raw: bytes) -> None:
        """Take back the announcement of a run that nobody leads any more, or devices would answer it."""
        if not raw or link.seals.open(topic, raw, Announcement, OWN).run == self._run:
            return
        if self.claimed:
            self._take_back(link, topic)
        else:
            self._abandoned.add(topic)

    def _take_back(self, link: Link, topic: str) -> None:
        self._taken_back.append(topic)
        link.publish(topic, b"", retain=True)

    def has_taken_back(self, topic: str) -> bool:
        """Whether an announcement that has just disappeared was taken back here; each is told once."""
        if topic not in self._taken_back:
            return False
        self._taken_back.remove(topic)
        return True

    # --- presence -----------------------------------------------------------------------------------------------

    def _presence(self, state: PresenceState, detail: str) -> Presence:
        return Presence(
            name="aggregator", state=state, boot=self.boot, kit=KIT, detail=shortened(detail), facts=self._facts()
        )

    def say(self, link: Link, state: PresenceState, detail: str) -> None:
        """Where the aggregator stands."""
        self._said, self._unsaid, self._spoke = (state, detail), None, time.monotonic()
        self._publish(link, state, detail, retain=True)

    def say_again(self, link: Link) -> None:
        """The same once more, if this aggregator leads: a Will may have contradicted it."""
        if self.claimed:
            self.say(link, *self._said)

    def _publish(self, link: Link, state: PresenceState, detail: str, *, retain: bool) -> None:
        link.say(self._topics.aggregator_presence, self._presence(state, detail), retain=retain)

    def say_sometimes(self, link: Link, state: PresenceState, detail: str) -> None:
        """The same, once it is long enough since the last time: five hundred answers are not five hundred words."""
        self._unsaid = state, detail
        self.catch_up(link)

    def catch_up(self, link: Link) -> None:
        """Say what was put off, unless it is too soon or something newer was said."""
        if self._unsaid is not None and time.monotonic() - self._spoke > _SPEAK_EVERY:
            self.say(link, *self._unsaid)
