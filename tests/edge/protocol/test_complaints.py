"""Log lines about what is refused: enough to notice, never enough to fill a disk."""

from __future__ import annotations

import pytest

from fleetune.edge.protocol import complaints
from fleetune.edge.protocol.complaints import Complaints
from fleetune.edge.protocol.errors import MessageError


def error(reason: str = "unsigned") -> MessageError:
    return MessageError("the message is not signed", "give the sender an identity", reason=reason)


def test_the_same_is_said_once_however_often_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    said = Complaints()
    for _ in range(1000):
        said.about("nano-1", error())
    assert caplog.messages == ["nano-1: the message is not signed (give the sender an identity) (unsigned)"]


def test_each_sender_and_each_reason_is_heard_of(caplog: pytest.LogCaptureFixture) -> None:
    said = Complaints()
    for sender, reason in (("nano-1", "unsigned"), ("nano-2", "unsigned"), ("nano-1", "revoked")):
        said.about(sender, error(reason))
    assert len(caplog.messages) == 3


def test_after_a_while_it_is_said_again_with_how_often_it_came(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Complaints()
    for _ in range(4):
        said.about("nano-1", error())
    monkeypatch.setattr(complaints, "_AGAIN_AFTER", 0.0)
    said.about("nano-1", error())
    assert caplog.messages[-1].endswith("; 3 more since this was said last")
    said.about("nano-1", error())
    assert "more since" not in caplog.messages[-1]


def test_somebody_who_is_always_another_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complaints, "_MOST", 10)
    said = Complaints()
    for i in range(100):
        said.about(f"nobody-{i}", error())
    assert len(said._said) == 10
