"""Which announcements count: whatever the broker plants again, and however wrong the clocks are."""

from __future__ import annotations

import time

import pytest

from fleetune.edge.agent import heard as module
from fleetune.edge.agent.heard import Heard
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.clock import MAX_SKEW, Clock
from fleetune.edge.protocol.identity.credential import Sender
from fleetune.edge.protocol.link import Received
from fleetune.edge.protocol.messages import Announcement, TimeReply, TimeRequest, UpdateManifest
from support.guarded import DAY, GuardedFleet

LIFE = DAY
"""Of an announcement."""


def announcement(issued: float, job: str = "fedms") -> Announcement:
    return Announcement(
        fleet="lab", run="r", job=job, version=1, method="fedms", stage="global", round=1, rounds=6,
        backbone="b", quantisation="nf4", settings={}, issued=issued, expires=issued + LIFE,
    )  # fmt: skip


@pytest.fixture
def now() -> float:
    return time.time()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def newest() -> dict[str, float]:
    """What the agent keeps over restarts."""
    return {}


@pytest.fixture
def heard(newest: dict[str, float], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Heard:
    monkeypatch.setattr(module, "_ASK_EVERY", 0.0)
    return Heard(newest, clock)


def refused(heard: Heard, announced: Announcement) -> str:
    with pytest.raises(MessageError) as caught:
        heard.check(announced)
    return caught.value.reason


def ask(heard: Heard, says: float) -> bool:
    """Ask for the time, and get an answer; whether something may count after all."""
    question = heard.question()
    assert question is not None, "nothing is in doubt"
    return heard.answer(TimeReply(question.nonce, says))


def test_what_comes_in_order_counts_and_asks_nothing(heard: Heard, now: float) -> None:
    for issued in (now - 10, now - 5, now - 5, now):  # a broker tells what it retains once more
        heard.check(announcement(issued))
    assert heard.question() is None


def test_an_older_one_does_not_count_and_no_answer_makes_it_count(heard: Heard, now: float) -> None:
    heard.check(announcement(now))
    assert refused(heard, announcement(now - 5)) == "replayed"
    assert not ask(heard, now)
    assert refused(heard, announcement(now - 5)) == "replayed"
    heard.check(announcement(now))


def test_jobs_are_told_apart(heard: Heard, now: float) -> None:
    heard.check(announcement(now, "fedms"))
    heard.check(announcement(now - 5, "standalone"))
    assert refused(heard, announcement(now - 5, "fedms")) == "replayed"


def test_it_does_not_come_back_after_a_restart(newest: dict[str, float], clock: Clock, now: float) -> None:
    Heard(newest, clock).check(announcement(now))
    assert refused(Heard(newest, clock), announcement(now - 1)) == "replayed"


def test_one_that_has_expired_does_not_count(heard: Heard, now: float) -> None:
    heard.check(announcement(now - LIFE - MAX_SKEW + 5))
    assert refused(heard, announcement(now - LIFE - MAX_SKEW - 5, "other")) == "expired"
    assert not ask(heard, now)
    assert refused(heard, announcement(now - LIFE - MAX_SKEW - 5, "other")) == "expired"


# --- wrong clocks -------------------------------------------------------------------------------------------------


def test_a_board_in_1970_hears_announcements(newest: dict[str, float], now: float) -> None:
    clock = Clock()
    clock.set(0.0)
    Heard(newest, clock).check(announcement(now))


@pytest.mark.parametrize("days", [1.1, 30, 5000])
def test_a_board_that_is_ahead_asks_and_then_hears_it(heard: Heard, clock: Clock, now: float, days: float) -> None:
    clock.set(now + days * DAY)
    assert refused(heard, announcement(now)) == "expired"
    assert ask(heard, now)
    assert abs(clock.now() - now) < 5
    heard.check(announcement(now))


@pytest.mark.parametrize("ago", [0, 600, 20 * 3600])
def test_an_aggregator_whose_clock_was_set_back_is_heard_again_however_long_it_has_said_nothing_new(
    heard: Heard, clock: Clock, now: float, ago: float
) -> None:
    """The device was away, and the round is still open."""
    heard.check(announcement(now + 2 * DAY))
    clock.set(now + 2 * DAY)
    open_since = announcement(now - ago)
    assert refused(heard, open_since) == "replayed"
    assert ask(heard, now)
    heard.check(open_since)


def test_what_expired_before_the_clock_was_set_back_stays_void(heard: Heard, now: float) -> None:
    heard.check(announcement(now + 2 * DAY))
    assert refused(heard, announcement(now)) == "replayed"
    assert ask(heard, now)
    assert refused(heard, announcement(now - 2 * DAY)) == "expired"


def test_a_job_whose_newest_lies_in_the_past_is_not_touched(heard: Heard, now: float) -> None:
    heard.check(announcement(now - 60, "standalone"))
    heard.check(announcement(now + 3600, "fedms"))
    assert refused(heard, announcement(now, "fedms")) == "replayed"
    assert ask(heard, now)
    assert refused(heard, announcement(now - 120, "standalone")) == "replayed"


# --- questions ----------------------------------------------------------------------------------------------------


def test_an_answer_to_another_question_does_not_count(heard: Heard, clock: Clock, now: float) -> None:
    """The broker has kept it."""
    heard.check(announcement(now))
    refused(heard, announcement(now - 5))
    question = heard.question()
    assert question is not None
    for nonce in ("0" * 32, ""):
        with pytest.raises(MessageError, match="not asked"):
            heard.answer(TimeReply(nonce, now - DAY))
    assert not heard.answer(TimeReply(question.nonce, now))
    with pytest.raises(MessageError, match="not asked"):  # twice
        heard.answer(TimeReply(question.nonce, now - DAY))
    assert abs(clock.now() - now) < 5


def test_nobody_answers_before_the_first_question(heard: Heard, now: float) -> None:
    with pytest.raises(MessageError, match="not asked"):
        heard.answer(TimeReply("", now - DAY))


def test_every_question_has_a_nonce_of_its_own(heard: Heard, now: float) -> None:
    heard.check(announcement(now))
    nonces = set()
    for _ in range(5):
        refused(heard, announcement(now - 5))
        question = heard.question()
        assert question is not None
        nonces.add(question.nonce)
    assert len(nonces) == 5
    assert {len(nonce) for nonce in nonces} == {32}


def test_a_flood_of_old_announcements_makes_no_flood_of_questions(
    newest: dict[str, float], clock: Clock, now: float
) -> None:
    heard = Heard(newest, clock)
    heard.check(announcement(now))
    asked = 0
    for _ in range(100):
        refused(heard, announcement(now - 5))
        asked += heard.question() is not None
    assert asked == 1


@pytest.mark.parametrize("years", [-30, 14])
def test_a_board_takes_part_whatever_its_clock_shows(fleet: GuardedFleet, years: float) -> None:
    """The whole agent: it reaches the broker, believes the aggregator, asks it for the time, and does its round."""
    fleet.enrol("nano-1")
    nano_1, topics = Sender("device", "nano-1"), fleet.topics
    with (
        fleet.broker(),
        fleet.link(
            "aggregator", topics.introduction("+"), topics.up("+", "+"), topics.upload_manifest("+", "+")
        ) as link,
        fleet.agent("nano-1", ahead=years * 365 * DAY) as agent,
    ):
        link.publish(topics.aggregator_introduction, link.seals.introduction, retain=True)
        link.say(topics.current("fedms"), announcement(time.time()), retain=True)
        done: list[UpdateManifest] = []

        def serve() -> bool:
            for event in link.events(0.05):
                if not isinstance(event, Received):
                    continue
                if event.topic == topics.introduction("nano-1"):
                    link.seals.meet(event.payload, nano_1)
                elif event.topic == topics.up("nano-1", "time"):
                    question = link.seals.open(event.topic, event.payload, TimeRequest, nano_1)
                    link.say(topics.down("nano-1", "time"), TimeReply(question.nonce, time.time()))
                elif event.topic.endswith("/m"):
                    done.append(link.seals.open(event.topic, event.payload, UpdateManifest, nano_1))
            return bool(done)

        agent.wait_until(serve)
    assert done[0].version == 1


def test_jobs_that_are_long_over_are_forgotten(heard: Heard, newest: dict[str, float], now: float) -> None:
    for day in range(30):
        heard.check(announcement(now + day * DAY, f"job-{day}"))
    assert len(newest) <= 4
