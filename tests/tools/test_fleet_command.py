"""``fleetune fleet`` and ``fleetune enroll`` as an operator meets them: processes, files, words, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from pathlib import Path

import pytest

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import FleetuneError
from fleetune.edge.protocol.identity.enrolment import Token
from fleetune.edge.protocol.identity.folder import FILE, read_identity
from fleetune.edge.protocol.identity.keys import SeedSigner
from fleetune.edge.protocol.identity.tls import client_context
from fleetune.server.authority.authority import Authority
from fleetune.server.broker import free_port
from fleetune.tools.cli import build_parser
from support.brokers import Broker
from support.guarded import GuardedFleet, guarded_broker
from support.mqtt5 import Peer, wait_until

FLEETUNE = [sys.executable, "-m", "fleetune.tools.cli"]
DEVICE = """\
  - id: {}
    profile: raspberry-pi-5
    budget:
      memory: 1GiB
      cpu_seconds: 100
"""


def write_fleet(path: Path, *devices: str, name: str = "lab") -> Path:
    path.write_text(f"schema: 1\nfleet: {name}\ndevices:\n{''.join(DEVICE.format(device) for device in devices)}")
    return path


def fleetune(
    *arguments: str | Path, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [*FLEETUNE, *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **(env or {})}
    )


def done(*arguments: str | Path, **options: str) -> str:
    """What a command says that succeeds."""
    ended = fleetune(*arguments, **options)  # type: ignore[arg-type]
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def refused(ended: subprocess.CompletedProcess[str], code: int, *words: str) -> str:
    """A command leaves with a code, one line that says why, and one that says what to do; the latter."""
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    error, remedy = (re.search(rf"^{what}: (.+)$", ended.stderr, re.MULTILINE) for what in ("error", "remedy"))
    assert error and remedy, ended.stderr
    for word in words:
        assert word in error[1]
    return remedy[1]


def call(*arguments: str | Path) -> tuple[int, str]:
    """The same in this process, for what differs in its arguments alone: its exit code, and what it would print."""
    args = build_parser().parse_args([*map(str, arguments)])
    try:
        args.run(args)
    except FleetuneError as error:
        return error.exit_code, error.what
    return 0, ""


class Site:
    """An authority that was made by the command, its broker, and `fleetune fleet serve`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fleet = write_fleet(folder / "fleet.yaml", "nano-1", "nano-2")
        self.authority, self.state = folder / "authority", folder / "state"
        self.ports = free_port(), free_port()
        self.said = done(
            *("fleet", "init", "--authority", self.authority, "--fleet", self.fleet, "--host", "localhost"),
            *("--port", str(self.ports[0]), "--enrolment-port", str(self.ports[1])),
        )

    def run(self, action: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return fleetune("fleet", action, "--authority", self.authority, *arguments)

    def does(self, action: str, *arguments: str | Path) -> str:
        ended = self.run(action, *arguments)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def quick(self, action: str, *arguments: str | Path) -> str:
        """The same in this process."""
        said = io.StringIO()
        with redirect_stdout(said):
            assert call("fleet", action, "--authority", self.authority, *arguments) == (0, "")
        return said.getvalue()

    def address(self, port: int) -> BrokerAddress:
        return BrokerAddress("localhost", port, tls=True)

    @contextmanager
    def serving(self) -> Iterator[Path]:
        """The broker, and the authority on it; its log."""
        log = self.folder / f"serve-{time.monotonic_ns()}.log"
        with guarded_broker(self.authority / "broker", *map(self.address, self.ports)), log.open("wb") as file:
            process = subprocess.Popen(
                [*FLEETUNE, "fleet", "serve", "--authority", str(self.authority)], stdout=file, stderr=file
            )
            try:
                assert wait_until(lambda: "lets devices into the fleet lab" in log.read_text(), 20), log.read_text()
                yield log
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0, log.read_text()

    def token(self, device: str) -> Path:
        self.quick("enroll", device, "--out", self.folder / "tokens")
        return self.folder / "tokens" / f"{device}.token"

    def enroll(self, token: Path, state: Path | None = None) -> subprocess.CompletedProcess[str]:
        return fleetune("enroll", "--token", token, "--state", state or self.state / token.stem, "--timeout", "10")

    def peer(self, folder: Path) -> Peer:
        broker = Broker("mosquitto", self.address(self.ports[0]))
        return Peer(broker, f"peer-{time.monotonic_ns()}", context=client_context(folder))

    def secrets(self) -> list[str]:
        """All that must not be seen: keys in JSON, and lines of keys in PEM."""
        found = []
        for path in (path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".sqlite3"):
            content = path.read_text(errors="replace")
            if path.suffix == ".json":  # a credential within has a key too, which everybody may see
                document = json.loads(content)
                own = json.dumps([document.get(name) for name in ("key", "keys", "tls_key")])
                found += re.findall(r'"ed25519:([A-Za-z0-9+/]{43}=)"', own)
                content = content.replace("\\n", "\n")
            for key in re.findall(r"-----BEGIN PRIVATE KEY-----\n(.+?)-----END", content, re.DOTALL):
                found += key.split()
        return found


def state_of(site: Site) -> dict[str, str]:
    members = json.loads(site.quick("show", "--json"))["members"]
    return {member["name"]: member["state"] for member in members}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """For tests that neither revoke nor rotate."""
    return Site(tmp_path_factory.mktemp("made"))


# --- the whole way ------------------------------------------------------------------------------------------------


def test_a_device_comes_into_the_fleet_is_revoked_and_comes_back(tmp_path: Path) -> None:
    site = Site(tmp_path)
    logs = [site.said]
    with site.serving() as log:
        token = site.token("nano-1")
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        stolen = tmp_path / "stolen.token"
        stolen.write_bytes(token.read_bytes())
        came = site.enroll(token)
        assert came.returncode == 0, came.stderr
        assert "nano-1 belongs to the fleet lab" in came.stdout
        assert not token.exists()
        assert "revoke" in refused(site.enroll(stolen, tmp_path / "thief"), 24, "the token was used already")
        home = site.state / "nano-1" / "identity"
        with site.peer(home) as peer:
            peer.publish("ft/1/lab/st/nano-1")
            said = site.does("revoke", "nano-1")
            assert "nano-1: 1 credential revoked" in said
            assert "the broker on this machine refuses its connections from now on" in said
            assert "version 2 of the trust document is out" in said
            assert wait_until(lambda: denied(peer, "ft/1/lab/st/nano-1"))
        assert state_of(site)["nano-1"] == "revoked"
        assert wait_until(lambda: "version 2 of the trust document" in log.read_text())
        again = site.enroll(site.token("nano-1"))
        assert again.returncode == 0, again.stderr
        with site.peer(home) as peer:
            assert wait_until(lambda: not denied(peer, "ft/1/lab/st/nano-1"))
        assert state_of(site)["nano-1"] == "current"
        logs += [log.read_text(), came.stdout + came.stderr, again.stdout + again.stderr, said]
    secrets = site.secrets()
    assert len(secrets) > 8
    assert not [secret for secret in secrets if any(secret in log for log in logs)]


def denied(peer: Peer, topic: str) -> bool:
    mid = peer.send(topic)
    assert wait_until(lambda: mid in peer.acks)
    return peer.acks[mid].is_failure


def test_keys_are_replaced_one_after_the_other(tmp_path: Path) -> None:
    site = Site(tmp_path)
    members = site.authority / "members"
    keys = {name: read_identity(members / name).credential.key for name in ("aggregator", "authority", "publisher")}
    certificate = (site.authority / "broker" / "broker.pem").read_bytes()
    with guarded_broker(site.authority / "broker", *map(site.address, site.ports)):
        said = site.does("rotate", "aggregator")
        assert f"{members / 'aggregator'} has new keys" in said
        assert read_identity(members / "aggregator").credential.key != keys["aggregator"]
        site.does("rotate", "broker", "--offline")
        assert (site.authority / "broker" / "broker.pem").read_bytes() != certificate
        said = site.does("rotate", "authority")
        assert "the old ones count until" in said
        assert "version 2 of the trust document is out" in said
        remedy = refused(site.run("rotate", "authority", "--finish"), 23, "aggregator, publisher: what they have")
        assert "--force" in remedy
        site.does("rotate", "aggregator", "publisher", "--offline")
        assert "only the authority's new keys count" in site.does("rotate", "authority", "--finish")
        refused(site.run("rotate", "authority", "--finish"), 23, "no rotation has begun")
        with site.peer(members / "aggregator") as peer:
            peer.subscribe("ft/1/lab/ca/trust")
            assert json.loads(peer.receive(1)[0].payload)["body"]["version"] == 3


def test_an_aggregator_that_was_revoked_is_replaced(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with guarded_broker(site.authority / "broker", *map(site.address, site.ports)):
        site.does("revoke", "aggregator")
        site.does("rotate", "aggregator")
        with site.peer(site.authority / "members" / "aggregator") as peer:
            assert wait_until(lambda: not denied(peer, "ft/1/lab/agg/st"))


# --- init ---------------------------------------------------------------------------------------------------------


def test_init_says_what_comes_next_and_what_to_keep(made: Site) -> None:
    assert f"{made.authority / 'authority.json'} has the keys of the fleet lab: keep it to yourself" in made.said
    assert f"mosquitto -c {made.authority / 'broker' / 'mosquitto.conf'}" in made.said
    assert f"--broker mqtts://localhost:{made.ports[0]}" in made.said
    identity = read_identity(made.authority / "members" / "aggregator")
    assert identity.credential.sender == ("aggregator", "aggregator")


def test_a_second_authority_in_one_folder_is_refused(made: Site) -> None:
    before = (made.authority / "authority.json").read_bytes()
    again = fleetune("fleet", "init", "--authority", made.authority, "--fleet", made.fleet, "--host", "localhost")
    assert "--authority" in refused(again, 23, "holds an authority already")
    assert (made.authority / "authority.json").read_bytes() == before


def test_of_two_that_make_one_at_once_one_does(tmp_path: Path) -> None:
    fleet, authority = write_fleet(tmp_path / "fleet.yaml", "nano-1"), tmp_path / "authority"
    command = [*FLEETUNE, *map(str, ("fleet", "init", "--authority", authority, "--fleet", fleet, "--host", "b"))]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 23], errors
    assert fleetune("fleet", "show", "--authority", authority).returncode == 0


def test_a_clock_that_was_never_set_makes_no_authority(tmp_path: Path) -> None:
    fleet = write_fleet(tmp_path / "fleet.yaml", "nano-1")
    (tmp_path / "sitecustomize.py").write_text("import time; time.time = lambda: 12.0\n")
    ended = fleetune(
        *("fleet", "init", "--authority", tmp_path / "authority", "--fleet", fleet, "--host", "broker"),
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert "timedatectl" in refused(ended, 27, "shows 1970-01-01 00:00")
    assert not (tmp_path / "authority").exists()


def test_a_clock_that_was_set_back_changes_nothing(made: Site, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; real = time.time; time.time = lambda: real() - 86400\n")
    ended = fleetune("fleet", "show", "--authority", made.authority, env={"PYTHONPATH": str(tmp_path)})
    refused(ended, 27, "has passed for sure")


def test_two_devices_of_one_id_are_refused(tmp_path: Path) -> None:
    fleet = write_fleet(tmp_path / "fleet.yaml", "nano-1", "nano-1")
    ended = fleetune("fleet", "init", "--authority", tmp_path / "authority", "--fleet", fleet, "--host", "broker")
    refused(ended, 28, "'nano-1' is there twice", "fleet.yaml")


@pytest.mark.parametrize(("arguments", "words"), [
    (("--days", "0"), "--days"),
    (("--days", "4000"), "--days"),
    (("--days", "nan"), "--days"),
    (("--port", "0"), "--port"),
    (("--enrolment-port", "70000"), "--enrolment-port"),
    (("--port", "8884"), "port: 8884"),
    (("--host", "a b"), "host: 'a b'"),
])  # fmt: skip
def test_what_no_broker_could_use_is_refused(
    made: Site, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    authority = tmp_path / "authority"
    code, what = call(
        *("fleet", "init", "--authority", authority, "--fleet", made.fleet, "--host", "broker", *arguments)
    )
    assert code == 10
    assert words in what
    assert not authority.exists()


# --- tokens -------------------------------------------------------------------------------------------------------


def test_a_token_is_one_word_on_standard_output(made: Site) -> None:
    """So that a script can take it."""
    token = Token.parse(made.does("enroll", "nano-1", "--hours", "2"))
    assert (token.fleet, token.device) == ("lab", "nano-1")
    assert token.broker == f"mqtts://localhost:{made.ports[1]}"
    assert abs(token.expires - time.time() - 7200) < 60


def test_tokens_of_a_whole_fleet_come_in_files_of_their_owner(made: Site, tmp_path: Path) -> None:
    assert "2 tokens are in" in made.quick("enroll", "--fleet", made.fleet, "--out", tmp_path / "tokens")
    files = sorted((tmp_path / "tokens").iterdir())
    assert [path.name for path in files] == ["nano-1.token", "nano-2.token"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600, 0o600]
    assert [Token.parse(path.read_text()).device for path in files] == ["nano-1", "nano-2"]


def test_tokens_of_another_fleet_than_the_files_are_not_made(made: Site, tmp_path: Path) -> None:
    before = made.quick("show", "--json")
    other = write_fleet(tmp_path / "other.yaml", "nano-1", name="greenhouse")
    code, what = call("fleet", "enroll", "--authority", made.authority, "--fleet", other)
    assert code == 10
    assert "is of the fleet greenhouse" in what
    assert "of lab" in what
    assert made.quick("show", "--json") == before


def test_tokens_come_as_json(made: Site) -> None:
    rows = json.loads(made.quick("enroll", "nano-1", "nano-2", "--json"))
    assert [row["device"] for row in rows] == [Token.parse(row["token"]).device for row in rows] == ["nano-1", "nano-2"]


def test_a_device_that_comes_back_is_told_of_where_the_broker_does_not_run_here(tmp_path: Path) -> None:
    """The token alone is on standard output."""
    site = Site(tmp_path)
    site.quick("revoke", "publisher", "--offline")
    enroll_offline(site, "nano-1")
    said = site.does("revoke", "nano-1", "--offline")
    assert f"copy {site.authority}/broker/acl" in said
    ended = site.run("enroll", "nano-1")
    assert Token.parse(ended.stdout).device == "nano-1"
    assert "copy" in ended.stderr
    assert "topic deny #\n\nuser nano-1" not in (site.authority / "broker" / "acl").read_text()
    assert "user nano-1" not in (site.authority / "broker" / "acl").read_text()
    assert "user publisher\ntopic deny #" in (site.authority / "broker" / "acl").read_text()


def enroll_offline(site: Site, device: str) -> None:
    with closing(Authority(site.authority)) as authority:
        authority.issue("device", device, SeedSigner.generate().public, None)


@pytest.mark.parametrize(("arguments", "words"), [
    ((), "no device is named"),
    (("aggregator",), "'aggregator' is reserved"),
    (("a/b",), "'a/b'"),
    (("nano-1", "--hours", "0"), "--hours"),
    (("nano-1", "--hours", "nan"), "--hours"),
    (("nano-9", "--fleet", "FLEET"), "nano-9"),
])  # fmt: skip
def test_a_token_that_nobody_could_use_is_not_made(made: Site, arguments: tuple[str, ...], words: str) -> None:
    before = made.quick("show", "--json")
    given = [made.fleet if argument == "FLEET" else argument for argument in arguments]
    code, what = call("fleet", "enroll", "--authority", made.authority, *given)
    assert code == 10
    assert words in what
    assert made.quick("show", "--json") == before


# --- enroll -------------------------------------------------------------------------------------------------------


def test_a_token_comes_over_standard_input(made: Site, tmp_path: Path) -> None:
    """And one that is garbled is refused before anything is made."""
    ended = fleetune("enroll", "--token", "-", "--state", tmp_path / "state", stdin="fleetune1.garbled")
    assert "copy all of it" in refused(ended, 24, "the token cannot be read")
    assert not (tmp_path / "state").exists()
    word = made.quick("enroll", "nano-2")
    ended = fleetune("enroll", "--token", "-", "--state", tmp_path / "state", stdin=word)
    refused(ended, 15, "no broker answers")
    assert word.strip() not in ended.stderr


def test_a_token_that_is_not_there(tmp_path: Path) -> None:
    ended = fleetune("enroll", "--token", tmp_path / "x", "--state", tmp_path)
    assert "`fleetune fleet enroll` makes another" in refused(ended, 24, f"{tmp_path / 'x'} is not there")


def test_a_token_stays_until_it_was_used(made: Site, tmp_path: Path) -> None:
    token = made.token("nano-1")
    refused(made.enroll(token, tmp_path / "state"), 15, "no broker answers")
    assert token.exists()


# --- sign, verify -------------------------------------------------------------------------------------------------


def test_a_pack_that_is_signed_is_taken_and_no_other(made: Site, tiny_bert_pack: Pack, tmp_path: Path) -> None:
    pack, publisher = tmp_path / "pack", made.authority / "members" / "publisher"
    shutil.copytree(tiny_bert_pack.path, pack)
    verify = ("verify", pack, "--identity", publisher)
    agent = (
        *("agent", "--fleet", made.fleet, "--id", "nano-1", "--broker", "mqtts://127.0.0.1:1"),
        *("--pack", pack, "--data", pack, "--state", made.state / "nano-1"),
    )
    with made.serving():
        assert made.enroll(made.token("nano-1")).returncode == 0
    for command in (verify, agent):
        refused(fleetune(*command), 29, "is not signed")
    assert str(pack) in made.quick("sign", pack)
    assert "signed by the publisher of the fleet lab" in done(*verify)
    assert fleetune(*agent).returncode not in (0, 29)  # it goes on to what else is wrong
    weights = max(pack.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    refused(fleetune(*verify), 13, weights.name)
    manifest = pack / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    for command in (verify, agent):
        refused(fleetune(*command), 29, "manifest.json is not what was signed")


# --- show, revoke, rotate -----------------------------------------------------------------------------------------


def test_show_names_everybody_and_no_secret(made: Site) -> None:
    token = Token.parse(made.quick("enroll", "nano-2"))
    said, document = made.quick("show"), made.quick("show", "--json")
    assert {row["name"] for row in json.loads(document)["members"]} >= {"aggregator", "authority", "broker"}
    row = next(row for row in json.loads(document)["tokens"] if row["device"] == "nano-2")
    assert (row["state"], row["id"]) == ("waits", token.id)
    assert token.id in said
    shown = said + document
    assert token.secret.hex() not in shown
    assert token.text.strip()[10:40] not in shown
    assert not [secret for secret in made.secrets() if secret in shown]


@pytest.mark.parametrize(("action", "arguments", "words"), [
    ("revoke", ("nobody",), "nobody: never had a credential"),
    ("revoke", ("aggregator", "nobody"), "nobody: never had a credential"),
    ("revoke", ("broker",), "broker: devices do not ask"),
    ("rotate", ("nobody",), "nobody: is not a member"),
    ("rotate", ("aggregator", "nobody"), "nobody: is not a member"),
])  # fmt: skip
def test_who_is_no_member_stops_a_command_before_it_changes_anything(
    made: Site, action: str, arguments: tuple[str, ...], words: str
) -> None:
    before = {path: path.read_bytes() for path in made.authority.rglob("*.json")}
    code, what = call("fleet", action, "--authority", made.authority, *arguments)
    assert code == 10
    assert words in what
    assert {path: path.read_bytes() for path in made.authority.rglob("*.json")} == before


def test_no_broker_is_said_after_the_revocation_is_kept(tmp_path: Path) -> None:
    site = Site(tmp_path)
    refused(site.run("revoke", "aggregator"), 15, "no broker answers")
    assert state_of(site)["aggregator"] == "revoked"


@pytest.mark.parametrize("action", ["show", "enroll", "serve", "revoke", "rotate"])
def test_no_authority_is_said_by_every_command(tmp_path: Path, action: str) -> None:
    names = () if action in ("show", "serve") else ("nano-1",)
    code, what = call("fleet", action, "--authority", tmp_path, *names)
    assert code == 23
    assert f"{tmp_path} holds no authority" in what
    assert list(tmp_path.iterdir()) == []


def test_keys_that_others_may_read_are_refused(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for file in ("authority.json", "ledger.sqlite3"):
        (site.authority / file).chmod(0o644)
        assert "chmod 600" in refused(site.run("show"), 25, f"{file} holds a private key")
        (site.authority / file).chmod(0o600)


def test_an_authority_without_a_broker_does_not_wait_for_one(made: Site) -> None:
    refused(made.run("serve"), 15, "no broker answers")


# --- who a machine is ---------------------------------------------------------------------------------------------


def agent(lab: GuardedFleet, tmp_path: Path, *arguments: str | Path, fleet: str = "lab") -> tuple[int, str]:
    """`fleetune agent` for nano-1, up to where it would begin."""
    file = write_fleet(tmp_path / "fleet.yaml", "nano-1", "nano-2", name=fleet)
    return call(
        *("agent", "--unit", "--fleet", file, "--id", "nano-1", "--pack", tmp_path, "--data", tmp_path / "d"),
        *("--state", tmp_path / "state", *arguments),
    )


TLS = "mqtts://broker.example:8883"
OPEN = "mqtt://broker.example"


def test_a_device_is_who_it_says(lab: GuardedFleet, tmp_path: Path) -> None:
    assert agent(lab, tmp_path, "--broker", TLS, "--identity", lab.home("nano-1")) == (0, "")


def test_it_finds_its_identity_below_its_state(
    lab: GuardedFleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agent(lab, tmp_path, "--broker", TLS)[0] == 10
    lab.copy("nano-1", tmp_path / "state" / "identity")
    assert agent(lab, tmp_path, "--broker", TLS) == (0, "")


@pytest.mark.parametrize(("whose", "words"), [
    ("nano-2", "is device nano-2 of the fleet lab, not device nano-1 of lab"),
    ("aggregator", "is aggregator aggregator of the fleet lab, not device nano-1 of lab"),
])  # fmt: skip
def test_somebody_elses_identity_is_refused(lab: GuardedFleet, tmp_path: Path, whose: str, words: str) -> None:
    code, what = agent(lab, tmp_path, "--broker", TLS, "--identity", lab.home(whose))
    assert code == 26
    assert words in what


def test_an_identity_of_another_fleet_is_refused(lab: GuardedFleet, tmp_path: Path) -> None:
    code, what = agent(lab, tmp_path, "--broker", TLS, "--identity", lab.home("nano-1"), fleet="plant")
    assert code == 26
    assert "not device nano-1 of plant" in what


def test_a_device_does_not_lead_a_fleet(lab: GuardedFleet, tmp_path: Path) -> None:
    file = write_fleet(tmp_path / "fleet.yaml", "nano-1")
    code, what = call(
        *("serve", "--fleet", file, "--pack", tmp_path, "--state", tmp_path / "state", "--classes", "2"),
        *("--broker", TLS, "--identity", lab.home("nano-1")),
    )
    assert code == 26
    assert "not aggregator aggregator of lab" in what


@pytest.mark.parametrize(("spoil", "code"), [
    (lambda folder: (folder / FILE).unlink(), 26),
    (lambda folder: (folder / FILE).write_text("{"), 26),
    (lambda folder: (folder / FILE).chmod(0o644), 25),
    (lambda folder: (folder / "tls.pem").chmod(0o640), 25),
])  # fmt: skip
def test_an_identity_that_does_not_count_is_refused(
    lab: GuardedFleet, tmp_path: Path, spoil: Callable[[Path], object], code: int
) -> None:
    lab.copy("nano-1", tmp_path / "identity")
    spoil(tmp_path / "identity")
    assert agent(lab, tmp_path, "--broker", TLS, "--identity", tmp_path / "identity")[0] == code


@pytest.mark.parametrize(("broker", "known", "words"), [
    (OPEN, False, "this command names no identity"),
    (OPEN, True, "this command is without TLS"),
    (TLS, False, "this command names no identity"),
    ("mqtt://127.0.0.1.example", False, "this command names no identity"),
    ("mqtt://localhost.example", False, "this command names no identity"),
])  # fmt: skip
def test_a_broker_on_another_machine_is_not_talked_to_in_the_open(
    lab: GuardedFleet, tmp_path: Path, broker: str, known: bool, words: str
) -> None:
    identity = ("--identity", lab.home("nano-1")) if known else ()
    code, what = agent(lab, tmp_path, "--broker", broker, *identity)
    assert code == 10
    assert "is on another machine" in what
    assert words in what
    assert agent(lab, tmp_path, "--broker", broker, *identity, "--insecure") == (0, "")


@pytest.mark.parametrize("broker", ["mqtt://127.0.0.1:1883", "mqtt://localhost", "mqtt://[::1]:1883"])
def test_a_broker_on_this_machine_is(lab: GuardedFleet, tmp_path: Path, broker: str) -> None:
    assert agent(lab, tmp_path, "--broker", broker) == (0, "")
