"""All checks, in the order in which they stand on each other.

What is imported may crash: nothing here imports a wheel before it has been checked in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from fleetune.tools.doctor.host import Board, Check, check_host
from fleetune.tools.doctor.wheels import check_wheels, run_kernels

_LINK = ("msgspec", "paho-mqtt", "pynacl")
_STEP = ("msgspec", "numpy", "onnxruntime", "safetensors", "psutil", "paho-mqtt")


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        board: The board.
        state: The agent's state folder, which need not exist yet.
        pack: A pack to train a step of, if any.
        broker: Address of a broker, a fleet (its name or its file) and id of a device, for a round trip, if any.
        identity: Folder of the device's identity, if it has one.
        root: Where `/proc` and `/sys` are.
    """

    board: Board
    state: Path
    pack: Path | None = None
    broker: tuple[str, str, str] | None = None
    identity: Path | None = None
    root: Path = Path("/")


def examine(subject: Subject) -> Iterator[Check]:
    """What each check found, as soon as it is known.

    Raises:
        ConfigError: The broker's address, or a name, is not valid.
    """
    yield from check_host(subject.board)
    wrong = run_kernels()
    yield check_wheels(wrong)
    broken = {package for package, words in wrong.items() if words}
    broker = None if subject.broker is None else _broker(subject, broken)  # a wrong address is said at once
    if subject.pack is not None:
        yield _pack(subject.pack, broken)
    yield from _machine(subject, broken)
    if subject.identity is not None:
        yield _identity(subject.identity, broken)
    if broker is not None:
        yield broker()


def _unchecked(name: str, lacks: Collection[str]) -> Check:
    return Check(name, "note", f"not checked: it needs {', '.join(sorted(lacks))}")


def _identity(folder: Path, broken: set[str]) -> Check:
    if lacks := broken & set(_LINK):
        return _unchecked("identity", lacks)
    from fleetune.tools.doctor.identity import check_identity

    return check_identity(folder)


def _broker(subject: Subject, broken: set[str]) -> Callable[[], Check]:
    if lacks := broken & set(_LINK):
        return lambda: _unchecked("broker", lacks)
    from fleetune.tools.doctor.broker import RoundTrip, check_broker

    assert subject.broker is not None
    address, fleet, device = subject.broker
    if Path(fleet).is_file() or "/" in fleet or fleet.endswith(".yaml"):
        from fleetune.profiles.fleet import read_fleet

        listed = read_fleet(Path(fleet))
        fleet, device = listed.name, listed.device(device).id
    trip = RoundTrip.parse(address, fleet, device)
    return lambda: check_broker(trip, subject.identity)


def _pack(path: Path, broken: set[str]) -> Check:
    if lacks := broken & set(_STEP):
        return _unchecked("pack", lacks)
    from fleetune.tools.doctor.pack import check_pack

    return check_pack(path)


def _machine(subject: Subject, broken: set[str]) -> Iterator[Check]:
    if "msgspec" in broken:
        yield from (_unchecked(name, ["msgspec"]) for name in ("memory", "disk", "clock", "heat"))
        return
    from fleetune.edge.resources.probes.machine import probe
    from fleetune.edge.resources.probes.tree import Tree
    from fleetune.tools.doctor.clock import check_clock
    from fleetune.tools.doctor.disk import check_disk
    from fleetune.tools.doctor.heat import check_heat
    from fleetune.tools.doctor.memory import check_memory
    from fleetune.tools.doctor.slots import check_slots

    tree = Tree(subject.root)
    machine = probe(subject.root, folder=subject.state, write=True, commands=tree.live)
    yield check_memory(machine, tree)
    yield check_disk(subject.state, machine.disk)
    yield check_clock(machine.clock)
    yield check_heat(machine)
    if slots := check_slots(subject.root):
        yield slots
    if skipped := dict.fromkeys((*machine.skipped, *tree.skipped)):
        yield Check("probes", "note", f"could not be read: {'; '.join(skipped)}")
