"""``fleetune bench round``: a round in which nobody trains, beside Flower's and beside what the broker alone takes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import msgspec
import psutil

from fleetune.edge.protocol.codec import DEFAULT
from fleetune.edge.protocol.errors import RunFailedError
from fleetune.tools.bench.figures import Document, Figure, Target, figure
from fleetune.tools.bench.peers import FLOWER, peer_versions, peers_python
from fleetune.tools.bench.transfer.broker import mosquitto
from fleetune.tools.bench.transfer.fleet import killed, lead, spec_for, start
from fleetune.tools.bench.transfer.flower import flower_idle, flower_rounds, lora_matrices
from fleetune.tools.bench.transfer.noop import FLEET, NoOpSpec, lora_shapes
from fleetune.tools.secured import secured

PEERS = {"deployed": "Flower, deployed", "streams": "Flower, streams"}
"""As its documentation has it, and its older interface of one gRPC stream for each device, which is deprecated."""

_ROUND = {2: Target(60.0, lower=True), 8: Target(150.0, lower=True)}
_FASTER = Target(100.0, lower=False)
_OVERHEAD = Target(1.15, lower=True)
_IDLE = Target(40.0, lower=True)
_TURNS = 3


def bench_round(
    folder: Path, *, quick: bool, peers: Sequence[str], threads: int, say: Callable[[str], None]
) -> Document:
    """Run the benchmark.

    Args:
        folder: For configurations, state and logs.
        quick: Two devices, one turn, few rounds.
        peers: Of :data:`PEERS`.
        threads: Not used: nobody trains.
        say: Is told what happens next.
    """
    del threads
    folder.mkdir(parents=True, exist_ok=True)
    python = peers_python(say, FLOWER) if peers else None
    figures, notes = list[Figure](), list[str]()
    for devices in (2,) if quick else (2, 8, 64):
        place = folder / f"{devices}"
        place.mkdir()
        bare = list[float]()
        plain, signed = dict[str, list[float]](), dict[str, list[float]]()
        for turn in range(1 if quick else _TURNS):
            say(f"{devices} devices, turn {turn + 1}")
            rounds = 20 if devices < 64 else 8
            for codec in ("f32", DEFAULT):
                for how, found in ((_fleetune, plain), (_secured, signed)):
                    taken = how(place / f"{how.__name__}-{codec}-{turn}", devices, rounds, codec)
                    found.setdefault(codec, []).append(1e3 * median(taken))
            bare.append(1e3 * median(_bare(place / f"bare-{turn}", devices, rounds)))
        name, ours = f"{devices} devices: a round", plain["f32"]
        figures.append(figure(name, "ms", ours, target=_ROUND.get(devices)))
        figures.append(figure(name, "ms", ours, peer="paho and Mosquitto alone", peer_values=bare))
        for codec, values in signed.items():
            secure = f"{devices} devices: a round in {codec} with mTLS and signatures"
            target = _OVERHEAD if devices == 8 else None
            figures.append(figure(secure, "ms", values, peer="without", peer_values=plain[codec], target=target))
        for peer in peers:
            assert python is not None
            say(f"{devices} devices: {PEERS[peer]}")
            try:
                theirs = _flower(python, place / peer, devices, say, streams=peer == "streams", quick=quick)
            except RunFailedError as error:
                notes.append(f"{devices} devices: {PEERS[peer]} does not get through a round: {error}")
                continue
            target = _FASTER if peer == "deployed" else None
            some = [median(ours)] * len(theirs)
            figures.append(figure(name, "ms", some, peer=PEERS[peer], peer_values=theirs, target=target))
    idle, member = _idle(folder / "idle", 1 if quick else 5)
    figures.append(figure("idle agent without a pack, resident", "MiB", idle, target=_IDLE))
    figures.append(figure("the same with an identity", "MiB", member, peer="without", peer_values=idle))
    for peer in peers:
        assert python is not None
        say(f"an idle device of {PEERS[peer]}")
        held = flower_idle(python, folder / f"idle-{peer}", streams=peer == "streams").rss_mib
        figures.append(
            figure("idle agent without a pack, resident", "MiB", [median(idle)], peer=PEERS[peer], peer_values=[held])
        )
    return Document("round", tuple(figures), peer_versions(python, FLOWER) if python else {}, tuple(notes))


def _fleetune(place: Path, count: int, rounds: int, codec: str) -> list[float]:
    """Seconds of each round: an aggregator, Mosquitto, and a process for each device."""
    place.mkdir()
    devices = _names(count)
    with mosquitto(place) as (broker, _):
        spec = msgspec.structs.replace(spec_for(broker, place / "devices", (), lora_shapes(), rounds), codec=codec)
        return _rounds(place, spec, devices)


def _secured(place: Path, count: int, rounds: int, codec: str) -> list[float]:
    """The same with TLS on both sides, the broker's rights checked, and every message signed and verified."""
    place.mkdir()
    devices = _names(count)
    with secured(place, FLEET, devices) as lab:
        spec = spec_for(lab.address, place / "devices", (), lora_shapes(), rounds)
        with_keys = msgspec.structs.replace(spec, codec=codec, identities=str(lab.identities), tls=True)
        return _rounds(place, with_keys, devices)


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"device-{number}" for number in range(count))


def _rounds(place: Path, spec: NoOpSpec, devices: tuple[str, ...]) -> list[float]:
    """Seconds of each round, with a process for each device."""
    replace = msgspec.structs.replace
    with killed(start("noop_agent", place / one, replace(spec, devices=(one,))) for one in devices):
        return lead(place / "leader", replace(spec, devices=devices, folder=str(place / "leader")))[0]


def _bare(place: Path, count: int, rounds: int) -> list[float]:
    """Seconds of the same bytes down and up through paho and Mosquitto, with nobody looking at them."""
    place.mkdir()
    with mosquitto(place) as (broker, _):
        command = [sys.executable, "-m", "fleetune.tools.bench.transfer.bare"]
        with killed(
            subprocess.Popen([*command, str(broker.port), "device", f"device-{number}"]) for number in range(count)
        ):
            done = subprocess.run(
                [*command, str(broker.port), "lead", str(count), str(rounds)],
                capture_output=True,
                text=True,
                timeout=600,
                check=True,
            )
    return [float(line) for line in done.stdout.split()]


def _flower(
    python: Path, place: Path, devices: int, say: Callable[[str], None], *, streams: bool, quick: bool
) -> list[float]:
    """Milliseconds of each of Flower's rounds.

    Raises:
        RunFailedError: It does not get through one.
    """
    rounds = (30 if devices < 64 else 10) if streams else 4 if quick else 10
    found = flower_rounds(
        *(python, place),
        devices=devices,
        rounds=rounds,
        tensors=lora_matrices(),
        streams=streams,
        limit_s=400.0,
        say=say,
    )
    if not found:
        raise RunFailedError("no round ended within 400 s", f"see {place}")
    return [1e3 * seconds for seconds in found]


def _idle(place: Path, repeats: int) -> tuple[list[float], list[float]]:
    """Resident set of an agent that waits, in MiB; and of one with an identity."""
    place.mkdir()
    bare, member = list[float](), list[float]()
    with mosquitto(place) as (broker, _), secured(place / "secured", FLEET, ("idle",)) as lab:
        for repeat in range(repeats):
            for address, identities, found in ((broker, "", bare), (lab.address, str(lab.identities), member)):
                state = place / f"{len(bare)}-{len(member)}"
                spec = msgspec.structs.replace(
                    spec_for(address, state, ("idle",), {}, 1), identities=identities, tls=address.tls
                )
                agent = start("noop_agent", place / f"agent-{state.name}", spec)
                with killed([agent]):
                    time.sleep(3.0)
                    if agent.poll() is not None:
                        raise RunFailedError(f"the agent of turn {repeat} has ended", f"see {place}")
                    found.append(psutil.Process(agent.pid).memory_info().rss / 2**20)
    return bare, member
