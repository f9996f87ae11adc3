"""The words for every way in which a connection fails, on a real Mosquitto and on things that are no broker."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from fleetune.edge.protocol import unreachable
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import BrokerUnreachableError, FleetuneError, IdentityError
from fleetune.edge.protocol.identity.clock import Clock
from fleetune.edge.protocol.identity.folder import ROOTS_FILE, TLS_FILE
from fleetune.edge.protocol.identity.tls import client_context, enrolment_context
from fleetune.edge.protocol.link import Link
from fleetune.edge.protocol.unreachable import why_not
from fleetune.server.authority.mosquitto import CERTIFICATE, KEY, write_broker, write_revocations
from fleetune.server.broker import free_port
from support.guarded import DAY, GuardedFleet, TestClock, guarded_fleet

Contexts = Callable[[], ssl.SSLContext]


@dataclass
class Walls:
    """A fleet whose broker runs: ``good`` may connect, ``expired`` and ``revoked`` may not."""

    fleet: GuardedFleet
    other: GuardedFleet

    @property
    def address(self) -> BrokerAddress:
        return self.fleet.address

    def mixed(self, folder: Path, own: Path, roots: Path) -> Contexts:
        """What connects with the key and certificate of one folder, and believes the roots of another."""
        folder.mkdir()
        (folder / TLS_FILE).write_bytes((own / TLS_FILE).read_bytes())
        (folder / TLS_FILE).chmod(0o600)
        (folder / ROOTS_FILE).write_bytes((roots / ROOTS_FILE).read_bytes())
        return lambda: client_context(folder)


@pytest.fixture(scope="module")
def walls(tmp_path_factory: pytest.TempPathFactory, lab: GuardedFleet) -> Iterator[Walls]:
    clock = TestClock()
    with guarded_fleet(tmp_path_factory.mktemp("walls"), "good", "revoked", name="walls", clock=clock) as fleet:
        clock.ahead = -40 * DAY
        fleet.enrol("expired")
        clock.ahead = 0.0
        fleet.authority.revoke("revoked")
        write_revocations(fleet.authority, fleet.broker_folder)
        with fleet.broker():
            yield Walls(fleet, lab)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unreachable, "_WITHIN", 0.3)


def why(address: BrokerAddress, context: Contexts = enrolment_context, clock: Clock | None = None) -> FleetuneError:
    error = why_not(address, context, clock or Clock())
    assert error.remedy
    assert str(address) in error.what or not isinstance(error, BrokerUnreachableError)
    return error


# --- certificates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "words", "remedy"), [
    ("revoked", "this machine's certificate is revoked", "enrol it again with a new token, if it belongs to the fleet"),
    ("expired", "this machine's certificate has expired", "enrol it again"),
])  # fmt: skip
def test_a_certificate_that_the_broker_does_not_take(walls: Walls, device: str, words: str, remedy: str) -> None:
    error = why(walls.address, lambda: walls.fleet.context(device))
    assert isinstance(error, IdentityError)
    assert error.what == f"the broker at {walls.address}: {words}"
    assert error.remedy == remedy
    assert error.exit_code == 26


@pytest.mark.parametrize("device", ["revoked", "expired"])
def test_a_link_fails_with_the_same_words_and_does_not_wait_for_it(walls: Walls, device: str) -> None:
    link = Link(walls.address, device, subscriptions=["t"], seals=walls.fleet.seals(device))
    with pytest.raises(IdentityError, match=f"this machine's certificate .* {device}"):
        link.connect()


def test_a_certificate_of_another_authority(walls: Walls, tmp_path: Path) -> None:
    context = walls.mixed(tmp_path / "mixed", walls.other.home("nano-1"), walls.fleet.home("good"))
    error = why(walls.address, context)
    assert "this machine's certificate is of another authority" in error.what
    assert "enrol it with the fleet's authority" in error.remedy


def test_a_broker_of_another_authority(walls: Walls, tmp_path: Path) -> None:
    context = walls.mixed(tmp_path / "mixed", walls.fleet.home("good"), walls.other.home("nano-1"))
    error = why(walls.address, context)
    assert isinstance(error, IdentityError)
    assert "shows a certificate that does not count" in error.what
    assert "the roots of the fleet's authority" in error.remedy


def test_a_broker_under_another_name(walls: Walls) -> None:
    elsewhere = BrokerAddress("127.0.0.2", walls.address.port, tls=True)
    error = why(elsewhere, lambda: walls.fleet.context("good"))
    assert "shows a certificate that does not count" in error.what
    assert "127.0.0.2" in error.what
    assert "use the host name that its certificate is for" in error.remedy


def test_a_machine_without_a_certificate(walls: Walls) -> None:
    """So does a device that enrols at the port for members."""
    error = why(walls.address, enrolment_context)
    assert isinstance(error, IdentityError)
    assert "it wants a certificate from this machine" in error.what
    assert "--identity" in error.remedy


def test_a_link_without_an_identity_is_told_that_it_needs_one(walls: Walls) -> None:
    with pytest.raises(IdentityError, match="this machine has no identity") as caught:
        Link(walls.address, "x", subscriptions=["t"])
    assert "fleetune enroll" in caught.value.remedy


def test_a_broker_whose_certificate_has_expired_for_sure(walls: Walls) -> None:
    error = why(walls.address, lambda: walls.fleet.context("good"), Clock(walls.fleet.clock() + 366 * DAY))
    assert isinstance(error, IdentityError)
    assert "the certificate of the broker" in error.what
    assert "it has expired on" in error.what
    assert "fleetune fleet rotate broker" in error.remedy
    seals = walls.fleet.seals("good")
    seals.clock.passed(walls.fleet.clock() + 366 * DAY)
    with pytest.raises(IdentityError, match="it has expired on"):
        Link(walls.address, "good", subscriptions=["t"], seals=seals).connect()


def test_a_clock_that_is_years_ahead_does_not_keep_a_device_from_its_broker(walls: Walls) -> None:
    """There it can ask for the time."""
    seals = walls.fleet.seals("good")
    seals.clock.set(walls.fleet.clock() + 5000 * DAY)
    link = Link(walls.address, "good", subscriptions=["t"], seals=seals)
    link.connect()
    link.close()
    assert "expired" not in why(walls.address, lambda: walls.fleet.context("good"), seals.clock).what


def test_neither_does_a_clock_that_stands_in_the_past(tmp_path: Path) -> None:
    """By it the broker's certificate does not count yet; OpenSSL would look at the system's clock."""
    clock = TestClock()
    with guarded_fleet(tmp_path / "fleet", "nano-1", clock=clock) as fleet:
        clock.ahead = 30 * DAY
        write_broker(fleet.authority, fleet.broker_folder)
        clock.ahead = 0.0
        write_revocations(fleet.authority, fleet.broker_folder)
        with fleet.broker(), fleet.link("nano-1"):
            pass


def test_the_brokers_own_certificate_does_not_let_anybody_in(walls: Walls, tmp_path: Path) -> None:
    folder, broker = tmp_path / "mixed", walls.fleet.broker_folder
    context = walls.mixed(folder, walls.fleet.home("good"), walls.fleet.home("good"))
    (folder / TLS_FILE).write_bytes((broker / KEY).read_bytes() + (broker / CERTIFICATE).read_bytes())
    assert "TLS fails: " in why(walls.address, context).what


def test_a_key_that_is_missing_here(walls: Walls, tmp_path: Path) -> None:
    error = why(walls.address, lambda: client_context(tmp_path))
    assert f"{tmp_path / TLS_FILE} is missing" in error.what


# --- what is no broker --------------------------------------------------------------------------------------------


def test_nobody_is_there() -> None:
    for tls in (False, True):
        error = why(BrokerAddress("127.0.0.1", free_port(), tls))
        assert isinstance(error, BrokerUnreachableError)
        assert "Connection refused" in error.what
        assert error.exit_code == 15


def test_a_host_that_nobody_knows() -> None:
    assert "no broker answers at mqtts://nobody.invalid" in why(BrokerAddress("nobody.invalid", 1, tls=True)).what


def test_a_broker_that_takes_the_certificate_and_says_nothing(walls: Walls) -> None:
    error = why(walls.address, lambda: walls.fleet.context("good"))
    assert isinstance(error, BrokerUnreachableError)
    assert "it accepts connections but does not answer" in error.what


@contextmanager
def server(serve: Callable[[socket.socket], object]) -> Iterator[BrokerAddress]:
    """Serves one connection."""

    def run() -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield BrokerAddress("127.0.0.1", listener.getsockname()[1], tls=True)
    thread.join(5)


def test_somebody_who_is_silent() -> None:
    with server(lambda connection: connection.recv(99999) and connection.recv(1)) as address:
        assert "does not answer" in why(address).what


def test_somebody_who_hangs_up() -> None:
    with server(lambda connection: connection.recv(99999)) as address:
        error = why(address)
    assert "UNEXPECTED_EOF" in error.what or "reset" in error.what


def test_somebody_who_does_not_speak_tls() -> None:
    with server(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as address:
        error = why(address)
    assert "it does not speak TLS there" in error.what
    assert "name the port" in error.remedy


def test_somebody_who_speaks_an_older_tls(walls: Walls) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(walls.fleet.broker_folder / CERTIFICATE, walls.fleet.broker_folder / KEY)

    def serve(connection: socket.socket) -> None:
        with suppress(ssl.SSLError):
            context.wrap_socket(connection, server_side=True)

    with server(serve) as address:
        error = why(address)
    assert "it does not speak TLS 1.3" in error.what
