"""`fleetune doctor` as an engineer meets it on a board, and as a fleet's scripts do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.edge.pack.pack import Pack
from fleetune.server.broker import embedded_broker, free_port
from fleetune.tools.doctor import broker, clock, disk, host, identity, memory, pack, wheels
from fleetune.tools.doctor.examination import Subject, examine
from support.trees import plant, sample

ROOT = Path(__file__).parents[3]
ORDER = ["board", "python", "glibc", "wheels", "memory", "disk", "clock", "heat"]
FORBIDDEN = ("torch", "transformers", "optimum", "bitsandbytes", "onnx", "matplotlib", "rich", "jinja2", "iotcore")

BLOCKER = f"""\
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ImportError(f"the plain install has no {{name}}")
sys.meta_path.insert(0, Blocker())
"""


def doctor(*options: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run it, with a folder in front of what is installed."""
    places = [str(path)] if path else []
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "fleetune.tools.cli", "doctor", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


def test_everything_at_once_with_nothing_but_the_plain_install(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        "{schema: 1, fleet: lab, devices: [{id: cam-01, profile: raspberry-pi-5, budget: {memory: 1GiB}}]}\n"
    )
    with embedded_broker(free_port()) as address:
        done = doctor(
            *("--state", tmp_path, "--pack", tiny_bert_pack.path, "--json"),
            *("--broker", str(address), "--fleet", fleet, "--id", "cam-01"),
            path=tmp_path,
        )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found.keys() == {"board", "tier", "checks"}
    assert found["tier"] == host.read_board().tier
    checks = {check["name"]: check for check in found["checks"]}
    assert [name for name in checks if name != "probes"] == [*ORDER[:4], "pack", *ORDER[4:], "broker"]
    assert all(check.keys() == {"name", "verdict", "found", "fix", "code"} for check in checks.values())
    assert checks["wheels"]["verdict"] == checks["pack"]["verdict"] == "ok"
    assert checks["broker"]["verdict"] == "note"  # one that is open to all
    assert done.returncode == 0


def test_the_text_fits_a_serial_line_and_needs_no_colours(tmp_path: Path) -> None:
    done = doctor("--state", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout
    rows = [line.split()[:2] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [name for _, name in rows if name != "probes"] == ORDER
    assert {verdict for verdict, _ in rows} <= {"ok", "note"}


def test_the_first_failure_gives_the_code_and_the_others_are_still_told(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    nobody = ("--broker", "mqtt://127.0.0.1:1", "--fleet", "lab", "--id", "cam-01")
    done = doctor("--state", tmp_path / "state", "--pack", tmp_path, *nobody)
    assert done.returncode == pack.PACK
    for name, code in (("pack", pack.PACK), ("disk", disk.DISK), ("broker", broker.UNREACHABLE)):
        assert re.search(rf"^failure  {name} .*?fix \(exit code {code}\): \S", done.stdout, re.MULTILINE | re.DOTALL)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["msgspec", "numpy", "paho"])
def test_a_crashing_wheel_does_not_take_the_doctor_along(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    nobody = ("--broker", "mqtt://127.0.0.1:1", "--fleet", "lab", "--id", "cam-01")
    done = doctor("--json", "--pack", tmp_path, *nobody, path=tmp_path)
    assert done.returncode == wheels.WHEELS, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert "SIGILL" in checks["wheels"]["found"]
    blocked = {
        "msgspec": {"pack", "memory", "disk", "clock", "heat", "broker"},
        "numpy": {"pack"},
        "paho": {"pack", "broker"},
    }[module]
    assert {name for name, check in checks.items() if check["found"].startswith("not checked")} == blocked
    assert all(checks[name]["verdict"] == "note" for name in blocked)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--broker", "mqtt://b"), 2, "--broker, --fleet and --id belong together"),
        (("--fleet", "lab", "--id", "cam-01"), 2, "--broker, --fleet and --id belong together"),
        (("--broker", "http://b", "--fleet", "lab", "--id", "cam-01"), 10, "remedy: write mqtts://"),
        (("--broker", "mqtt://b", "--fleet", "a b", "--id", "cam-01"), 10, "--fleet: 'a b'"),
        (("--broker", "mqtt://b", "--fleet", "no/fleet.yaml", "--id", "cam-01"), 10, "no/fleet.yaml cannot be read"),
        (("--broker", "mqtt://b", "--fleet", __file__, "--id", "cam-01"), 10, "test_command.py"),
    ],
)
def test_a_wrong_command_line_is_no_failure_of_the_device(options: tuple[str, ...], code: int, words: str) -> None:
    done = doctor("--json", *options)
    assert done.returncode == code
    assert words in done.stderr
    assert done.stdout == ""


def test_what_could_not_be_read_is_told(tmp_path: Path) -> None:
    root = tmp_path / "root"
    plant(root, sample("jetson-nano-r32") | {"/sys/class/thermal/thermal_zone3/temp": "warm"})
    board = host.read_board(root, "aarch64", (3, 10))
    checks = {check.name: check for check in examine(Subject(board, tmp_path, root=root))}
    assert checks["probes"].verdict == "note"
    assert "thermal_zone3/temp: not a number" in checks["probes"].found
    assert checks["board"].found.endswith("tier T1")
    assert "power mode 5W" in checks["heat"].found


def test_it_is_part_of_the_plain_install() -> None:
    assert re.search(r"^    fleetune\.tools\.doctor$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_code_and_every_check_has_its_line_in_the_documents() -> None:
    codes = [host.BOARD, host.PYTHON, host.GLIBC, wheels.WHEELS, pack.PACK, memory.MEMORY, disk.DISK, clock.CLOCK]
    codes += [
        broker.UNREACHABLE,
        broker.NOT_MQTT_5,
        broker.PUBLISH_DENIED,
        broker.NOTHING_BACK,
        broker.PACKET_TOO_SMALL,
        identity.IDENTITY,
        broker.NO_ENTRY,
        broker.RIGHTS_TOO_WIDE,
    ]
    assert codes == list(range(30, 46))
    table, page = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("exit-codes.md", "doctor.md"))
    assert re.findall(r"^\| (\d+) \| `fleetune doctor`", table, re.MULTILINE) == [str(code) for code in codes]
    for name, code in [*zip([*ORDER[:4], "pack", *ORDER[4:7]], codes, strict=False), ("identity", identity.IDENTITY)]:
        assert f"| `{name}` | {code} |" in page
    for code in codes[8:]:
        assert f"| {code} |" in page
