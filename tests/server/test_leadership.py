"""Who leads a fleet: aggregators that meet over a real broker, and what they leave there."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import RunFailedError
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import Announcement, Presence, PresenceState, open_envelope, seal
from fleetune.edge.protocol.topics import Topics
from fleetune.server import leadership as module
from fleetune.server.broker import embedded_broker, free_port
from fleetune.server.leadership import Facts, Leadership

TOPICS = Topics("lab")
LOOK, PATIENCE = 0.2, 0.6
"""Seconds that an aggregator looks for another one, and waits for it, in these tests."""

LEADER = """\
import sys, time
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.link import Link
from fleetune.edge.protocol.topics import Topics
from fleetune.server.leadership import Leadership

leadership = Leadership(Topics("lab"), "killed", dict)
link = Link(BrokerAddress.parse(sys.argv[1]), "leader", subscriptions=["none"], will=leadership.will)
link.connect()
leadership.claim(link, lambda seconds: list(link.events(seconds)))
print(leadership.boot, flush=True)
while True:
    list(link.events(1.0))
"""


class Contender:
    """An aggregator that does nothing but lead."""

    def __init__(self, broker: BrokerAddress, run: str) -> None:
        self.facts: Facts = {}
        self.leadership = Leadership(TOPICS, run, lambda: dict(self.facts))
        subscriptions = [TOPICS.aggregator_presence, TOPICS.current("+")]
        self.link = Link(broker, run, subscriptions=subscriptions, will=self.leadership.will)
        self.link.connect()

    def pump(self, seconds: float) -> None:
        for event in self.link.events(seconds):
            if isinstance(event, Received) and event.topic == TOPICS.aggregator_presence:
                self.leadership.meet(self.link, event.payload, retained=event.retained)
            elif isinstance(event, Received):
                self.leadership.clear(self.link, event.topic, event.payload)

    def claim(self, *others: Contender) -> None:
        """Want to lead, while others go on."""

        def pump(seconds: float) -> None:
            for one in (*others, self):
                one.pump(seconds / (1 + len(others)))

        self.leadership.claim(self.link, pump)

    def close(self) -> None:
        self.link.close()


class Lab:
    """A broker, the aggregators that want to lead there, and a stranger who sees and says everything."""

    def __init__(self, broker: BrokerAddress) -> None:
        self.broker = broker
        self._contenders: list[Contender] = []
        self._stranger = self._listen("stranger", "#")

    def _listen(self, name: str, topic: str) -> Link:
        link = Link(self.broker, name, subscriptions=[topic])
        link.connect()
        return link

    def contender(self, run: str) -> Contender:
        self._contenders.append(Contender(self.broker, run))
        return self._contenders[-1]

    def pump(self, seconds: float = 0.0) -> None:
        """Let everybody look at what comes, for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for contender in self._contenders:
                contender.pump(0.005)

    def say(self, topic: str, payload: bytes) -> None:
        """Leave a retained message, as one who is not here any more; returns when the broker has it."""
        self._stranger.publish(topic, payload, retain=True)
        self.await_retained(topic, lambda kept: kept == payload)

    def tell(self, topic: str, payload: bytes) -> None:
        """Say something to those who are here now."""
        self._stranger.publish(topic, payload)

    def await_retained(self, topic: str, wanted: Callable[[bytes], bool]) -> bytes:
        """What the broker keeps on a topic, nothing if that is nothing; once it is what is wanted, or time is over."""
        until = time.monotonic() + 5.0
        while True:
            with closing(self._listen("observer", topic)) as observer:
                ends, kept = time.monotonic() + 0.1, b""
                while not kept and time.monotonic() < ends:
                    kept = b"".join(e.payload for e in observer.events(0.02) if isinstance(e, Received) and e.retained)
            if wanted(kept) or time.monotonic() > until:
                return kept
            self.pump(0.02)

    def await_presence(self, **wanted: object) -> Presence:
        """The aggregator's presence, as one who comes now hears it; once it is as wanted, or time is over."""

        def fits(raw: bytes) -> bool:
            return raw != b"" and all(
                getattr(open_envelope(raw, Presence), name) == value for name, value in wanted.items()
            )

        return open_envelope(self.await_retained(TOPICS.aggregator_presence, fits), Presence)

    def said(self, seconds: float) -> list[Presence]:
        """Every presence of an aggregator that is said in so many seconds."""
        end, found = time.monotonic() + seconds, list[Presence]()
        while (left := end - time.monotonic()) > 0:
            for event in self._stranger.events(left):
                if isinstance(event, Received) and event.topic == TOPICS.aggregator_presence:
                    found.append(open_envelope(event.payload, Presence))
        return found

    def close(self) -> None:
        for contender in self._contenders:
            contender.close()
        self._stranger.close()


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setattr(module, "_CLAIM_AFTER", LOOK)
    monkeypatch.setattr(module, "_RIVAL_PATIENCE", PATIENCE)
    with embedded_broker(free_port()) as broker:
        lab = Lab(broker)
        yield lab
        lab.close()


def presence(state: PresenceState, boot: int) -> bytes:
    return seal(Presence(name="aggregator", state=state, boot=boot, kit="1"))


def announcement(run: str, job: str = "fedms") -> bytes:
    return seal(
        Announcement(
            fleet="lab", run=run, job=job, version=3, method="fedms", stage="global", round=1, rounds=6,
            backbone="b", quantisation="nf4", settings={}, issued=time.time(), expires=time.time() + 60,
        )
    )  # fmt: skip


# --- one stays --------------------------------------------------------------------------------------------------


def test_the_first_stays_and_the_second_names_the_fleet(lab: Lab) -> None:
    first = lab.contender("first")
    first.claim()
    first.leadership.say(first.link, "working", "announces global")
    lab.say(TOPICS.current("fedms"), announcement("first"))
    second, begun = lab.contender("second"), time.monotonic()  # it hears only what was retained
    with pytest.raises(RunFailedError, match="another aggregator leads the fleet lab") as caught:
        second.claim(first)
    assert PATIENCE <= time.monotonic() - begun < PATIENCE + 1
    assert "stop that one" in caught.value.remedy
    assert not second.leadership.claimed
    lab.pump(0.1)
    found = lab.await_presence(boot=first.leadership.boot)
    assert (found.boot, found.state, found.detail) == (first.leadership.boot, "working", "announces global")
    assert open_envelope(lab.await_retained(TOPICS.current("fedms"), bool), Announcement).run == "first"


@pytest.mark.parametrize("last", ["offline", "failed"])
def test_one_whose_rival_leaves_while_it_waits_takes_over(
    last: PresenceState, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RIVAL_PATIENCE", 30.0)
    first, second = lab.contender("first"), lab.contender("second")
    first.claim()
    begun = time.monotonic()

    def pump(seconds: float) -> None:
        second.pump(seconds)
        if first.leadership.claimed and time.monotonic() > begun + LOOK + 0.1:
            first.leadership.claimed = False
            first.leadership.say(first.link, last, "stopped")

    second.leadership.claim(second.link, pump)
    assert time.monotonic() - begun > LOOK + 0.1
    assert second.leadership.claimed
    assert lab.await_presence(boot=second.leadership.boot).state == "online"


@pytest.mark.parametrize("state", ["offline", "failed"])
def test_one_that_has_ended_is_no_rival(state: PresenceState, lab: Lab) -> None:
    lab.say(TOPICS.aggregator_presence, presence(state, boot=1))
    contender, begun = lab.contender("new"), time.monotonic()
    contender.claim()
    assert time.monotonic() - begun < PATIENCE
    found = lab.await_presence(boot=contender.leadership.boot)
    assert (found.boot, found.state) == (contender.leadership.boot, "online")


def test_one_of_whom_only_the_broker_knows_is_waited_for_and_then_no_rival(lab: Lab) -> None:
    """The power went for both, and the broker keeps what was retained on its disk."""
    lab.say(TOPICS.aggregator_presence, presence("working", boot=1))
    contender, begun = lab.contender("new"), time.monotonic()
    contender.claim()
    assert time.monotonic() - begun >= PATIENCE  # it may be cut off, and be back as soon as its link is
    assert lab.await_presence(boot=contender.leadership.boot).state == "online"


def test_of_two_that_wait_neither_takes_the_others_word_for_the_leaders(lab: Lab) -> None:
    first, second = lab.contender("first"), lab.contender("second")
    first.claim()
    second.leadership.boot = first.leadership.boot - 1000  # by a clock that is behind
    begun = time.monotonic()

    def pump(seconds: float) -> None:
        second.pump(seconds)
        lab.tell(TOPICS.aggregator_presence, presence("offline", boot=first.leadership.boot - 2000))

    with pytest.raises(RunFailedError, match="another aggregator leads"):
        second.leadership.claim(second.link, pump)
    assert time.monotonic() - begun >= PATIENCE


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_that_come_at_once_the_earlier_one_stays(order: tuple[int, int], lab: Lab) -> None:
    both = [lab.contender("earlier"), lab.contender("later")]
    assert both[0].leadership.boot < both[1].leadership.boot
    for number in order:
        both[number].leadership.claim(both[number].link, time.sleep)  # neither hears of the other before
    gone = set[int]()
    for _ in range(10):
        for number in {0, 1} - gone:
            try:
                both[number].pump(0.01)
            except RunFailedError as error:
                assert "another aggregator leads the fleet lab" in error.what
                both[number].leadership.say(both[number].link, "failed", str(error))
                both[number].close()
                gone.add(number)
    assert gone == {1}
    assert lab.await_presence(state="online").boot == both[0].leadership.boot


# --- what a death leaves ----------------------------------------------------------------------------------------


def test_one_that_is_killed_is_said_to_be_gone_and_another_takes_over_at_once(lab: Lab) -> None:
    command = [sys.executable, "-c", LEADER, str(lab.broker)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        boot = int(process.stdout.readline())
        assert lab.await_presence(boot=boot).state == "online"
        process.send_signal(signal.SIGKILL)
    found = lab.await_presence(state="offline")
    assert (found.boot, found.state, found.detail) == (boot, "offline", "the connection broke")
    contender = lab.contender("next")
    contender.claim()
    assert lab.await_presence(boot=contender.leadership.boot).state == "online"


def test_the_late_will_of_a_former_start_does_not_say_that_nobody_is_there(lab: Lab) -> None:
    leader = lab.contender("new")
    leader.claim()
    leader.facts["round"] = 2
    leader.leadership.say(leader.link, "working", "collects updates")
    lab.await_presence(state="working")
    lab.say(TOPICS.aggregator_presence, presence("offline", boot=leader.leadership.boot - 1000))
    lab.pump(0.1)
    found = lab.await_presence(boot=leader.leadership.boot)
    assert (found.boot, found.state, found.detail) == (leader.leadership.boot, "working", "collects updates")
    assert found.facts == {"round": 2}


# --- runs that nobody leads any more ----------------------------------------------------------------------------


def test_the_announcement_of_an_abandoned_run_is_taken_back_and_that_of_the_own_run_stays(lab: Lab) -> None:
    for job, run in (("one", "old"), ("two", "old"), ("mine", "new")):
        lab.say(TOPICS.current(job), announcement(run, job))
    leader = lab.contender("new")
    leader.claim()
    assert lab.await_retained(TOPICS.current("one"), lambda kept: not kept) == b""
    assert lab.await_retained(TOPICS.current("two"), lambda kept: not kept) == b""
    lab.pump(0.1)
    assert open_envelope(lab.await_retained(TOPICS.current("mine"), bool), Announcement).run == "new"


def test_the_announcement_of_an_abandoned_run_that_comes_later_is_taken_back_too(lab: Lab) -> None:
    leader = lab.contender("new")
    leader.claim()
    lab.say(TOPICS.current("mine"), announcement("new", "mine"))
    lab.say(TOPICS.current("one"), announcement("old", "one"))
    assert lab.await_retained(TOPICS.current("one"), lambda kept: not kept) == b""
    assert open_envelope(lab.await_retained(TOPICS.current("mine"), bool), Announcement).run == "new"


# --- how often --------------------------------------------------------------------------------------------------


def test_where_much_happens_it_is_said_twice_a_second_at_most_and_the_last_of_it_in_the_end(lab: Lab) -> None:
    leader = lab.contender("new")
    leader.claim()
    lab.said(0.1)
    begun = time.monotonic()
    for number in range(300):
        leader.facts["updates"] = number
        leader.leadership.say_sometimes(leader.link, "working", f"{number} of 300")
        leader.pump(0.002)
    often = lab.said(0.1)
    assert len(often) <= 2 * (time.monotonic() - begun) + 1
    until = time.monotonic() + 0.8
    while time.monotonic() < until:
        leader.leadership.catch_up(leader.link)
        leader.pump(0.05)
    rest = lab.said(0.1)
    assert [(said.detail, said.facts) for said in rest] == [("299 of 300", {"updates": 299})]


def test_what_was_put_off_is_not_said_after_something_newer(lab: Lab) -> None:
    leader = lab.contender("new")
    leader.claim()
    leader.leadership.say_sometimes(leader.link, "working", "collects updates")
    leader.leadership.say(leader.link, "working", "announces global")
    lab.said(0.1)
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        leader.leadership.catch_up(leader.link)
        leader.pump(0.05)
    assert lab.said(0.1) == []
