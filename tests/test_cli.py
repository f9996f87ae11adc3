"""The command line as a user meets it: help that works when it is copied, and a code of its own for every mistake."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.pack.manifest import FILE, WEIGHTS_FILE
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.codec import DEFAULT
from fleetune.edge.protocol.errors import FleetuneError
from fleetune.server.broker import free_port
from fleetune.tools.cli import build_parser

ROOT = Path(__file__).parents[1]
FLEETUNE = [sys.executable, "-m", "fleetune.tools.cli"]
NOBODY = "mqtt://127.0.0.1:1"
"""Nothing listens on port 1."""

FLEET = """\
schema: 1
fleet: lab
devices:
  - id: cam-01
    profile: raspberry-pi-5
    budget:
      memory: 1GiB
      cpu_seconds: 100
"""


def fleetune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FLEETUNE, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *named: str | Path) -> None:
    """The command left with ``code``, and its one line ``error:`` names everything that the user has to look for."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    errors = re.findall(r"^error: (.+)$", done.stderr, re.MULTILINE)
    assert len(errors) == 1, done.stderr
    assert re.search(r"^remedy: \S", done.stderr, re.MULTILINE), done.stderr
    for text in named:
        assert str(text) in errors[0]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and folder below, hidden ones included."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


class Bench:
    """A folder with everything that an agent and an aggregator of one device need, except a broker."""

    def __init__(self, folder: Path, pack: Path, data: Path) -> None:
        self.folder, self.pack, self.data = folder, pack, data
        self.fleet = folder / "fleet.yaml"
        self.fleet.write_text(FLEET)

    def arguments(self, command: str, *more: str | Path, broker: str = NOBODY) -> list[str]:
        """A command that is right but for what ``more`` overrides."""
        own = ["--id", "cam-01", "--data", self.data, "--threads", "1"] if command == "agent" else ["--classes", "2"]
        common = ["--fleet", self.fleet, "--pack", self.pack, "--state", self.folder / command, "--broker", broker]
        return [command, *map(str, common), *map(str, own), *map(str, more)]

    def assert_refuses(self, code: int, command: str, *more: str | Path, named: tuple[str | Path, ...]) -> None:
        """The command is refused with this code, and nothing in the folder has changed."""
        before = tree(self.folder)
        assert_refused(fleetune(*self.arguments(command, *more)), code, *named)
        assert tree(self.folder) == before

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copy_pack(self) -> Path:
        """The pack again, to be damaged."""
        return Path(shutil.copytree(self.pack, self.folder / "pack"))


class Pair:
    """An agent and an aggregator at the same time: an aggregator waits some seconds for its broker."""

    def __init__(self, bench: Bench, broker: str) -> None:
        self._processes = {
            command: subprocess.Popen(
                [*FLEETUNE, *bench.arguments(command, broker=broker)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command in ("agent", "serve")
        }

    def wait(self, command: str) -> subprocess.CompletedProcess[str]:
        process = self._processes[command]
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def finish(self) -> list[subprocess.CompletedProcess[str]]:
        return [self.wait(command) for command in self._processes]

    def waits(self, command: str) -> bool:
        return self._processes[command].poll() is None

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def lonely(tiny_bert_pack: Pack, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A pair without a broker. One tries for ten seconds, so it starts before the other tests that need a pack."""
    pair = Pair(Bench(tmp_path_factory.mktemp("lonely"), tiny_bert_pack.path, text_data), NOBODY)
    yield pair
    pair.kill()


@pytest.fixture
def bench(tmp_path: Path, tiny_bert_pack: Pack, text_data: Path, lonely: Pair) -> Bench:
    return Bench(tmp_path, tiny_bert_pack.path, text_data)


# --- help -----------------------------------------------------------------------------------------------------------


def subcommands() -> list[str]:
    actions = build_parser()._actions
    return [
        name for action in actions if isinstance(action, argparse._SubParsersAction) for name in (action.choices or {})
    ]


def command_lines(text: str) -> list[str]:
    """What starts with ``fleetune``, continued lines joined, without pipes, redirections and the comments behind."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    lines = [line.strip().rpartition(" | ")[2] for line in joined.splitlines()]
    return [re.split(r"\s{2,}| > ", line)[0] for line in lines if line.startswith("fleetune ")]


@pytest.mark.parametrize("command", [None, *subcommands()])
def test_the_examples_of_the_help_are_command_lines_that_work(command: str | None) -> None:
    done = fleetune(*([command] if command else []), "--help")
    assert done.returncode == 0, done.stderr
    help_text, _, examples = done.stdout.partition("\nexamples:\n")
    assert help_text.startswith(f"usage: fleetune {command or ''}".rstrip())
    lines = command_lines(examples)
    assert any(line.startswith(f"fleetune {command or ''}".rstrip()) for line in lines)
    for line in lines:
        args = build_parser().parse_args(shlex.split(line)[1:])  # argparse exits where an option is wrong or missing
        assert command in (None, args.command)


def test_the_help_lists_every_command() -> None:
    text = fleetune("--help").stdout
    assert len(subcommands()) > 1
    for command in subcommands():
        assert re.search(rf"^ +{command}\s+\S", text, re.MULTILINE)


def test_what_travels_is_encoded_as_the_codec_that_the_protocol_names() -> None:
    for command in ("agent --fleet f --id i --pack p --data d", "serve --fleet f --pack p --classes 2"):
        line = f"{command} --broker mqtt://b --state s"
        assert build_parser().parse_args(line.split()).codec == DEFAULT


def test_the_command_lines_of_the_readme_work() -> None:
    lines = command_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {shlex.split(line)[1] for line in lines} >= {"pack", "serve", "agent"}
    for line in lines:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize(
    "arguments", [["fly"], [], ["agent"], ["broker", "--port", "many"], ["demo", "--task", "sing"]]
)
def test_a_wrong_command_line_exits_2_and_shows_the_usage(arguments: list[str]) -> None:
    done = fleetune(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: fleetune")
    assert "Traceback" not in done.stderr


# --- the table of exit codes ----------------------------------------------------------------------------------------


def subclasses(of: type[FleetuneError]) -> Iterator[type[FleetuneError]]:
    for kind in of.__subclasses__():
        yield kind
        yield from subclasses(kind)


def test_the_table_of_exit_codes_lists_every_error_once() -> None:
    text = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (?:`(\w+)`)? ?\| .+ \|.*\|$", text, re.MULTILINE)
    listed = {name: int(code) for code, name in rows if name}
    assert listed == {kind.__name__: kind.exit_code for kind in subclasses(FleetuneError)}
    codes = [int(code) for code, _ in rows]
    assert len(set(codes)) == len(codes)
    assert {0, 1, 2, 130} <= set(codes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_service_that_is_told_to_stop_leaves_with_the_documented_code(number: signal.Signals, code: int) -> None:
    pytest.importorskip("iotcore", reason="needs iotcore: pip install 'fleetune[server]'")
    command = [*FLEETUNE, "broker", "--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline().startswith("broker: mqtt://")
            process.send_signal(number)
            assert process.wait(20) == code
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read()


# --- the fleet file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new", "named"), [
    ("profile:", "colour: red\n    profile:", ("fleet.yaml, line 5", "field devices[0].colour", "no such field")),
    ("cpu_seconds: 100", "cpu_seconds: many", ("fleet.yaml, line 8", "field devices[0].budget.cpu_seconds", "many")),
    ("schema: 1", "schema: 2", ("fleet.yaml, line 1", "field schema", "2")),
    ("devices:", "devices: [", ("fleet.yaml, line 4", "not YAML")),
    ("raspberry-pi-5", "abacus", ("fleet.yaml", "field devices[0].profile", "abacus")),
])  # fmt: skip
def test_a_mistake_in_the_fleet_file_is_found_where_it_is(
    bench: Bench, old: str, new: str, named: tuple[str, ...]
) -> None:
    assert old in FLEET
    bench.fleet.write_text(FLEET.replace(old, new))
    bench.assert_refuses(10, "agent", named=named)


@pytest.mark.parametrize("command", ["agent", "serve"])
def test_a_fleet_file_that_is_not_there_is_named(bench: Bench, command: str) -> None:
    bench.fleet.unlink()
    bench.assert_refuses(10, command, named=(bench.fleet, "No such file"))


def test_a_device_that_is_not_of_the_fleet_is_named_with_the_file(bench: Bench) -> None:
    bench.assert_refuses(10, "agent", "--id", "cam-99", named=("--id", bench.fleet, "cam-99"))


# --- packs and data -------------------------------------------------------------------------------------------------


def alter(pack: Path) -> Path:
    file = pack / WEIGHTS_FILE
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    return file


def remove(pack: Path) -> Path:
    file = pack / WEIGHTS_FILE
    file.unlink()
    return file


def forget_manifest(pack: Path) -> Path:
    (pack / FILE).unlink()
    return pack


def delete(pack: Path) -> Path:
    shutil.rmtree(pack)
    return pack


@pytest.mark.parametrize(("command", "damage", "what"), [
    ("agent", alter, "is not the file that was packed"),
    ("serve", alter, "is not the file that was packed"),
    ("agent", remove, "is missing"),
    ("serve", forget_manifest, "is not a pack"),
    ("agent", delete, "is not a pack"),
])  # fmt: skip
def test_a_pack_that_is_not_whole_exits_13(
    bench: Bench, command: str, damage: Callable[[Path], Path], what: str
) -> None:
    pack = bench.copy_pack()
    bench.assert_refuses(13, command, "--pack", pack, named=(damage(pack), what))


@pytest.mark.parametrize(("line", "named"), [
    ('{"text": "good film", "label": 0, "split": "train"', ()),
    ('{"text": "good film", "label": "good", "split": "train"}', ("label",)),
    ('{"text": "good film", "label": 0, "split": "train", "stars": 5}', ("stars",)),
    ('{"text": "good film", "label": -1, "split": "train"}', ("label", "-1")),
    (b'{"text": "\xff", "label": 0, "split": "train"}', ("UTF-8",)),
])  # fmt: skip
def test_a_bad_line_of_a_data_file_exits_17(bench: Bench, line: str | bytes, named: tuple[str, ...]) -> None:
    lines = bench.data.read_bytes().splitlines()
    lines[2] = line if isinstance(line, bytes) else line.encode()
    data = bench.write("samples.jsonl", b"\n".join(lines) + b"\n")
    bench.assert_refuses(17, "agent", "--data", data, named=(f"{data}, line 3", *named))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "fleet.yaml"])
def test_what_is_no_data_file_exits_17(bench: Bench, name: str) -> None:
    bench.assert_refuses(17, "agent", "--data", bench.folder / name, named=(bench.folder / name,))


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "url"), [
    ("agent", "http://127.0.0.1"),
    ("serve", "127.0.0.1:1883"),
    ("agent", "mqtt://"),
    ("serve", "mqtt://127.0.0.1:99999"),
])  # fmt: skip
def test_what_is_no_address_of_a_broker_exits_10(bench: Bench, command: str, url: str) -> None:
    bench.assert_refuses(10, command, "--broker", url, named=("broker", url))


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b'{"pack": "\xff"}', b'{"pack": "x"}'],
    ids=["bytes", "not UTF-8 inside", "a part"],
)
def test_costs_that_are_garbage_exit_10(bench: Bench, content: bytes) -> None:
    costs = bench.write("costs.json", content)
    bench.assert_refuses(10, "agent", "--costs", costs, named=("--costs", costs))


def test_costs_that_are_not_there_exit_10(bench: Bench) -> None:
    bench.assert_refuses(10, "agent", "--costs", "nowhere.json", named=("--costs", "nowhere.json"))


@pytest.mark.parametrize("command", ["agent", "serve"])
def test_a_state_folder_that_is_a_file_exits_10(bench: Bench, command: str) -> None:
    state = bench.write("note.txt", "keep me")
    bench.assert_refuses(10, command, "--state", state, named=("--state", state))


@pytest.mark.parametrize("command", ["agent", "serve"])
def test_a_state_folder_that_cannot_be_made_exits_21(bench: Bench, command: str) -> None:
    state = bench.write("note.txt", "keep me") / "state"
    bench.assert_refuses(21, command, "--state", state, named=(state,))


@pytest.mark.parametrize(("command", "option", "value"), [
    ("agent", "--threads", "-1"),
    ("serve", "--quorum", "0"),
    ("serve", "--quorum", "2"),
    ("serve", "--deadline", "0"),
    ("serve", "--deadline", "nan"),
    ("serve", "--classes", "1"),
    ("serve", "--max-depth", "0"),
    ("serve", "--max-depth", "4"),
    ("serve", "--global-rounds", "-1"),
    ("serve", "--personal-rounds", "-1"),
    ("serve", "--epochs", "0"),
    ("serve", "--batch", "0"),
    ("serve", "--learning-rate", "nan"),
    ("serve", "--learning-rate", "-0.5"),
    ("serve", "--gate-learning-rate", "nan"),
    ("serve", "--gate-learning-rate", "0"),
    ("agent", "--dp-min-noise", "0.0"),
    ("agent", "--dp-min-noise", "nan"),
    ("agent", "--dp-max-updates", "-1"),
    ("serve", "--dp-epsilon", "0.0"),
    ("serve", "--dp-noise", "-1.0"),
    ("serve", "--dp-delta", "1.0"),
    ("serve", "--dp-clip", "nan"),
    ("serve", "--dp-gate-clip", "inf"),
])  # fmt: skip
def test_an_option_out_of_range_is_named_with_its_value(bench: Bench, command: str, option: str, value: str) -> None:
    bench.assert_refuses(10, command, f"{option}={value}", named=(f"{option}: {value}",))


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_a_port_out_of_range_exits_10(port: str) -> None:
    assert_refused(fleetune("broker", "--port", port), 10, f"--port: {port}")


def test_a_port_that_is_taken_exits_15() -> None:
    pytest.importorskip("iotcore", reason="needs iotcore: pip install 'fleetune[server]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(fleetune("broker", "--port", str(port)), 15, f"127.0.0.1:{port}")


def test_an_asset_that_nobody_knows_exits_11() -> None:
    assert_refused(fleetune("assets", "minilm", "maxilm"), 11, "maxilm")


# --- fleetune pack --------------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "backbone"))


@pytest.mark.parametrize(("config", "named"), [
    ('{"model_type": "gpt2"}', "'gpt2'"),
    ("{", "not JSON"),
    (None, "cannot be read"),
])  # fmt: skip
def test_a_backbone_that_cannot_be_packed_exits_12_and_leaves_nothing(
    backbone: Path, tmp_path: Path, config: str | None, named: str
) -> None:
    file = backbone / "config.json"
    file.unlink() if config is None else file.write_text(config)
    before = tree(tmp_path)
    assert_refused(fleetune("pack", backbone, "--out", tmp_path / "packs" / "out"), 12, file, named)
    assert tree(tmp_path) == before


def test_a_damaged_weight_file_exits_12_and_leaves_nothing(backbone: Path, tmp_path: Path) -> None:
    weights = backbone / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = tree(tmp_path)
    assert_refused(fleetune("pack", backbone, "--out", tmp_path / "packs" / "out"), 12, weights)
    assert tree(tmp_path) == before


def test_a_pack_is_never_written_over(backbone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("keep me")
    before = tree(tmp_path)
    assert_refused(fleetune("pack", backbone, "--out", out), 18, out)
    assert tree(tmp_path) == before


def test_what_is_neither_a_backbone_nor_the_name_of_one_exits_11(tmp_path: Path) -> None:
    done = fleetune("pack", "minilmm", "--out", tmp_path / "out")
    assert_refused(done, 11, "'minilmm'")
    assert "minilm, focus-vit" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--rank", "0"), ("--targets", "query,nose"), ("--max-length", "2"), ("--max-length", "9999")]
)
def test_an_option_of_pack_out_of_range_exits_10_and_leaves_nothing(
    backbone: Path, tmp_path: Path, option: str, value: str
) -> None:
    before = tree(tmp_path)
    done = fleetune("pack", backbone, "--out", tmp_path / "out", option, value)
    assert_refused(done, 10, option, value.rpartition(",")[2])
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("option", "value"), [("--weights", "int8"), ("--rank", "4"), ("--image-size", "56")])
def test_an_option_of_writing_is_refused_where_a_pack_is_checked(
    backbone: Path, tmp_path: Path, option: str, value: str
) -> None:
    done = fleetune("pack", backbone, "--check", tmp_path / "pack", option, value)
    assert_refused(done, 10, option)


def test_a_pipe_that_breaks_elsewhere_than_at_the_output_is_an_error() -> None:
    script = """if True:
        import argparse
        from fleetune.tools import cli

        def run(_args): raise BrokenPipeError(32, "Broken pipe")

        parser = argparse.ArgumentParser()
        parser.set_defaults(run=run)
        cli.build_parser = lambda command: parser
        cli.main([])
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 21
    assert "Broken pipe" in done.stderr


# --- brokers --------------------------------------------------------------------------------------------------------


def test_a_broker_that_is_not_there_exits_15_but_an_agent_waits_for_it(lonely: Pair) -> None:
    assert_refused(lonely.wait("serve"), 15, f"no broker answers at {NOBODY}")
    assert lonely.waits("agent")


@contextmanager
def rumqttd_3_1_1() -> Iterator[int]:
    """A real broker that speaks MQTT 3.1.1 only, and hangs up on everything else."""
    iotcore = pytest.importorskip("iotcore", reason="needs iotcore: pip install 'fleetune[server]'")
    port = free_port()
    with iotcore.Broker(port=port, listen="127.0.0.1"):
        yield port


@contextmanager
def polite_3_1_1() -> Iterator[int]:
    """What MQTT 3.1.1 asks of a broker: CONNACK with the return code "unacceptable protocol version"."""

    def answer(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return  # closed: the test is over
            with connection:
                assert connection.recv(4096)[0] >> 4 == 1  # CONNECT
                connection.sendall(b"\x20\x02\x00\x01")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=[server], daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.mark.parametrize("broker", [rumqttd_3_1_1, polite_3_1_1])
def test_a_broker_of_mqtt_3_1_1_exits_16(bench: Bench, broker: Callable[[], Any]) -> None:
    with broker() as port:
        pair = Pair(bench, f"mqtt://127.0.0.1:{port}")
        try:
            for done in pair.finish():
                assert_refused(done, 16, f"mqtt://127.0.0.1:{port}", "MQTT 5")
        finally:
            pair.kill()


# --- fleetune demo --------------------------------------------------------------------------------------------------


@pytest.fixture
def _demo() -> None:
    for module in ("iotcore", "jinja2", "matplotlib", "rich"):
        pytest.importorskip(module, reason=f"needs {module}: pip install 'fleetune[all]'")


@pytest.mark.usefixtures("_demo")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.txt", "keep me"),
        ("run.json", "[1"),
        ("run.json", "[1]"),
        ("run.json", '{"seed": 99}'),
        ("report.json", "{}"),
    ],
)
def test_the_demo_does_not_touch_a_folder_that_holds_something_else(tmp_path: Path, name: str, content: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    assert_refused(fleetune("demo", "--out", out), 18, out)
    assert tree(tmp_path) == {str(out): b"", str(out / name): content.encode()}


@pytest.mark.usefixtures("_demo")
def test_the_demo_does_not_take_a_file_for_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("keep me")
    assert_refused(fleetune("demo", "--out", out), 18, out)
    assert out.read_text() == "keep me"


@pytest.mark.usefixtures("_demo")
@pytest.mark.parametrize(("option", "value", "code"), [
    ("--samples", "15", 10),
    ("--epochs", "0", 10),
    ("--max-depth", "0", 10),
    ("--global-rounds", "-1", 10),
    ("--learning-rate", "nan", 10),
    ("--gate-learning-rate", "-1.0", 10),
    ("--job", "standalone", 10),
    ("--broker", "http://127.0.0.1", 10),
    ("--backbone", "nowhere", 11),
])  # fmt: skip
def test_the_demo_refuses_an_option_before_it_takes_its_folder(
    tmp_path: Path, option: str, value: str, code: int
) -> None:
    named = (value,) if code == 11 else (option.removeprefix("--"), value)
    assert_refused(fleetune("demo", "--out", tmp_path / "out", f"{option}={value}"), code, *named)
    assert not (tmp_path / "out").exists()
