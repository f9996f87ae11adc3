"""Every MQTT 5 broker that installs here, each as a process that a test may watch, kill and start again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil
import pytest

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.server.broker import embedded_broker
from support.lacking import lacking

OWN = "FLEETUNE_TEST_BROKER"
"""Names one more broker to hold to the contract: ``mqtt://[user:password@]host[:port]``."""


@dataclass
class Broker:
    """A broker that runs.

    Attributes:
        name: As in the documentation's table.
        address: Where it listens.
        username: What it wants to hear, if anything.
        password: Likewise.
        processes: Its own; empty for one that only its owner may stop.
    """

    name: str
    address: BrokerAddress
    username: str | None = None
    password: str | None = None
    processes: list[psutil.Process] = field(default_factory=list)

    def memory(self) -> int:
        """Bytes that its processes hold now."""
        return sum(process.memory_info().rss for process in self.processes)

    def kill(self) -> None:
        """SIGKILL: it says goodbye to nobody."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(self.processes)


def listens(address: BrokerAddress) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection((address.host, address.port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def _process(arguments: list[str], address: BrokerAddress, env: dict[str, str] | None = None) -> Iterator[psutil.Popen]:
    process = psutil.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **(env or {})}
    )
    try:
        deadline = time.monotonic() + 30
        while not listens(address):
            assert process.poll() is None, f"{arguments[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{arguments[0]} does not listen at {address}"
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


@contextmanager
def embedded(folder: Path, port: int) -> Iterator[Broker]:
    """rumqttd, as ``fleetune broker`` runs it."""
    others = set(psutil.Process().children())
    with embedded_broker(port) as address:
        yield Broker("embedded", address, processes=[p for p in psutil.Process().children() if p not in others])


MOSQUITTO_CONF = Path(__file__).parents[2] / "server" / "mosquitto.conf"
"""What the documentation recommends."""


@contextmanager
def mosquitto(folder: Path, port: int, *limits: str) -> Iterator[Broker]:
    """Mosquitto as the documentation sets it, or open to all and with these limits."""
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        lacking("needs Mosquitto: apt-get install mosquitto")
    documented = MOSQUITTO_CONF.read_text(encoding="utf-8").splitlines()
    lines = ["allow_anonymous true", *limits] if limits else [x for x in documented if not x.startswith("listener ")]
    path = folder / "mosquitto.conf"
    # As root it would become a user who cannot read pytest's folders.
    path.write_text("\n".join([f"listener {port} 127.0.0.1", "user root", *lines]) + "\n", encoding="utf-8")
    address = BrokerAddress("127.0.0.1", port)
    with _process([program, "-c", str(path)], address) as process:
        yield Broker("mosquitto", address, processes=[process])


_EJABBERD = """\
loglevel: error
hosts: [localhost]
auth_method: anonymous
anonymous_protocol: both
allow_multiple_connections: true
listen:
  - {{port: {port}, ip: "127.0.0.1", module: mod_mqtt, backlog: 1024}}
modules:
  mod_mqtt: {{}}
"""


@contextmanager
def ejabberd(folder: Path, port: int) -> Iterator[Broker]:
    """Debian's ejabberd, an XMPP server whose ``mod_mqtt`` is a clustered MQTT 5 broker."""
    erlang = shutil.which("erl")
    if erlang is None or not list(Path("/usr/lib").glob("*/ejabberd-*")):
        pytest.skip("needs ejabberd: apt-get install --no-install-recommends ejabberd")
    (folder / "ejabberd.yml").write_text(_EJABBERD.format(port=port))
    libraries = next(iter(Path("/usr/lib").glob("*/ejabberd-*"))).parent
    env = {
        "HOME": str(folder),
        "EJABBERD_CONFIG_PATH": str(folder / "ejabberd.yml"),
        "EJABBERD_LOG_PATH": str(folder / "ejabberd.log"),
        "ERL_LIBS": str(libraries),
        "ERL_CRASH_DUMP_BYTES": "0",
    }
    address = BrokerAddress("127.0.0.1", port)
    arguments = [erlang, "+K", "true", "-noinput", "-mnesia", "dir", f'"{folder / "mnesia"}"', "-s", "ejabberd"]
    with _process(arguments, address, env) as process:
        yield Broker("ejabberd", address, "anyone", "anything", processes=[process, *process.children(recursive=True)])


@contextmanager
def own(folder: Path, port: int) -> Iterator[Broker]:
    """The reader's broker, named in the environment."""
    parts = urlsplit(os.environ[OWN])
    address = BrokerAddress.parse(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
    secret = unquote(parts.password) if parts.password else None
    yield Broker("own", address, unquote(parts.username) if parts.username else None, secret)


BROKERS: dict[str, Callable[[Path, int], AbstractContextManager[Broker]]] = {
    "embedded": embedded,
    "mosquitto": mosquitto,
    "ejabberd": ejabberd,
}
"""One line for each broker that is held to the contract."""

if OWN in os.environ:
    BROKERS["own"] = own
