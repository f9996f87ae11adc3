"""A fleet with an authority, its members, and a Mosquitto that runs with what was written for it: all real.

Start with :func:`guarded_fleet` (or the class, where a test wants another life or another clock), then take members of
it: an :class:`Identity` to sign with, a :class:`Peer` to say anything to the broker, a :class:`Link` as Fleetune has
it. What an attacker needs is here too: :meth:`GuardedFleet.forge` signs any credential with any key.
"""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from fleetune.edge.agent import application as application_module
from fleetune.edge.agent.application import Application
from fleetune.edge.agent.csr import make_csr
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.identity.credential import Credential, Role, issue
from fleetune.edge.protocol.identity.enrolment import CredentialReply, Token, authenticate, read_authenticated
from fleetune.edge.protocol.identity.folder import Identity, read_identity
from fleetune.edge.protocol.identity.keys import SeedSigner
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.identity.tls import client_context, enrolment_context
from fleetune.edge.protocol.link import Connected, Link
from fleetune.edge.protocol.topics import Topics
from fleetune.server.authority.admission import Admission
from fleetune.server.authority.authority import Authority, Lives, Site
from fleetune.server.authority.desk import Desk
from fleetune.server.authority.mosquitto import CONFIG, reload_broker, write_broker, write_revocations
from fleetune.server.broker import free_ports
from fleetune.tools.commands.options import IDENTITY
from support.brokers import Broker, listens
from support.lacking import lacking
from support.mqtt5 import Peer, wait_until

MEMBERS: tuple[Role, ...] = ("aggregator", "authority", "publisher")
"""Those that an authority makes keys for itself."""

DAY = 86400.0
FLEET = "lab"


@dataclass
class TestClock:
    """Unix time, as a test sets it.

    Attributes:
        ahead: Seconds that it is ahead of this machine's.
    """

    __test__ = False

    ahead: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@dataclass
class GuardedBroker(Broker):
    """A Mosquitto that lets members of a fleet in.

    Attributes:
        log: What it wrote.
    """

    log: Path = field(default_factory=Path)

    def heard_reload(self, before: int) -> bool:
        """Whether it has read its files again since its log had so many bytes: of the rights, the last, it warns."""
        return b"ACL pattern" in self.log.read_bytes()[before:]


def handles(process: int, sent: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (sent - 1) & 1)


@contextmanager
def guarded_broker(folder: Path, members: BrokerAddress, enrolment: BrokerAddress) -> Iterator[GuardedBroker]:
    """Mosquitto with what the authority wrote for it.

    Args:
        folder: Where that is.
        members: Where members reach it, by that.
        enrolment: Where strangers do.
    """
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        lacking("needs Mosquitto: apt-get install mosquitto")
    assert [path.name for path in folder.glob("*.conf")] == [CONFIG]
    log = folder / f"{time.monotonic_ns()}.log"
    start = log.with_suffix(".start")
    # As root it would become a user who cannot read pytest's folders.
    start.write_text(f"user root\ninclude_dir {folder}\n")
    with log.open("wb") as file:
        process = psutil.Popen([program, "-c", str(start)], stdout=file, stderr=subprocess.STDOUT)
    try:
        for address in (members, enrolment):
            up = wait_until(lambda a=address: listens(a) or process.poll() is not None, 30)  # type: ignore[misc]
            assert up, f"{address}: nobody listens"
        # It listens before it handles signals: one to reload that comes between the two would end it.
        assert wait_until(lambda: process.poll() is not None or handles(process.pid, signal.SIGHUP), 30)
        assert process.poll() is None, log.read_text()
        yield GuardedBroker("mosquitto", members, processes=[process], log=log)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


class GuardedFleet:
    """An authority in a folder, with the members that are no devices.

    Args:
        folder: For all of it: ``authority`` is the authority's own, below ``devices`` is the state of each device.
        name: The fleet's.
        days: Life of a device's credential.
        member_days: Life of the others'.
        clock: The authority's.

    Attributes:
        authority: It is open in this process; others may be at work in the folder at the same time.
        topics: Of the fleet.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = FLEET,
        days: float = 30.0,
        member_days: float = 365.0,
        clock: TestClock | None = None,
    ) -> None:
        self.folder, self.clock = folder, clock or TestClock()
        site = Site(("localhost", "127.0.0.1"), *free_ports(2))
        self.authority = Authority.make(
            self.authority_folder, name, site, lives=Lives(days, member_days), clock=self.clock
        )
        for role in MEMBERS:
            self.authority.make_member(role, self.home(role))
        write_broker(self.authority, self.broker_folder)
        self.topics = Topics(name)

    # --- where things are -----------------------------------------------------------------------------------------

    @property
    def authority_folder(self) -> Path:
        """The authority's."""
        return self.folder / "authority"

    @property
    def broker_folder(self) -> Path:
        """What Mosquitto runs with."""
        return self.authority_folder / "broker"

    def home(self, name: str) -> Path:
        """The folder of a member's identity."""
        return self.authority_folder / "members" / name if name in MEMBERS else self.state(name) / IDENTITY

    def state(self, device: str) -> Path:
        """The state folder of a device's agent."""
        return self.folder / "devices" / device

    @property
    def address(self) -> BrokerAddress:
        """The broker's, for members."""
        return BrokerAddress.parse(self.authority.site.broker)

    @property
    def enrolment(self) -> BrokerAddress:
        """The broker's, for whoever has no certificate."""
        return BrokerAddress.parse(self.authority.site.enrolment)

    # --- who is who -----------------------------------------------------------------------------------------------

    def apply(self, token: Token, folder: Path, *, key: str | None = None) -> Identity:
        """Enrol with a token as a device does, but without a broker."""
        with quick_keys():
            application = Application(folder, token.device, token.id, key)
        raw = Admission(self.authority).enrol(token.id, authenticate(application.request, token, "request"))
        reply = read_authenticated(raw, token, CredentialReply, "reply")
        assert not reply.refused, reply.refused
        return application.accept(reply, None)

    def enrol(self, device: str, *, key: str | None = None) -> Identity:
        """Bring a device into the fleet; its identity is in its :meth:`home`."""
        return self.apply(self.authority.make_token(device, 1), self.home(device), key=key)

    def identity(self, name: str) -> Identity:
        """A member's, as it is on disk."""
        return read_identity(self.home(name))

    def copy(self, name: str, folder: Path) -> Identity:
        """The same in another folder, for a test that changes it."""
        shutil.copytree(self.home(name), folder)
        return read_identity(folder)

    def seals(self, name: str) -> Seals:
        """What a member signs and verifies with."""
        return Seals(self.identity(name))

    def forge(
        self,
        role: Role,
        name: str,
        *,
        signer: SeedSigner | None = None,
        by: SeedSigner | None = None,
        fleet: str | None = None,
        begins: float | None = None,
        expires: float | None = None,
    ) -> tuple[bytes, SeedSigner]:
        """A credential that says what a test wants it to, and the key that it is for.

        Args:
            role: Role that it gives.
            name: Name that it gives.
            signer: Key that it is for; a new one by default.
            by: Who has signed it; the fleet's authority by default.
            fleet: Fleet that it is of; this one by default.
            begins: From when on it counts; from now on by default.
            expires: Until when; a day longer by default.
        """
        signer, begins = signer or SeedSigner.generate(), self.clock() if begins is None else begins
        until = begins + DAY if expires is None else expires
        credential = Credential(fleet or self.authority.fleet, role, name, signer.public, begins, until)
        return issue(credential, by or self.authority.signer), signer

    # --- the broker -----------------------------------------------------------------------------------------------

    @contextmanager
    def broker(self) -> Iterator[GuardedBroker]:
        """Mosquitto, with the files in :attr:`broker_folder` as they are."""
        with guarded_broker(self.broker_folder, self.address, self.enrolment) as broker:
            yield broker

    def write_revocations(self, broker: GuardedBroker) -> None:
        """What the command line does after a revocation: new lists, which the broker reads."""
        write_revocations(self.authority, self.broker_folder)
        self.reload(broker)

    def reload(self, broker: GuardedBroker) -> None:
        """Have the broker read its files again, and wait until it has."""
        before = broker.log.stat().st_size
        assert reload_broker(self.broker_folder), "no broker runs from here"
        assert wait_until(lambda: broker.heard_reload(before), 30), broker.log.read_text()

    # --- whom a broker sees ---------------------------------------------------------------------------------------

    def context(self, name: str) -> ssl.SSLContext:
        """What a member connects with."""
        return client_context(self.home(name))

    def peer(self, name: str, *, client_id: str | None = None, **options: object) -> Peer:
        """A connection of a member's, to say anything with."""
        at = Broker("mosquitto", self.address)
        return Peer(at, client_id or f"peer-{time.monotonic_ns()}", context=self.context(name), **options)  # type: ignore[arg-type]

    def stranger(self, client_id: str, **options: object) -> Peer:
        """A connection of somebody without a certificate."""
        at = Broker("mosquitto", self.enrolment)
        return Peer(at, client_id, context=enrolment_context(), **options)  # type: ignore[arg-type]

    @contextmanager
    def link(self, name: str, *subscriptions: str) -> Iterator[Link]:
        """A member's link, connected."""
        link = Link(self.address, name, subscriptions=subscriptions or ("nothing",), seals=self.seals(name))
        link.connect()
        try:
            assert wait_until(lambda: any(isinstance(event, Connected) for event in link.events(0.05)))
            yield link
        finally:
            link.close()

    # --- the authority at work ------------------------------------------------------------------------------------

    @contextmanager
    def desk(self) -> Iterator[None]:
        """The authority answers on the broker, as ``fleetune fleet serve`` has it."""
        ready, stop, failures = threading.Event(), threading.Event(), list[BaseException]()

        def until() -> bool:
            ready.set()
            return stop.is_set()

        def run() -> None:
            try:
                authority = Authority(self.authority_folder, self.clock)  # SQLite wants one for each thread
                try:
                    Desk(authority, self.identity("authority"), self.address).run(until)
                finally:
                    authority.close()
            except BaseException as error:  # noqa: BLE001 - whoever waits for it is told
                failures.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            assert ready.wait(20), "the authority does not come to the broker"
            if failures:
                raise failures[0]
            yield
        finally:
            stop.set()
            thread.join(20)
        if failures:
            raise failures[0]
        assert not thread.is_alive()

    # --- devices --------------------------------------------------------------------------------------------------

    @contextmanager
    def agent(
        self, device: str, *, at: BrokerAddress | None = None, ahead: float = 0.0, soon: float = 0.3
    ) -> Iterator[AgentProcess]:
        """A device's agent, which trains nothing, as a process that a test may kill.

        Args:
            device: Its id; it is enrolled.
            at: Where it finds the broker, if not at its address.
            ahead: Seconds that its clock is ahead.
            soon: Seconds after which it asks once more for a new credential.
        """
        self.state(device).mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{device}-{time.monotonic_ns()}.log"
        arguments = (str(at or self.address), self.authority.fleet, device, str(self.state(device)), ahead, soon)
        script = Path(__file__).with_name("idle_agent.py")
        with log.open("wb") as file:
            process = psutil.Popen([sys.executable, str(script), *map(str, arguments)], stdout=file, stderr=file)
        try:
            yield AgentProcess(process, log)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()

    def close(self) -> None:
        """Close the ledger."""
        self.authority.close()


@contextmanager
def quick_keys() -> Iterator[None]:
    """Keys for TLS are made in this process: to start another takes as long as all the rest."""
    real, application_module._make_csr = application_module._make_csr, make_csr
    try:
        yield
    finally:
        application_module._make_csr = real


@contextmanager
def guarded_fleet(folder: Path, *devices: str, **settings: object) -> Iterator[GuardedFleet]:
    """A fleet in which some devices are enrolled."""
    fleet = GuardedFleet(folder, **settings)  # type: ignore[arg-type]
    try:
        for device in devices:
            fleet.enrol(device)
        yield fleet
    finally:
        fleet.close()


@dataclass
class AgentProcess:
    """An agent that runs.

    Attributes:
        process: Its process.
        log: What it wrote.
    """

    process: psutil.Popen
    log: Path

    @property
    def output(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, condition: Callable[[], bool], timeout: float = 20.0) -> None:
        """Wait for something; if it does not come, show what the agent wrote."""
        come = wait_until(lambda: condition() or self.process.poll() is not None, timeout)
        assert come, self.output
        assert condition(), self.output

    def wait_for(self, words: str, timeout: float = 20.0) -> None:
        """Wait until it has written something."""
        self.wait_until(lambda: words in self.output, timeout)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, closed or said goodbye to."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


# --- hardware tokens ----------------------------------------------------------------------------------------------

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "4711-secret"


@dataclass(frozen=True)
class SoftToken:
    """A token of SoftHSM's.

    Attributes:
        label: Its name.
        pin_file: File with its PIN.
    """

    label: str
    pin_file: Path

    def uri(self, name: str, *, pin: bool = True) -> str:
        """Address of a key in it."""
        source = f"&pin-source=file:{self.pin_file}" if pin else ""
        return f"pkcs11:token={self.label};object={name}?module-path={SOFTHSM}{source}"


def make_soft_token(folder: Path) -> SoftToken:
    """An empty token. The library reads where its tokens are only once in a process."""
    pytest.importorskip("pkcs11", reason="needs python-pkcs11: pip install 'fleetune[pkcs11]'")
    program = shutil.which("softhsm2-util")
    if program is None or not SOFTHSM.exists():
        lacking("needs SoftHSM: apt-get install softhsm2")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\nlog.level = ERROR\n")
    os.environ["SOFTHSM2_CONF"] = str(folder / "softhsm2.conf")
    command = [program, "--init-token", "--free", "--label", "fleetune", "--so-pin", "12345678", "--pin", PIN]
    subprocess.run(command, check=True, capture_output=True)
    pin_file = folder / "pin"
    pin_file.write_text(f"{PIN}\n")
    pin_file.chmod(0o600)
    return SoftToken("fleetune", pin_file)
