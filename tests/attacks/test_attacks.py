"""Attacks on a live fleet: Mosquitto with certificates, the aggregator, two honest devices, and somebody who is not.

Each runs twice. With everything in place it is refused, logged once with the reason, and the rounds come out right.
Then what stops it is switched off, and it succeeds: so it is that which stops it, and the test is able to see it fail.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from fleetune.edge.agent.application import Application
from fleetune.edge.agent.csr import make_csr
from fleetune.edge.agent.heard import Heard
from fleetune.edge.protocol.codec import Codec, Shapes, Tensors
from fleetune.edge.protocol.errors import IdentityError
from fleetune.edge.protocol.identity import seals
from fleetune.edge.protocol.identity.credential import Sender
from fleetune.edge.protocol.identity.enrolment import CredentialReply, Token, authenticate, read_authenticated
from fleetune.edge.protocol.identity.folder import TLS_FILE, write_private
from fleetune.edge.protocol.identity.keys import SeedSigner
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.link import Received, Refused
from fleetune.edge.protocol.messages import (
    MAX_PAYLOAD,
    Ack,
    Announcement,
    Message,
    Presence,
    UpdateManifest,
    open_envelope,
    seal,
)
from fleetune.server.authority.admission import Admission
from fleetune.server.authority.authority import Authority, Site
from fleetune.server.authority.desk import Desk
from fleetune.server.authority.ledger import Ledger
from fleetune.server.authority.mosquitto import ACL, REVOKED, ROOTS, reload_broker, write_revocations
from fleetune.server.authority.x509 import read_csr
from fleetune.server.intake import Intake
from fleetune.server.quarantine import Quarantine
from fleetune.server.rules.base import Bounds
from fleetune.server.store import Store
from support.attacklab import FLEET, HONEST, JOB, MALLORY, TOPICS, Intruder, Lab, attack_lab, complaints, tensors_of

VICTIM = HONEST[0]
twice = pytest.mark.parametrize("protected", [True, False], ids=["protected", "switched off"])
Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with attack_lab(tmp_path) as lab:
        yield lab


def in_round_1(lab: Lab) -> None:
    lab.start()
    lab.await_round(1)


def comes_out_right(lab: Lab) -> None:
    lab.finish()
    assert lab.came_out_right()


def logged_once(caplog: Log, reason: str, about: str = "") -> None:
    assert len(complaints(caplog, reason, about)) == 1, [record.getMessage() for record in caplog.records]


# --- what stops attacks, switched off -------------------------------------------------------------------------------


def reload(lab: Lab) -> None:
    assert reload_broker(lab.secured.broker)
    time.sleep(0.3)  # it says nothing when it is done


def open_acl(lab: Lab) -> None:
    """The broker lets everybody write everything: it was set up badly, or is itself the attacker."""
    (lab.secured.broker / ACL).write_text("pattern readwrite #\n", encoding="utf-8")
    reload(lab)


def believe_all(patch: Patch) -> None:
    def open_anything(_self: Seals, _topic: str, raw: bytes, kind: type[Message], _sender: Sender) -> Message:
        return open_envelope(raw, kind)

    patch.setattr(Seals, "open", open_anything)


# --- who comes in ---------------------------------------------------------------------------------------------------


def is_let_in(lab: Lab, folder: Path) -> bool:
    """Whether the broker lets in who shows the certificate in this folder."""
    try:
        with Intruder(lab, replace(lab.identity(MALLORY), folder=folder)):
            return True
    except IdentityError:
        return False


def see(listener: Intruder, harm: Callable[[], bool], *, protected: bool) -> bool:
    """Whether harm is done where nothing protects, however busy the machine is, and none where something does."""
    listener.listen(until=harm, seconds=1.0 if protected else 30.0)
    return harm() is not protected


@twice
def test_a_device_of_another_fleet(lab: Lab, tmp_path: Path, *, protected: bool) -> None:
    with closing(Authority.make(tmp_path / "other", FLEET, Site(("127.0.0.1",)))) as other:
        other.make_member("device", tmp_path / "stranger", MALLORY)
        if not protected:
            for name, content in ((ROOTS, other.trust.roots[0].encode()), (REVOKED, other.revocations())):
                path = lab.secured.broker / name
                path.write_bytes(path.read_bytes() + content)
            reload(lab)
    (tmp_path / "stranger" / ROOTS).write_bytes((lab.secured.broker / ROOTS).read_bytes())  # it knows whom to call
    assert is_let_in(lab, tmp_path / "stranger") is not protected


@twice
def test_a_revoked_certificate(lab: Lab, caplog: Log, *, protected: bool) -> None:
    with Intruder(lab, lab.identity(MALLORY)) as connected, lab.authority() as authority:
        authority.revoke(MALLORY)
        if protected:
            write_revocations(authority, lab.secured.broker)
            reload(lab)
        assert is_let_in(lab, lab.secured.identities / MALLORY) is not protected
        found = connected.publish(TOPICS.up(MALLORY, "echo"), b"still here")
        assert any(isinstance(event, Refused) for event in found) is protected


@twice
def test_an_expired_certificate(lab: Lab, tmp_path: Path, *, protected: bool) -> None:
    now = [time.time()]
    with closing(Authority(lab.secured.authority, lambda: now[0])) as authority:
        now[0] -= 60 * 86400 if protected else 0  # switched off: the same is not expired
        authority.make_member("device", tmp_path / "old", MALLORY)
    assert is_let_in(lab, tmp_path / "old") is not protected


@twice
def test_a_certificate_in_the_name_of_another_device(lab: Lab, tmp_path: Path, *, protected: bool) -> None:
    key, csr = make_csr(VICTIM)  # what a device asks for
    with lab.authority() as authority:
        issued = authority.issue(
            "device", MALLORY if protected else VICTIM, lab.identity(MALLORY).signer.public, read_csr(csr)
        )
    write_private(tmp_path / "forged" / TLS_FILE, (key + issued.certificates).encode())
    (tmp_path / "forged" / ROOTS).write_bytes((lab.secured.broker / ROOTS).read_bytes())
    with Intruder(lab, replace(lab.identity(MALLORY), folder=tmp_path / "forged")) as mallory:
        found = mallory.publish(TOPICS.up(VICTIM, "echo"), b"it is me")
    assert any(isinstance(event, Refused) for event in found) is protected


@twice
def test_a_stolen_token_is_used_twice(
    lab: Lab, tmp_path: Path, caplog: Log, monkeypatch: Patch, *, protected: bool
) -> None:
    if not protected:
        monkeypatch.setattr(Ledger, "use_token", lambda *_: True)
    with lab.authority() as authority:
        token = authority.make_token("nano-3", hours=1)
        replies = [apply(authority, token, tmp_path / who) for who in ("device", "thief")]
    assert [reply.refused for reply in replies] == ["", "used-token" if protected else ""]
    lines = [record for record in caplog.records if "nano-3: enrolment is refused" in record.getMessage()]
    assert len(lines) == protected


def apply(authority: Authority, token: Token, folder: Path) -> CredentialReply:
    request = Application(folder, token.device, token.id).request
    raw = Admission(authority).enrol(token.id, authenticate(request, token, "request"))
    return read_authenticated(raw, token, CredentialReply, "reply")


# --- who speaks -----------------------------------------------------------------------------------------------------


@twice
def test_an_update_on_the_topic_of_another_device(
    lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool
) -> None:
    if not protected:
        open_acl(lab)
        believe_all(monkeypatch)
    in_round_1(lab)
    with Intruder(lab, lab.identity(MALLORY)) as mallory:
        found = mallory.send(VICTIM, *lab.update_of(VICTIM, tensors_of(MALLORY)))
        assert any(isinstance(event, Refused) for event in found) is protected
        assert lab.counts(VICTIM) is not protected
    if protected:
        comes_out_right(lab)


@twice
def test_a_broker_that_forges_an_update(lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool) -> None:
    open_acl(lab)
    if not protected:
        believe_all(monkeypatch)
    in_round_1(lab)
    with Intruder(lab, lab.identity(MALLORY)) as mallory:
        manifest, data = lab.update_of(VICTIM, tensors_of(MALLORY))
        for _ in range(5):
            mallory.send(VICTIM, manifest, data)
        assert lab.counts(VICTIM) is not protected
    if protected:
        logged_once(caplog, "wrong-sender", VICTIM)
        comes_out_right(lab)


@twice
def test_a_revoked_device_whose_connection_still_stands(
    lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool
) -> None:
    caplog.set_level("INFO")
    if not protected:
        monkeypatch.setattr(seals, "check_current", lambda *_: None)
        monkeypatch.setattr(Seals, "revoked_devices", lambda _: frozenset())
    in_round_1(lab)
    with Intruder(lab, lab.identity(MALLORY)) as mallory, lab.authority() as authority:
        authority.revoke(MALLORY)  # the broker has not heard of it
        Desk(authority, authority.make_member("authority", lab.folder / "desk"), lab.secured.address).announce({})
        lab.wait(lambda: caplog.text.count("version 2 of the fleet's trust document") == 3)
        mallory.send(MALLORY, *lab.update_of(MALLORY, tensors_of(MALLORY)))
        assert lab.counts(MALLORY) is not protected
    if protected:
        logged_once(caplog, "revoked", MALLORY)
        comes_out_right(lab)


@twice
def test_a_credential_that_has_expired(lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool) -> None:
    if not protected:
        monkeypatch.setattr(seals, "check_current", lambda *_: None)
    now = [time.time()]
    with closing(Authority(lab.secured.authority, lambda: now[0])) as authority:
        now[0] -= 60 * 86400
        signer = SeedSigner.generate()
        issued = authority.issue("device", MALLORY, signer.public, None)
    in_round_1(lab)
    with Intruder(lab, replace(lab.identity(MALLORY), envelope=issued.credential, signer=signer)) as mallory:
        mallory.send(MALLORY, *lab.update_of(MALLORY, tensors_of(MALLORY)))
        assert lab.counts(MALLORY) is not protected
    if protected:
        logged_once(caplog, "expired-credential", MALLORY)
        comes_out_right(lab)


# --- what is said again, or by nobody who may -----------------------------------------------------------------------


class Wiretap(Intruder):
    """Whoever runs the broker: it hears all, and may send anything to anybody."""

    def __init__(self, lab: Lab) -> None:
        open_acl(lab)
        topics = TOPICS.current("+"), TOPICS.upload_chunk("+", "+", "+")
        super().__init__(lab, lab.identity(MALLORY), *topics)

    def recorded(self, ending: str, count: int = 1) -> list[Received]:
        """What was heard on topics with this ending, as soon as it is so much."""

        def found() -> list[Received]:
            return [e for e in self.heard if isinstance(e, Received) and e.topic.endswith(ending) and e.payload]

        self.listen(until=lambda: len(found()) >= count)
        return found()


@twice
def test_an_update_is_sent_once_more_in_a_later_round(
    lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool
) -> None:
    with Wiretap(lab) as broker:
        in_round_1(lab)
        lab.workers[VICTIM].may.release()
        old = [m for m in broker.recorded("/m", 3) if open_envelope(m.payload, UpdateManifest).payload]
        chunk = broker.recorded("-1/0")[0]
        lab.workers[HONEST[1]].may.release()
        lab.await_round(2)
        before = len(lab.accepted())
        if not protected:
            monkeypatch.setattr(Store, "has_update", lambda *_: False)
            monkeypatch.setattr(Intake, "_staleness", lambda *_: 0)
        for message in (*old, chunk):
            broker.publish(message.topic, message.payload)
        assert see(broker, lambda: len(lab.accepted()) != before, protected=protected)
    if protected:
        comes_out_right(lab)


@twice
def test_an_announcement_of_an_earlier_run_is_planted_again(
    lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool
) -> None:
    if not protected:
        monkeypatch.setattr(Heard, "check", lambda *_: None)
    with Wiretap(lab) as broker:
        with Intruder(lab, lab.identity("aggregator")) as earlier:
            announced = Announcement(
                fleet=FLEET, run="earlier", job=JOB.id, version=7, method="fedms", stage="global", round=1, rounds=2,
                backbone="0" * 64, quantisation="nf4", settings={}, issued=time.time(), expires=time.time() + 3600,
            )  # fmt: skip
            topic = TOPICS.current(JOB.id)
            old = earlier.seals.seal(topic, announced)
        in_round_1(lab)
        lab.workers[VICTIM].may.release()
        assert lab.counts(VICTIM)  # and now it waits for another
        for _ in range(5):
            broker.publish(topic, old, retain=True)
        assert see(broker, lambda: any(one.run == "earlier" for one in lab.workers[VICTIM].begun), protected=protected)
    if protected:
        assert len(complaints(caplog, "replayed", topic)) == len(HONEST)  # each device says it once
        comes_out_right(lab)


@twice
@pytest.mark.parametrize("reason", ["unsigned", "wrong-sender"])
def test_an_announcement_that_the_aggregator_did_not_sign(
    lab: Lab, caplog: Log, monkeypatch: Patch, reason: str, *, protected: bool
) -> None:
    with Wiretap(lab) as broker:
        in_round_1(lab)
        if not protected:
            believe_all(monkeypatch)
        announced = msgspec.structs.replace(lab.workers[VICTIM].begun[-1], run="forged", issued=time.time() + 1)
        topic = TOPICS.current(JOB.id)
        for _ in range(5):
            # Without a signature, as fleets without keys have it; or with that of a device.
            broker.publish(topic, seal(announced) if reason == "unsigned" else broker.seals.seal(topic, announced))
        lab.workers[VICTIM].may.release()
        assert see(broker, lambda: any(one.run == "forged" for one in lab.workers[VICTIM].begun), protected=protected)
    if protected:
        # The aggregator hears it too; devices do not know keys of other devices.
        expected = reason if reason == "unsigned" else "unknown-key"
        assert len(complaints(caplog, expected, topic)) == len(HONEST) + (reason == "unsigned")
        comes_out_right(lab)


@twice
def test_a_device_plants_a_retained_announcement(lab: Lab, *, protected: bool) -> None:
    if not protected:
        open_acl(lab)
    topic = TOPICS.current(JOB.id)
    with Intruder(lab, lab.identity(MALLORY)) as mallory:
        found = mallory.publish(topic, b"anything", retain=True)
        assert any(isinstance(event, Refused) for event in found) is protected
    with Intruder(lab, lab.identity(VICTIM), topic) as later:
        assert see(later, lambda: any(isinstance(event, Received) for event in later.heard), protected=protected)


@twice
def test_the_last_will_of_another_device(lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool) -> None:
    if not protected:
        open_acl(lab)
        believe_all(monkeypatch)
    in_round_1(lab)
    boot = 1
    gone = Presence(name=VICTIM, state="offline", boot=boot, kit="", detail="forged")
    mallory = Intruder(lab, lab.identity(MALLORY), will=(TOPICS.presence(VICTIM), gone))
    mallory.die()
    caplog.set_level("INFO")
    said = f"{VICTIM} is offline: forged"
    if protected:
        time.sleep(0.5)
        assert said not in caplog.text
        comes_out_right(lab)
    else:
        lab.wait(lambda: said in caplog.text)


@twice
def test_a_broker_that_forges_a_last_will(lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool) -> None:
    with Wiretap(lab) as broker:
        if not protected:
            believe_all(monkeypatch)
        in_round_1(lab)
        for _ in range(5):
            broker.say(TOPICS.presence(VICTIM), Presence(VICTIM, "offline", boot=1, kit="", detail="forged"))
        said = f"{VICTIM} is offline: forged"
        if protected:
            broker.listen(until=lambda: False, seconds=0.5)
            logged_once(caplog, "wrong-sender", TOPICS.presence(VICTIM))
            comes_out_right(lab)
        else:
            lab.wait(lambda: said in caplog.text)


# --- what is sent -----------------------------------------------------------------------------------------------------


def hears(mallory: Intruder, verb: str) -> list[bytes]:
    """What the aggregator says to the device."""
    topic = TOPICS.down(MALLORY, verb)
    mallory.listen(until=lambda: False, seconds=0.5)
    return [event.payload for event in mallory.heard if isinstance(event, Received) and event.topic == topic]


@twice
def test_a_chunk_bomb(lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool) -> None:
    if not protected:
        monkeypatch.setattr(Intake, "_check_size", lambda *_: None)
    in_round_1(lab)
    with Intruder(lab, lab.identity(MALLORY), TOPICS.down(MALLORY, "+")) as mallory:
        manifest, _ = lab.update_of(MALLORY, tensors_of(MALLORY))
        assert manifest.payload is not None
        bomb = msgspec.structs.replace(manifest.payload, size=MAX_PAYLOAD, chunk_size=1024)
        mallory.say(TOPICS.upload_manifest(MALLORY, manifest.update), msgspec.structs.replace(manifest, payload=bomb))
        assert bool(hears(mallory, "missing")) is not protected  # the aggregator has made room for it, and asks
        reasons = [open_envelope(raw, Ack).reason for raw in hears(mallory, "ack")]
        assert ("payload-too-large" in reasons) is protected
    if protected:
        logged_once(caplog, "payload-too-large", MALLORY)
        comes_out_right(lab)


def decode_anything(_self: Codec, data: bytes, _shapes: Shapes) -> Tensors:
    tensors: Tensors = safetensors.numpy.load(data)
    return tensors


@twice
@pytest.mark.parametrize("kind", ["oversize", "NaN"])
def test_tensors_that_nobody_can_use(lab: Lab, caplog: Log, monkeypatch: Patch, kind: str, *, protected: bool) -> None:
    reason = "wrong-shape" if kind == "oversize" else "not-finite"
    tensors = tensors_of(MALLORY)
    if kind == "oversize":
        tensors["head.bias"] = np.zeros(4, np.float32)
        tensors["head.weight"] = np.zeros((2, 7), np.float32)  # in all no more than is expected
    else:
        tensors["head.bias"][0] = np.nan
    if not protected:
        monkeypatch.setattr(Codec, "decode", decode_anything)
    in_round_1(lab)
    with Intruder(lab, lab.identity(MALLORY), TOPICS.down(MALLORY, "+")) as mallory:
        for _ in range(2):
            mallory.send(MALLORY, *lab.update_of(MALLORY, tensors))
        assert lab.counts(MALLORY) is not protected
        assert (reason in {open_envelope(raw, Ack).reason for raw in hears(mallory, "ack")}) is protected
    if protected:
        logged_once(caplog, reason, MALLORY)
        comes_out_right(lab)


@twice
def test_a_thousand_times_the_norm(lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool) -> None:
    if not protected:
        monkeypatch.setattr(Bounds, "limit", lambda *_: math.inf)
    in_round_1(lab)
    for worker in lab.workers.values():
        worker.may.release()
    lab.await_round(2)  # what is usual is known from round 1
    with Intruder(lab, lab.identity(MALLORY), TOPICS.down(MALLORY, "+")) as mallory:
        tensors = {name: 1000 * tensor for name, tensor in tensors_of(MALLORY).items()}
        for _ in range(2):
            mallory.send(MALLORY, *lab.update_of(MALLORY, tensors))
        assert lab.counts(MALLORY) is not protected
        assert ("norm-outlier" in {open_envelope(raw, Ack).reason for raw in hears(mallory, "ack")}) is protected
    if protected:
        logged_once(caplog, "norm-outlier", MALLORY)
        comes_out_right(lab)


@twice
def test_a_device_that_keeps_sending_them(lab: Lab, caplog: Log, monkeypatch: Patch, *, protected: bool) -> None:
    if not protected:
        monkeypatch.setattr(Quarantine, "holds", lambda *_: False)
    in_round_1(lab)
    with Intruder(lab, lab.identity(MALLORY), TOPICS.down(MALLORY, "+")) as mallory:
        tensors = tensors_of(MALLORY)
        tensors["head.bias"][0] = np.nan
        for number in range(4):
            manifest, data = lab.update_of(MALLORY, tensors)
            mallory.send(MALLORY, msgspec.structs.replace(manifest, update=f"bad-{number}"), data)
        mallory.send(MALLORY, *lab.update_of(MALLORY, tensors_of(MALLORY)))  # a good one, for once
        assert lab.counts(MALLORY) is not protected
    if protected:
        assert len([line for line in caplog.messages if f"{MALLORY} is quarantined" in line]) == 1
        comes_out_right(lab)
