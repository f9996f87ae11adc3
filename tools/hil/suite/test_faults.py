"""What a board withstands. Each test names the protection without which it fails."""

from __future__ import annotations

import time

import pytest

from fleetune.tools.hil.device import FILLER, SCRATCH, DeviceUnderTest
from fleetune.tools.hil.plugin import Measure, Serve
from fleetune.tools.hil.protection import AgentOptions, KitLine, StartsAtBoot
from fleetune.tools.hil.suite.jobs import DONE_WITHIN_S, LONG_S, Rounds, model
from fleetune.tools.places import AGENT, STATE
from fleetune.tools.rig import SMALL, Job
from fleetune.tools.secured import Mosquitto

_HOG = """\
import mmap, time
left = int(next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable")).split()[1]) << 10
held = mmap.mmap(-1, left - (24 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
time.sleep(3600)
"""

LIVE_GUARD = KitLine(
    "the live guard",
    "edge/resources/guard.py",
    "self.wanted_mib = 0.0 if self._excess_mib is None else self._excess_mib()",
    "self.wanted_mib = 0.0",
)
OUTBOX = KitLine(
    "the outbox on disk",
    "edge/agent/state.py",
    'write_atomic(self._update(manifest.update), b"".join((encode(manifest), b"\\n", data, lost)))',
    "pass",
)
RECONNECT = KitLine("it connects anew", "edge/protocol/link.py", "self._failures += 1", "self._open_at = 1e12")
SMALL_UPDATES = AgentOptions("updates of four bits", ("--codec", "f32"))
PATIENCE = KitLine(
    "it waits for room",
    "edge/protocol/files.py",
    "return error.errno in (errno.ENOSPC, errno.EDQUOT)",
    "return False",
)
ASKS_THE_TIME = KitLine("it asks for the time", "edge/agent/heard.py", "self._clock.set(reply.now)", "pass")
OWN_CLOCK = KitLine(
    "certificates by its own clock", "edge/protocol/identity/tls.py", "context.verify_flags |= _NO_CHECK_TIME", "pass"
)
HEAT = KitLine("it waits while it is hot", "edge/agent/rounds.py", "if hot := self._heat.reason():", 'if hot := "":')


def _wait_for_work(device: DeviceUnderTest, job: Job) -> None:
    """Until it is in the midst of a round."""
    device.wait_until(lambda: not job.ended and "fedms: global" in device.says, "begins the round", DONE_WITHIN_S)


@pytest.mark.protected_by(LIVE_GUARD)
def test_it_gives_memory_back_when_another_takes_it(
    fleet_device: DeviceUnderTest, aggregator: Serve, rounds_of: Rounds, measure: Measure
) -> None:
    restarts, job = fleet_device.restarts, aggregator(*rounds_of(10 * LONG_S))
    _wait_for_work(fleet_device, job)
    fleet_device.put(f"{SCRATCH}/hog.py", _HOG.encode())
    fleet_device.start("hog", f"exec /usr/bin/python3* {SCRATCH}/hog.py", "OOMScoreAdjust=1000")
    update = job.wait_for_update(DONE_WITHIN_S)
    fleet_device.stop("hog")
    events = dict(line.split() for line in fleet_device.run(f"cat {_GROUP}/memory.events").splitlines())
    measure("asked to give memory back", float(update.metrics["eased"]), "times")
    assert float(update.metrics["eased"]) >= 1
    assert (fleet_device.restarts, events["oom_kill"]) == (restarts, "0")


@pytest.mark.needs("power")
@pytest.mark.protected_by(OUTBOX)
def test_what_it_has_trained_survives_a_power_cut(
    fleet_device: DeviceUnderTest, aggregator: Serve, rounds_of: Rounds, broker: Mosquitto
) -> None:
    job, mark = aggregator(*rounds_of(LONG_S)), fleet_device.mark()
    _wait_for_work(fleet_device, job)
    broker.close()  # the update has to wait
    try:
        trained = "fedms: global, round 1: "
        fleet_device.wait_until(lambda: trained in fleet_device.log(mark), "ends the round", DONE_WITHIN_S)
        time.sleep(2.0)
        fleet_device.cut_power()
    finally:
        broker.start()
    fleet_device.wait_for_agent()
    job.wait_for_update(DONE_WITHIN_S)
    assert trained not in fleet_device.run(f"journalctl --boot --unit={AGENT} --output=cat --no-pager")


@pytest.mark.needs("power")
@pytest.mark.protected_by(StartsAtBoot())
def test_it_goes_on_after_a_power_cut_in_the_midst_of_a_round(
    fleet_device: DeviceUnderTest, aggregator: Serve, rounds_of: Rounds, measure: Measure
) -> None:
    job = aggregator(*rounds_of(LONG_S))
    _wait_for_work(fleet_device, job)
    start, boot = time.monotonic(), max(int(one.manifest.metrics["boot"]) for one in job.accepted())
    fleet_device.cut_power()
    fleet_device.wait_for_agent()
    measure("up again", time.monotonic() - start, "s")
    update = job.wait_for_update(DONE_WITHIN_S)
    assert int(update.metrics["boot"]) > boot


@pytest.mark.protected_by(RECONNECT)
def test_it_comes_back_when_its_link_does(fleet_device: DeviceUnderTest, aggregator: Serve, rounds_of: Rounds) -> None:
    job = aggregator(*rounds_of(LONG_S))
    _wait_for_work(fleet_device, job)
    link = fleet_device.link
    fleet_device.start("flap", f"ip link set {link} down; sleep 15; ip link set {link} up")
    job.wait_for_update(120.0)


@pytest.mark.protected_by(SMALL_UPDATES)
def test_a_slow_link_is_enough(fleet_device: DeviceUnderTest, aggregator: Serve, measure: Measure) -> None:
    start = time.monotonic()
    with fleet_device.slow_link("16kbit"):
        job = aggregator(*SMALL)
        updates = job.wait(60.0)
    measure("over 16 kbit/s", time.monotonic() - start, "s")
    update = max(one.manifest.payload.size for one in updates if one.manifest.payload is not None)
    numbers = sum(tensor.size for tensor in model(job).values())
    measure("update", update, "bytes")
    assert update < numbers  # a byte each; the adapters of a larger pack would take minutes, had they four


@pytest.mark.protected_by(RECONNECT)
def test_it_comes_back_when_its_broker_does(
    fleet_device: DeviceUnderTest, aggregator: Serve, rounds_of: Rounds, broker: Mosquitto
) -> None:
    job = aggregator(*rounds_of(LONG_S))
    _wait_for_work(fleet_device, job)
    broker.close()
    try:
        time.sleep(5.0)
    finally:
        broker.start()
    job.wait_for_update(120.0)


@pytest.mark.protected_by(PATIENCE)
def test_it_waits_while_its_disk_is_full(fleet_device: DeviceUnderTest, aggregator: Serve) -> None:
    restarts = fleet_device.restarts
    fleet_device.fill_disk(f"/{STATE}")
    job = aggregator(*SMALL)
    fleet_device.wait_until(lambda: "no room" in fleet_device.says, "waits for room", 120.0)
    fleet_device.run(f"rm {FILLER}*")
    job.wait(DONE_WITHIN_S)
    assert fleet_device.restarts == restarts


@pytest.mark.protected_by(ASKS_THE_TIME)
def test_it_trains_while_its_clock_is_three_days_ahead(fleet_device: DeviceUnderTest, aggregator: Serve) -> None:
    with fleet_device.clock("+3 days"):
        fleet_device.restart_agent()
        aggregator(*SMALL).wait_for_update(120.0)


@pytest.mark.protected_by(OWN_CLOCK)
def test_it_trains_while_its_clock_is_years_behind(fleet_device: DeviceUnderTest, aggregator: Serve) -> None:
    """As on a board that has no battery for its clock, before it has heard the time."""
    with fleet_device.clock("2015-01-01"):
        fleet_device.run(f"systemctl reset-failed {AGENT}; systemctl restart --no-block {AGENT}")
        aggregator(*SMALL).wait_for_update(120.0)


@pytest.mark.protected_by(HEAT)
def test_it_does_not_train_while_it_is_hot(fleet_device: DeviceUnderTest, aggregator: Serve) -> None:
    """By sensors of a recording: who can heat a real board at will, does so instead."""
    zone = f"{SCRATCH}/sensors/sys/class/thermal/thermal_zone0"
    for name, text in {"type": "CPU-therm", "temp": "98000", "trip_point_0_type": "passive"}.items():
        fleet_device.put(f"{zone}/{name}", f"{text}\n".encode())
    fleet_device.put(f"{zone}/trip_point_0_temp", b"97000\n")
    with fleet_device.agent_with("--sensors", f"{SCRATCH}/sensors"):
        job = aggregator(*SMALL)
        fleet_device.wait_until(lambda: "throttles" in fleet_device.says, "waits until it is cooler", 60.0)
        time.sleep(5.0)
        assert job.accepted() == []
        fleet_device.put(f"{zone}/temp", b"80000\n")
        job.wait_for_update(DONE_WITHIN_S)


@pytest.mark.needs("thermal")
def test_it_does_not_throttle_in_a_round(
    fleet_device: DeviceUnderTest, aggregator: Serve, rounds_of: Rounds, measure: Measure
) -> None:
    aggregator(*rounds_of(LONG_S)).wait(DONE_WITHIN_S)
    said = fleet_device.run("cat /sys/class/thermal/thermal_zone*/temp")
    measure("temperature", max(map(int, said.split())) / 1000, "°C")


_GROUP = f"/sys/fs/cgroup/system.slice/{AGENT}"
