"""A fleet's own side where boards are tried out: authority, broker, releases and a signed pack, in one folder."""

from __future__ import annotations

import filecmp
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import DataError, RunFailedError, RunFolderError
from fleetune.edge.protocol.files import make_folder, write_atomic
from fleetune.edge.protocol.identity.folder import read_identity
from fleetune.edge.protocol.identity.signature import ENDING, PACK_FILE, sign_file
from fleetune.edge.protocol.messages import UpdateManifest
from fleetune.profiles.fleet import Fleet, fleet_files, read_fleet
from fleetune.server.authority.authority import Authority, Site
from fleetune.server.authority.founding import AGGREGATOR_FOLDER, BROKER_FOLDER, PUBLISHER_FOLDER, found
from fleetune.server.authority.mosquitto import CONFIG
from fleetune.server.broker import free_ports
from fleetune.server.journal import FILE as JOURNAL
from fleetune.server.journal import Accepted, Record, read_records
from fleetune.tools.firstboot.seed import FLEET_FILE
from fleetune.tools.flash.seed import Order, Seeded, make_seeds
from fleetune.tools.places import PACKS, STATE, UPDATES
from fleetune.tools.processes import Processes, processes
from fleetune.tools.release.repository import PUBLIC, Releases
from fleetune.tools.release.serve import serve_folder
from fleetune.tools.secured import Mosquitto
from fleetune.tools.waiting import wait_until

SAMPLES = f"/{STATE}/samples.jsonl"
"""Where a board's samples are."""

_SAMPLES = "samples.jsonl"
_AUTHORITY, _RELEASES, SEEDS, _PACKS, _JOBS, _LOGS = "authority", "releases", "seeds", "packs", "jobs", "logs"
_TOKENS_COUNT_H = 168.0

CLASSES = 2
"""Of the samples that boards train on here."""

SMALL = ("--classes", str(CLASSES), "--global-rounds", "1", "--personal-rounds", "1", "--batch", "8")
"""Options of a small run: a round of each stage."""


@dataclass(frozen=True)
class Job:
    """A run of an aggregator.

    Attributes:
        name: Of its process.
        state: Its state folder.
        log: What it says.
    """

    name: str
    state: Path
    log: Path
    _running: Processes

    @property
    def ended(self) -> bool:
        """Whether its rounds are done.

        Raises:
            RunFailedError: It failed.
        """
        return self._running.ended(self.name)

    def records(self) -> list[Record]:
        """What its journal has."""
        file = self.state / JOURNAL
        return list(read_records(file)) if file.exists() else []

    def accepted(self) -> list[Accepted]:
        """The updates that it has taken."""
        return [record for record in self.records() if isinstance(record, Accepted)]

    def wait(self, within_s: float, check: Callable[[], None] = lambda: None) -> list[Accepted]:
        """Wait until its rounds are done.

        Args:
            within_s: Seconds.
            check: Called again and again; it may raise.

        Returns:
            The updates that it has taken.

        Raises:
            RunFailedError: It failed, or is not done in time.
        """

        def is_done() -> bool:
            check()
            return self.ended

        late = RunFailedError(f"{self.name} was not done in {within_s:.0f} s", f"see {self.log}")
        wait_until(is_done, within_s, lambda: late)
        return self.accepted()

    def wait_for_update(self, within_s: float, check: Callable[[], None] = lambda: None) -> UpdateManifest:
        """Wait until it has taken an update that something was trained for, and end it.

        Raises:
            RunFailedError: It failed, or has taken none in time.
        """
        late = RunFailedError(f"{self.name} has taken no update in {within_s:.0f} s", f"see {self.log}")

        def trained() -> list[UpdateManifest]:
            return [one.manifest for one in self.accepted() if one.manifest.payload is not None]

        def has_taken() -> bool:
            check()
            if self.ended and not trained():
                raise late
            return bool(trained())

        wait_until(has_taken, within_s, lambda: late)
        self.stop()
        return trained()[0]

    def stop(self) -> None:
        """End it, done or not."""
        self._running.stop([self.name])


@dataclass(frozen=True)
class Rig:
    """One that runs.

    Attributes:
        folder: Where all of it lies.
        fleet: The boards.
        pack: What they train, signed.
        address: Of the broker, as this machine reaches it.
        broker: The broker.
    """

    folder: Path
    fleet: Fleet
    pack: Path
    address: BrokerAddress
    broker: Mosquitto
    _running: Processes

    @property
    def authority(self) -> Path:
        """The authority's folder."""
        return self.folder / _AUTHORITY

    @property
    def releases(self) -> Path:
        """The repository of releases."""
        return self.folder / _RELEASES

    @property
    def samples(self) -> Path:
        """What the boards train on, JSON lines."""
        return self.folder / _SAMPLES

    def check(self) -> None:
        """See that the authority still runs.

        Raises:
            RunFailedError: It does not.
        """
        self._running.ended("authority")

    def serve(self, *options: str) -> Job:
        """Start an aggregator with a run of its own.

        Args:
            options: Of ``fleetune serve``, beside fleet, pack, broker, identity and state.
        """
        jobs = self.folder / _JOBS
        make_folder(jobs)
        number = 1 + max((int(path.name.rpartition("-")[2]) for path in jobs.glob("job-*")), default=0)
        name = f"job-{number}"
        job = Job(name, jobs / name, self.folder / _LOGS / f"{name}.log", self._running)
        command = ["serve", "--fleet", str(self.folder / FLEET_FILE), "--pack", str(self.pack)]
        command += ["--broker", str(self.address), "--identity", str(self.authority / AGGREGATOR_FOLDER)]
        make_folder(job.state)
        self._running.start(name, job.log, [*command, "--state", str(job.state), *options])
        return job


def make_rig(
    folder: Path, fleet: Fleet, pack: Path, samples: Path, host: str, ports: Sequence[int] | None = None
) -> None:
    """Make one.

    Args:
        folder: For all of it; new or empty.
        fleet: The boards.
        pack: What they train. It is copied, and signed by this rig's publisher.
        samples: What they train on, of two classes, JSON lines; it is copied.
        host: How the boards reach this machine.
        ports: Of the broker for members, of the broker for devices with a token, of the releases; None for free ones.

    Raises:
        AuthorityError: There is one.
        ConfigError: A program is missing.
        DataError: The samples are damaged, or of another number of classes.
        OSError: There is no room.
    """
    if (found_classes := read_dataset(samples, Pack.open(pack)).classes) != CLASSES:
        raise DataError(f"--data: {samples} has {found_classes} classes", f"{CLASSES} are trained here: take those")
    members, enrolment, web = ports or free_ports(3)
    make_folder(folder)
    shutil.copyfile(samples, folder / _SAMPLES)
    site = Site(tuple(dict.fromkeys((host, "localhost"))), members, enrolment)
    found(folder / _AUTHORITY, fleet.name, site).close()
    config = folder / _AUTHORITY / BROKER_FOLDER / CONFIG
    if os.geteuid() == 0:  # else Mosquitto becomes a user who may not read its key
        write_atomic(config, b"user root\n" + config.read_bytes())
    Releases.make(folder / _RELEASES, f"http://{host}:{web}").leave()
    copy = folder / _PACKS / pack.resolve().name
    shutil.copytree(pack, copy)
    signature = sign_file(copy, read_identity(folder / _AUTHORITY / PUBLISHER_FOLDER), time.time())
    for file in (signature, folder / _SAMPLES):
        file.chmod(0o644)  # on a board the agent is not root
    for name, data in fleet_files(fleet).items():
        write_atomic(folder / name, data)


def check_rig(folder: Path, pack: Path, samples: Path, host: str) -> None:
    """See that a rig is as `make_rig` would make it of these now.

    Raises:
        RunFolderError: It is half a rig, or was made of others; says which.
    """
    another = "remove it, or name another --out"
    if not (folder / FLEET_FILE).exists():
        raise RunFolderError(f"{folder} is half a rig, or something else", another)
    with closing(Authority(folder / _AUTHORITY)) as authority:
        made_for = authority.site.hosts[0]
    if made_for != host:
        raise RunFolderError(f"{folder} was made for the host {made_for}, not {host}", another)
    (copy,) = (folder / _PACKS).iterdir()
    for name, mine, theirs in (
        ("--pack", copy / PACK_FILE, pack / PACK_FILE),
        ("--data", folder / _SAMPLES, samples),
    ):
        if not filecmp.cmp(mine, theirs, shallow=False):
            raise RunFolderError(f"{folder} was made of another {name} than {theirs}", another)


def rig_ports(folder: Path) -> tuple[int, int, int]:
    """Ports of a rig, in `make_rig`'s order."""
    with closing(Authority(folder / _AUTHORITY)) as authority:
        site = authority.site
    with Releases(folder / _RELEASES) as releases:
        return site.port, site.enrolment_port, int(releases.url.rpartition(":")[2])


def equipment(folder: Path) -> dict[str, Path]:
    """Path on a board → what it needs there beside the package: the signature of its pack, and samples."""
    (pack,) = (folder / _PACKS).iterdir()
    signature = pack / f"{PACK_FILE}{ENDING}"
    return {f"/{PACKS}/{pack.name}/{signature.name}": signature, SAMPLES: folder / _SAMPLES}


def make_rig_seeds(folder: Path) -> list[Seeded]:
    """The seeds of a rig's boards; those that are there stay.

    Args:
        folder: As `make_rig` has made it.
    """
    fleet, (pack,), made = read_fleet(folder / FLEET_FILE), (folder / _PACKS).iterdir(), list[Seeded]()
    with Releases(folder / _RELEASES) as releases:
        trusted = releases.url, releases.root_file
    place = f"/{UPDATES}/packs/{pack.name}"
    order = Order(fleet, place, SAMPLES, _TOKENS_COUNT_H, "image", releases=trusted)
    with closing(Authority(folder / _AUTHORITY)) as authority:
        make_seeds(order, fleet.devices, authority, folder / SEEDS, made.append)
    return made


@contextmanager
def open_rig(folder: Path, *, listen: str = "") -> Iterator[Rig]:
    """Run one: its broker, its authority, and a web server for its releases.

    Args:
        folder: As `make_rig` has made it.
        listen: Address where releases are had; empty for all that this machine has.

    Raises:
        ConfigError: Mosquitto is not installed.
        RunFailedError: It does not start.
    """
    fleet, (pack,) = read_fleet(folder / FLEET_FILE), (folder / _PACKS).iterdir()
    members, _, web = rig_ports(folder)
    address = BrokerAddress("localhost", members, tls=True)
    with ExitStack() as stack:
        broker = stack.enter_context(closing(Mosquitto(folder / _AUTHORITY / BROKER_FOLDER / CONFIG, address)))
        broker.start()
        running = stack.enter_context(processes())
        stack.enter_context(serve_folder(folder / _RELEASES / PUBLIC, web, listen))
        serve = ["fleet", "serve", "--authority", str(folder / _AUTHORITY), "--broker", str(address)]
        running.start("authority", folder / _LOGS / "authority.log", serve)
        yield Rig(folder, fleet, pack, address, broker, running)
