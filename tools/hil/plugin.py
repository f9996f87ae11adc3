"""The pytest plugin: fixtures for boards that labgrid has, and a report of what was measured.

In a ``conftest.py`` of your own: ``pytest_plugins = ["fleetune.tools.hil.plugin"]``. Then
``pytest --lg-env hil/nano-1.yaml --rig rigs/nano-1``.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.hil.device import DeviceUnderTest
from fleetune.tools.hil.environment import DEVICE_OPTION, STRATEGY, TTY_OPTION
from fleetune.tools.hil.protection import Protection
from fleetune.tools.hil.run import TOLD
from fleetune.tools.hil.strategy import FleetuneStrategy
from fleetune.tools.rig import SEEDS, Job, Rig, equipment, open_rig
from fleetune.tools.secured import Mosquitto

PROMPT = r"(\x1b\[\?2004[hl])?root@\S+:\S+# "
"""A shell's, behind "bracketed paste"."""

Measure = Callable[..., None]
Keep = Callable[[str, bytes], Path]
Serve = Callable[..., Job]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ours."""
    group = parser.getgroup("fleetune", "boards of a Fleetune fleet")
    group.addoption("--rig", metavar="DIR", type=Path, help="the fleet's own side, as `fleetune hil rig` made it")
    group.addoption("--build", metavar="RECORD", type=Path, help="what the boards were flashed with, *.build.json")
    group.addoption("--results", metavar="FILE", type=Path, help="write outcomes and measurements as JSON")
    group.addoption("--without", action="store_true", help="run tests of faults with what they test switched off")


def pytest_configure(config: pytest.Config) -> None:
    """Make our markers known."""
    config.addinivalue_line("markers", "needs(*features): what a board has to have, such as power, cuda, thermal")
    config.addinivalue_line("markers", "protected_by(protection): what the test tests; --without switches it off")
    config.stash[_RESULTS] = {}
    if config.getoption("rig") is not None:  # what runs for it has to end, as it does with Ctrl-C
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse to run tests of boards without a board, or without a rig: to skip them all would look like success."""
    asked = {name for item in items for name in getattr(item, "fixturenames", ())}
    if "rig" not in asked or config.option.collectonly:
        return
    if config.getoption("lg_env") is None and "LG_ENV" not in os.environ:
        raise pytest.UsageError("name the environment of a board: --lg-env=hil/NAME.yaml")
    folder: Path | None = config.getoption("rig")
    if folder is None:
        raise pytest.UsageError("name the board's rig, as `fleetune hil rig` made it: --rig=rigs/NAME")
    if not (folder / SEEDS).is_dir():
        raise pytest.UsageError(f"--rig: {folder} is no rig; `fleetune hil rig` makes one for each board")


def tell(config: pytest.Config, words: str) -> None:
    """Say what is being done, in a line of its own."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        reporter.write_line(f"\n{TOLD}{words}")


# --- which tests run ------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Run, without what tests protect, only those that name it."""
    if item.config.getoption("without") and item.get_closest_marker("protected_by") is None:
        pytest.skip("protects nothing that could be switched off")


# --- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """The fleet's own side, running."""
    folder: Path = request.config.getoption("rig")
    env = request.getfixturevalue("env")
    with open_rig(folder, listen="127.0.0.1" if "emulated" in env.get_features() else "") as running:
        yield running


@pytest.fixture(scope="session")
def broker(rig: Rig) -> Mosquitto:
    """The fleet's broker: ``close`` and ``start`` it as you like."""
    return rig.broker


@pytest.fixture(scope="session")
def pack(rig: Rig) -> Pack:
    """What the boards train."""
    return Pack.open(rig.pack)


@pytest.fixture(scope="session")
def build(request: pytest.FixtureRequest) -> Path:
    """Record of the build that the board was flashed with."""
    record: Path | None = request.config.getoption("build")
    if record is None:
        pytest.skip("no build: name what the board was flashed with by --build")
    return record


@pytest.fixture
def aggregator(rig: Rig) -> Iterator[Serve]:
    """Starts an aggregator with options of ``fleetune serve``; it ends with the test."""
    jobs = list[Job]()

    def serve(*options: str) -> Job:
        jobs.append(rig.serve(*options))
        return jobs[-1]

    yield serve
    for job in jobs:
        job.stop()


@pytest.fixture(scope="session")
def board(request: pytest.FixtureRequest, rig: Rig, env: Any, strategy: Any) -> DeviceUnderTest:
    """The board: up, and with what its rig gives it. ``env`` and ``strategy`` are labgrid's."""
    name = env.config.get_option(DEVICE_OPTION)
    if not isinstance(strategy, FleetuneStrategy):
        raise ConfigError(f"{name}: {type(strategy).__name__} is no {STRATEGY}", "derive it from that")
    device = DeviceUnderTest(name, strategy, frozenset(env.get_features() | env.get_target_features()))
    tell(request.config, f"{name} starts")
    device.bring("up")
    tell(request.config, f"{name} is up; a first boot takes minutes, and longer where no profile is measured yet")
    device.equip(equipment(rig.folder))
    return device


@pytest.fixture
def fleet_device(request: pytest.FixtureRequest, board: DeviceUnderTest, rig: Rig) -> Iterator[DeviceUnderTest]:
    """The board: provisioned, with its agent up, and nothing of another test left on it."""
    wanted = {str(name) for marker in request.node.iter_markers("needs") for name in marker.args}
    if missing := sorted(wanted - board.features):
        pytest.skip(f"needs hardware: {', '.join(missing)}")
    if not board.is_known:
        board.restore()
    board.is_known = False
    marker = request.node.get_closest_marker("protected_by")
    protection: Protection | None = marker.args[0] if marker is not None else None
    try:
        if protection is not None and request.config.getoption("without"):
            with protection.off(board, rig):
                yield board
        else:
            yield board
    finally:
        board.restore()


@pytest.fixture
def shell(fleet_device: DeviceUnderTest) -> Iterator[Any]:
    """A shell on the board's serial console, as labgrid's ShellDriver has it."""
    from labgrid.driver import ShellDriver

    strategy = fleet_device.strategy
    if strategy.console is None:
        pytest.skip("needs hardware: console")
    if isinstance(strategy.command, ShellDriver):
        yield strategy.command
        return
    tty = strategy.target.env.config.get_option(TTY_OPTION, "ttyS0")
    getty = f"serial-getty@{tty}.service"
    fleet_device.run(f"systemctl start {getty}")
    shell = ShellDriver(strategy.target, "shell", prompt=PROMPT, login_prompt="login: ", username="root")
    try:
        strategy.open_shell(shell)
        yield shell
    finally:
        strategy.target.deactivate(shell)
        strategy.console.write(b"\x03q\x15")
        strategy.console.read(timeout=5.0)  # who speaks to nobody stands still
        fleet_device.run(f"systemctl stop {getty}")


@pytest.fixture
def measure(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Measure:
    """Writes a figure into the report: ``measure("peak", 61.2, "MiB")``."""
    figures = request.config.stash[_RESULTS].setdefault(request.node.nodeid, {}).setdefault("figures", {})

    def write(name: str, value: float, unit: str) -> None:
        figures[name] = {"value": value, "unit": unit}
        record_property(name, f"{value:g} {unit}")

    return write


@pytest.fixture
def keep(request: pytest.FixtureRequest, tmp_path: Path) -> Keep:
    """Keeps a file of the board's beside the results: ``keep("doctor.json", data)`` returns where."""
    results: Path | None = request.config.getoption("results")

    def write(name: str, data: bytes) -> Path:
        file = (tmp_path if results is None else results.parent) / name
        write_atomic(file, data)
        return file

    return write


# --- the report -----------------------------------------------------------------------------------------------------

_LONGEST = 2000
_BROKEN = "is in broken state"
_RESULTS: pytest.StashKey[dict[str, dict[str, Any]]] = pytest.StashKey()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep what came of a test."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
    result = item.config.stash[_RESULTS].setdefault(item.nodeid, {})
    result["seconds"] = round(result.get("seconds", 0.0) + report.duration, 1)
    if report.failed:
        why = str(report.longrepr) if call.excinfo is None else _cause(call.excinfo.value)
        failed = report.when == "call" or result.get("outcome") == "failed"
        result["outcome"], result["why"] = "failed" if failed else "error", why.strip()[:_LONGEST]
    elif report.skipped and isinstance(report.longrepr, tuple):
        why = report.longrepr[2].removeprefix("Skipped: ")
        result["outcome"], result["why"] = "skipped", why if _BROKEN not in why else "its board could not be had"
    else:
        result.setdefault("outcome", "passed")


def _cause(error: BaseException) -> str:
    """What went wrong: labgrid hides what broke a strategy behind that it is broken."""
    while _BROKEN in str(error) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write it."""
    file: Path | None = session.config.getoption("results")
    if file is not None:
        tests = {name.rpartition("/")[2]: result for name, result in session.config.stash[_RESULTS].items()}
        write_atomic(file, json.dumps({"schema": 1, "tests": tests}, indent=1).encode() + b"\n")
