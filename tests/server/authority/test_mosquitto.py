"""Mosquitto as it is set up for a fleet: who may write and read what, and whom it lets in, tried on the broker."""

from __future__ import annotations

import itertools
import os
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleetune.edge.protocol.identity.tls import enrolment_context
from fleetune.server.authority.mosquitto import (
    ACL,
    CONFIG,
    PID,
    REVOKED,
    reload_broker,
    write_broker,
    write_revocations,
)
from support.brokers import Broker
from support.guarded import GuardedBroker, GuardedFleet
from support.mqtt5 import Peer, wait_until

ROOT = "ft/1/lab"
TOKEN, OTHER = "ab" * 16, "cd" * 16
MEMBERS = ("nano-1", "nano-2", "aggregator", "authority", "publisher")
ACTORS = (*MEMBERS, TOKEN, OTHER)
"""Members, and two strangers that have the token whose id is their name."""

ALL = set(MEMBERS)

RIGHTS: dict[str, tuple[set[str], set[str]]] = {
    f"{ROOT}/st/nano-1": ({"nano-1"}, {"aggregator"}),
    f"{ROOT}/st/nano-1/id": ({"nano-1"}, {"aggregator", "authority"}),
    f"{ROOT}/st/nano-1/more": (set(), set()),
    f"{ROOT}/st/aggregator": ({"aggregator"}, {"aggregator"}),
    f"{ROOT}/st": (set(), set()),
    f"{ROOT}/up/nano-1/r-fedms-1/m": ({"nano-1"}, {"aggregator"}),
    f"{ROOT}/up/nano-1/r-fedms-1/0": ({"nano-1"}, {"aggregator"}),
    f"{ROOT}/up/nano-1/need": ({"nano-1"}, {"aggregator"}),
    f"{ROOT}/up/nano-1/time": ({"nano-1"}, {"aggregator"}),
    f"{ROOT}/up/nano-1/renew": ({"nano-1"}, {"aggregator", "authority"}),
    f"{ROOT}/up/nano-1/echo": ({"nano-1"}, {"nano-1", "aggregator"}),
    f"{ROOT}/dn/nano-1/ack": ({"aggregator"}, {"nano-1"}),
    f"{ROOT}/dn/nano-1/missing": ({"aggregator"}, {"nano-1"}),
    f"{ROOT}/dn/nano-1/time": ({"aggregator"}, {"nano-1"}),
    f"{ROOT}/dn/nano-1/renew": ({"aggregator", "authority"}, {"nano-1"}),
    f"{ROOT}/dn/nano-1/renewed": ({"aggregator", "authority"}, {"nano-1"}),
    f"{ROOT}/g/fedms/current": ({"aggregator"}, ALL),
    f"{ROOT}/g/fedms/{'0' * 64}/0": ({"aggregator"}, ALL),
    f"{ROOT}/agg/st": ({"aggregator"}, ALL),
    f"{ROOT}/agg/id": ({"aggregator"}, ALL),
    f"{ROOT}/ca/trust": ({"authority"}, ALL),
    f"{ROOT}/ca/other": (set(), set()),
    f"{ROOT}/enroll/{TOKEN}/request": ({TOKEN}, {"authority"}),
    f"{ROOT}/enroll/{TOKEN}/reply": ({"authority"}, {TOKEN}),
    f"{ROOT}/enroll/{TOKEN}/other": (set(), set()),
    f"{ROOT}/enroll/{TOKEN}": (set(), set()),
    "ft/1/plant/g/fedms/current": (set(), set()),
    "ft/2/lab/up/nano-1/need": (set(), set()),
    "up/nano-1/need": (set(), set()),
    "$SYS/broker/uptime": (set(), set()),
}
"""Topic → who may write it, and who may read it. What signatures protect anyway is protected a second time."""


class Everybody:
    """One connection for each, which listens to all that it gets."""

    def __init__(self, fleet: GuardedFleet, stack: ExitStack) -> None:
        self.peers: dict[str, Peer] = {}
        for actor in ACTORS:
            peer = fleet.peer(actor) if actor in MEMBERS else fleet.stranger(actor)
            self.peers[actor] = stack.enter_context(peer)
            peer.subscribe("#", "$SYS/#", "ft/+/+/#", f"$share/spies/{ROOT}/#")
        self._count = itertools.count()

    def may_write(self, actor: str, topic: str) -> bool:
        """By the broker's own word."""
        peer = self.peers[actor]
        mid = peer.send(topic, b"%s" % actor.encode())
        assert wait_until(lambda: mid in peer.acks), peer.ends
        return not peer.acks[mid].is_failure

    def readers(self, topic: str, writer: str) -> set[str]:
        """Whoever gets what is written there. What follows it to each shows who did not."""
        mark = f"mark-{next(self._count)}".encode()
        self.peers[writer].publish(topic, mark)
        for name, at in (("authority", f"{ROOT}/ca/trust"), *(("authority", reply(token)) for token in (TOKEN, OTHER))):
            self.peers[name].publish(at, b"after " + mark)
        for peer in self.peers.values():
            assert wait_until(lambda p=peer: any(m.payload == b"after " + mark for m in p.messages))  # type: ignore[misc]
        return {
            actor
            for actor, peer in self.peers.items()
            if any(message.payload == mark and message.topic == topic for message in peer.messages)
        }


def reply(token: str) -> str:
    return f"{ROOT}/enroll/{token}/reply"


@pytest.fixture(scope="module")
def everybody(lab: GuardedFleet, lab_broker: GuardedBroker) -> Iterator[Everybody]:
    with ExitStack() as stack:
        yield Everybody(lab, stack)


@pytest.mark.parametrize("topic", RIGHTS)
def test_each_topic_is_written_and_read_by_those_whom_it_is_for(everybody: Everybody, topic: str) -> None:
    writers, readers = RIGHTS[topic]
    assert {actor for actor in ACTORS if everybody.may_write(actor, topic)} == writers
    for writer in writers:
        assert everybody.readers(topic, writer) == readers


@pytest.mark.parametrize("client_id", ["+", "#", f"{TOKEN}/request", "+/request", "../ca", "$share"])
def test_a_stranger_whose_name_is_a_pattern_has_no_rights(
    lab: GuardedFleet, everybody: Everybody, client_id: str
) -> None:
    everybody.peers["authority"].messages.clear()
    with lab.stranger(client_id) as stranger:
        stranger.subscribe("#", f"{ROOT}/enroll/+/request", f"{ROOT}/enroll/+/reply")
        mid = stranger.send(f"{ROOT}/enroll/{TOKEN}/request", b"forged")
        assert wait_until(lambda: mid in stranger.acks or bool(stranger.ends))
        everybody.peers[TOKEN].publish(f"{ROOT}/enroll/{TOKEN}/request", b"own")
        everybody.peers["authority"].publish(reply(TOKEN), b"own")
        assert wait_until(lambda: b"own" in [m.payload for m in everybody.peers["authority"].messages])
        assert stranger.messages == []
    assert b"forged" not in [message.payload for message in everybody.peers["authority"].messages]


def test_a_last_will_has_no_more_rights_than_its_owner(lab: GuardedFleet, everybody: Everybody) -> None:
    """A device cannot say that the aggregator is gone by dying."""
    aggregator = everybody.peers["aggregator"]
    for topic, comes in ((f"{ROOT}/agg/st", False), (f"{ROOT}/st/nano-2", False), (f"{ROOT}/st/nano-1", True)):
        aggregator.messages.clear()
        victim = lab.peer("nano-1", will=(topic, b"gone"))
        victim.vanish()
        with lab.peer("nano-1", will=(f"{ROOT}/st/nano-1", b"barrier")) as later:
            later.vanish()
        assert wait_until(lambda: b"barrier" in [message.payload for message in aggregator.messages])
        assert (b"gone" in [message.payload for message in aggregator.messages]) == comes


# --- who gets in --------------------------------------------------------------------------------------------------


def connects(address: tuple[str, int], context: ssl.SSLContext) -> str:
    """What TLS says: empty if it lets this side in. In TLS 1.3 a client is refused only after its handshake."""
    try:
        with (
            socket.create_connection(address, timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            answers, _, _ = select.select([secured], [], [], 20)  # tickets for a session, or an alert
            assert answers, "the broker ends no handshake"
            secured.settimeout(0.1)
            secured.recv(1)
    except TimeoutError:
        return ""
    except ssl.SSLError as error:
        return str(error.reason or error)
    return "hung up"


def ports(fleet: GuardedFleet) -> list[tuple[str, int]]:
    return [("localhost", address.port) for address in (fleet.address, fleet.enrolment)]


def test_tls_older_than_1_3_is_refused_at_both_ports(lab: GuardedFleet, lab_broker: GuardedBroker) -> None:
    for port in ports(lab):
        assert connects(port, lab.context("nano-1")) == ""
        old = lab.context("nano-1")
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
        assert "PROTOCOL_VERSION" in connects(port, old)


def test_nobody_gets_in_without_tls(lab: GuardedFleet, lab_broker: GuardedBroker) -> None:
    for port in ports(lab):
        with socket.create_connection(port, timeout=5) as plain:
            plain.sendall(bytes.fromhex("101100044d5154540502003c03210014000178"))  # CONNECT of MQTT 5
            plain.settimeout(5)
            try:
                answer = plain.recv(100)
            except ConnectionResetError:
                answer = b""
        assert answer[:1] != b"\x20"  # CONNACK


def test_members_show_a_certificate_and_strangers_have_no_other_way_in(
    lab: GuardedFleet, lab_broker: GuardedBroker
) -> None:
    assert "CERTIFICATE_REQUIRED" in connects(("localhost", lab.address.port), enrolment_context())
    assert connects(("localhost", lab.enrolment.port), enrolment_context()) == ""


def test_a_user_name_does_not_help(lab: GuardedFleet, everybody: Everybody) -> None:
    """The name in the certificate is the user, whatever a client says."""
    broker = Broker("mosquitto", lab.address, "aggregator", "anything")
    with Peer(broker, "liar", context=lab.context("nano-1")) as liar:
        mid = liar.send(f"{ROOT}/agg/st", b"forged")
        assert wait_until(lambda: mid in liar.acks)
        assert liar.acks[mid].is_failure
    broker = Broker("mosquitto", lab.enrolment, "aggregator", "anything")
    with Peer(broker, OTHER[:31], context=enrolment_context()) as liar:
        mid = liar.send(f"{ROOT}/agg/st", b"forged")
        assert wait_until(lambda: mid in liar.acks)
        assert liar.acks[mid].is_failure


def test_the_brokers_limits_hold_for_members(lab: GuardedFleet, lab_broker: GuardedBroker) -> None:
    with lab.peer("nano-1") as peer:
        peer.publish(f"{ROOT}/up/nano-1/u/0", bytes(65536))
        peer.send(f"{ROOT}/up/nano-1/u/0", bytes(140_000))
        assert peer.ended()


def test_strangers_cannot_take_the_places_of_members(fleet: GuardedFleet) -> None:
    fleet.enrol("nano-1")
    with fleet.broker(), ExitStack() as stack:
        crowd = [
            stack.enter_context(socket.create_connection(("localhost", fleet.enrolment.port), timeout=5))
            for _ in range(70)
        ]
        assert wait_until(lambda: sum(hung_up(one) for one in crowd) == 6)
        with fleet.peer("nano-1"):
            pass


def hung_up(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


# --- revocation ---------------------------------------------------------------------------------------------------


def test_whoever_is_revoked_loses_its_connection_its_rights_and_its_way_in(fleet: GuardedFleet) -> None:
    for device in ("nano-1", "nano-2"):
        fleet.enrol(device)
    with fleet.broker() as broker, fleet.peer("nano-1") as out, fleet.peer("aggregator") as aggregator:
        aggregator.subscribe(f"{ROOT}/st/+")
        out.subscribe(f"{ROOT}/g/#", f"{ROOT}/dn/nano-1/+")
        out.publish(f"{ROOT}/st/nano-1", b"before")
        fleet.authority.revoke("nano-1")
        fleet.write_revocations(broker)
        assert not writes(out, f"{ROOT}/st/nano-1")
        aggregator.publish(f"{ROOT}/g/fedms/current", b"news")
        aggregator.publish(f"{ROOT}/dn/nano-1/ack", b"news")
        with fleet.peer("nano-2") as stays:
            assert writes(stays, f"{ROOT}/st/nano-2")
        assert connects(("localhost", fleet.address.port), fleet.context("nano-1")) == "SSLV3_ALERT_CERTIFICATE_REVOKED"
        assert [message.payload for message in aggregator.receive(2)] == [b"before", b"nano-2"]
        assert out.messages == []


def writes(peer: Peer, topic: str) -> bool:
    mid = peer.send(topic, topic.rpartition("/")[2].encode())
    assert wait_until(lambda: mid in peer.acks or bool(peer.ends))
    return mid in peer.acks and not peer.acks[mid].is_failure


def test_a_device_that_is_let_in_again_has_its_rights_again(fleet: GuardedFleet) -> None:
    old = fleet.enrol("nano-1").folder
    held = fleet.copy("nano-1", fleet.home("old"))
    fleet.authority.revoke("nano-1")
    with fleet.broker() as broker:
        fleet.write_revocations(broker)
        assert "topic deny #" in (fleet.broker_folder / ACL).read_text()
        token = fleet.authority.make_token("nano-1", 1)
        fleet.write_revocations(broker)  # as the command does that makes the token
        fleet.apply(token, old)
        with fleet.peer("nano-1") as again:
            assert writes(again, f"{ROOT}/st/nano-1")
        assert "REVOKED" in connects(("localhost", fleet.address.port), fleet.context(held.folder.parent.name))


def test_an_aggregator_with_new_keys_takes_the_place_of_one_that_was_revoked(fleet: GuardedFleet) -> None:
    with fleet.broker() as broker:
        fleet.authority.revoke("aggregator")
        fleet.write_revocations(broker)
        assert "REVOKED" in connects(("localhost", fleet.address.port), fleet.context("aggregator"))
        fleet.authority.make_member("aggregator", fleet.home("aggregator"))
        fleet.write_revocations(broker)
        with fleet.peer("aggregator") as peer:
            assert writes(peer, f"{ROOT}/agg/st")


# --- rotation -----------------------------------------------------------------------------------------------------


def test_while_the_authority_is_rotated_old_and_new_certificates_let_in(fleet: GuardedFleet) -> None:
    """A list of revocations for each root, and the broker finds the right one; a fleet would be locked out at once."""
    for device in ("old", "gone"):
        fleet.enrol(device)
    fleet.authority.revoke("gone")
    address = ("localhost", fleet.address.port)
    with fleet.broker() as broker:
        fleet.authority.rotate()
        write_broker(fleet.authority, fleet.broker_folder)
        fleet.reload(broker)
        fleet.enrol("new")
        for device in ("old", "new"):
            assert connects(address, fleet.context(device)) == ""
        assert "REVOKED" in connects(address, fleet.context("gone"))
        # A device that was away knows the old root alone, and has to reach the broker to hear of the new one.
        assert len(fleet.identity("old").trust.roots) == 1
        fleet.authority.finish_rotation(force=True)
        write_broker(fleet.authority, fleet.broker_folder)
        fleet.reload(broker)
        fleet.enrol("newest")
        assert connects(address, fleet.context("newest")) == ""
        assert "CERTIFICATE_VERIFY_FAILED" in connects(address, fleet.context("old"))
    with fleet.broker():
        assert connects(address, fleet.context("newest")) == ""


# --- files --------------------------------------------------------------------------------------------------------


def test_what_is_written_for_another_machine_names_its_folder(fleet: GuardedFleet, tmp_path: Path) -> None:
    write_broker(fleet.authority, tmp_path / "here")
    here = (tmp_path / "here" / CONFIG).read_text()
    assert str(tmp_path / "here" / ACL) in here
    assert (tmp_path / "here" / "broker.key").stat().st_mode & 0o777 == 0o600
    assert "allow_anonymous true" in here.partition("listener")[2]  # of the second listener alone
    assert here.index("allow_anonymous false") < here.index("allow_anonymous true")


def test_a_list_of_revocations_is_there_before_anybody_is_revoked(fleet: GuardedFleet) -> None:
    write_revocations(fleet.authority, fleet.broker_folder)
    assert (fleet.broker_folder / REVOKED).read_text().startswith("-----BEGIN X509 CRL-----")
    assert "deny" not in (fleet.broker_folder / ACL).read_text()


def test_only_a_mosquitto_is_told_to_reload(fleet: GuardedFleet) -> None:
    """The number in the file may be another process's by now."""
    folder = fleet.broker_folder
    assert not reload_broker(folder)
    for content in ("", "x", "-1", "0", "999999999"):
        (folder / PID).write_text(content)
        assert not reload_broker(folder)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        (folder / PID).write_text(f"{process.pid}\n")
        assert not reload_broker(folder)
        time.sleep(0.05)
        assert process.poll() is None
        process.kill()


def test_a_mosquitto_of_somebody_else_is_left_to_them(fleet: GuardedFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may do anything, so this is the system's word."""

    def kill(_process: int, _signal: int) -> None:
        raise PermissionError

    with fleet.broker():
        assert reload_broker(fleet.broker_folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", kill)
            assert not reload_broker(fleet.broker_folder)
