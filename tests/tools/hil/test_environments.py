"""``fleetune hil env``: what labgrid is to make of each board."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from labgrid import Environment

from fleetune.edge.protocol.errors import ConfigError
from fleetune.tools.cli import main
from fleetune.tools.hil.environment import read_environment

FLEET = """\
schema: 1
fleet: lab
devices:
  - {id: nano-1, profile: jetson-nano-2gb, budget: {memory: 512MiB}}
  - {id: orin-1, profile: orin-nano-8gb, budget: {memory: 2GiB}}
  - {id: pi-1, profile: raspberry-pi-5, budget: {memory: 1GiB}}
"""


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    file = tmp_path / "fleet.yaml"
    file.write_text(FLEET, encoding="utf-8")
    return file


def write(inventory: Path, out: Path, *options: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(["hil", "env", "--inventory", str(inventory), "--out", str(out), *options])
    return ended.value.code


def test_each_board_gets_an_environment_that_labgrid_reads(inventory: Path, tmp_path: Path) -> None:
    assert not write(inventory, tmp_path / "hil", "--place", "rack-1-{id}", "--power", "PDUDaemonDriver")
    features = {}
    for name in ("nano-1", "orin-1", "pi-1"):
        environment = Environment(str(tmp_path / f"hil/{name}.yaml"))
        assert environment.config.get_option("fleetune_device") == name
        (target,) = environment.config.get_targets().values()
        assert target["resources"] == [{"RemotePlace": {"name": f"rack-1-{name}"}}]
        drivers = [next(iter(driver)) for driver in target["drivers"]]
        assert drivers == ["SerialDriver", "PDUDaemonDriver", "ShellDriver", "FleetuneStrategy"]
        features[name] = environment.get_target_features()
    assert features == {"nano-1": {"jetson", "thermal"}, "orin-1": {"jetson", "thermal"}, "pi-1": {"thermal"}}


def test_what_was_changed_by_hand_stays(inventory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(inventory, tmp_path)
    (tmp_path / "nano-1.yaml").write_text("mine", encoding="utf-8")
    (tmp_path / "pi-1.yaml").unlink()
    capsys.readouterr()
    write(inventory, tmp_path)
    states = dict(reversed(line.split()) for line in capsys.readouterr().out.splitlines())
    assert states == {
        str(tmp_path / "nano-1.yaml"): "kept",
        str(tmp_path / "orin-1.yaml"): "kept",
        str(tmp_path / "pi-1.yaml"): "new",
    }
    assert (tmp_path / "nano-1.yaml").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--power", "pdu"], "labgrid has no driver 'pdu'"),
        (["--power", "ExternalPowerDriver"], "ExternalPowerDriver has to be told cmd_on, cmd_off"),
        (["--place", "rack-{name}"], "--place: 'rack-{name}': only {id} is filled in"),
    ],
)
def test_options_that_make_no_environment_are_named(
    inventory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert write(inventory, tmp_path / "hil", *options) == ConfigError.exit_code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "hil").exists()


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where one would listen."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        monkeypatch.setenv("LG_COORDINATOR", f"127.0.0.1:{listening.getsockname()[1]}")
        yield listening


def test_an_environment_says_which_device_it_is_once_a_coordinator_answers(
    inventory: Path, tmp_path: Path, coordinator: socket.socket
) -> None:
    write(inventory, tmp_path)
    with pytest.raises(ConfigError, match="no labgrid coordinator answers at 127") as caught:
        read_environment(tmp_path / "orin-1.yaml")
    assert "LG_COORDINATOR" in caught.value.remedy
    coordinator.listen()
    assert read_environment(tmp_path / "orin-1.yaml") == "orin-1"
    text = (tmp_path / "orin-1.yaml").read_text(encoding="utf-8")
    of_labgrids_own = text.replace("fleetune_tty: ttyTCU0", "mine: !template $LG_COORDINATOR")
    (tmp_path / "orin-2.yaml").write_text(of_labgrids_own, encoding="utf-8")
    assert read_environment(tmp_path / "orin-2.yaml") == "orin-1"


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("- FleetuneStrategy: {}", "", "drivers has no FleetuneStrategy"),
        ("imports: [fleetune.tools.hil.strategy]", "", "imports has no fleetune.tools.hil.strategy"),
        ("fleetune_device: orin-1", "", "options.fleetune_device is missing"),
        ("main:", "board:", "targets.main"),
        ("targets:", "targets: [", "is not YAML"),
        ("# coordinator_address: 192.168.1.2:20408", "coordinator_address: nowhere.invalid", "answers at nowhere.inv"),
    ],
)
def test_an_environment_that_is_none_is_named_before_a_run_begins(
    inventory: Path, tmp_path: Path, coordinator: socket.socket, was: str, becomes: str, said: str
) -> None:
    coordinator.listen()
    write(inventory, tmp_path)
    file = tmp_path / "orin-1.yaml"
    text = file.read_text(encoding="utf-8")
    assert was in text
    file.write_text(text.replace(was, becomes), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_environment(file)
    assert str(file) in caught.value.what
    assert said in caught.value.what


def test_a_board_without_a_template_is_named_and_nothing_is_written(inventory: Path, tmp_path: Path) -> None:
    inventory.write_text(FLEET.replace("raspberry-pi-5", "x86-64"), encoding="utf-8")
    assert write(inventory, tmp_path / "hil") == ConfigError.exit_code
    assert not (tmp_path / "hil").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("targets: {main: {drivers: [{SSHDriver: {}}]}}", "no FleetuneStrategy"),
        ("targets: [", "a template is YAML"),
        ("name: $nobody", "nobody"),
        ("just words", "no FleetuneStrategy"),
    ],
)
def test_a_template_that_makes_no_environment_is_refused(
    inventory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    template = tmp_path / "mine.yaml"
    template.write_text(text, encoding="utf-8")
    assert write(inventory, tmp_path / "hil", "--template", str(template)) == ConfigError.exit_code
    error = capsys.readouterr().err
    assert str(template) in error
    assert said in error
