"""Seeds: one for each board, each a secret, and the same command again changes nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import ConfigError, DuplicateDeviceError, RunFolderError
from fleetune.edge.protocol.files import FolderLock
from fleetune.edge.protocol.identity.enrolment import Token
from fleetune.profiles.fleet import read_fleet
from fleetune.server.authority.authority import Authority, Site
from fleetune.tools.firstboot.seed import read_seed
from fleetune.tools.flash.seed import Order, Seeded, make_seeds

PACK, DATA = "/var/lib/fleetune-kits/packs/minilm", "/var/lib/fleetune/samples.jsonl"

_DEVICE = """\
  - {{id: nano-{0}, serial: "14{0:04}", profile: {1}, budget: {{memory: 160MiB, cpu_seconds: 5.5, disk: 1.5GiB}}}}
"""


def inventory(folder: Path, count: int = 2, profile: str = "jetson-nano-2gb") -> Path:
    file = folder / "fleet.yaml"
    file.write_text("schema: 1\nfleet: lab\ndevices:\n" + "".join(_DEVICE.format(n, profile) for n in range(count)))
    return file


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "authority", "lab", Site(("broker.local",)))


def seeds(file: Path, authority: Authority, out: Path, **changes: object) -> list[Seeded]:
    fleet, done = read_fleet(file), list[Seeded]()
    order = Order(**({"fleet": fleet, "pack": PACK, "data": DATA, "hours": 24.0, "form": "folder"} | changes))  # type: ignore[arg-type]
    make_seeds(order, fleet.devices, authority, out, done.append)
    return done


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in ("lock", ".lock")]
    return {str(file): (file.stat().st_mtime_ns, file.stat().st_mode, file.read_bytes()) for file in files}


def test_a_seed_says_who_a_board_is(authority: Authority, tmp_path: Path) -> None:
    first, second = seeds(inventory(tmp_path), authority, tmp_path / "seeds")
    seed = read_seed((first.path / "seed.json").read_bytes(), "seed.json")
    assert (seed.fleet, seed.device, seed.serial) == ("lab", "nano-0", "140000")
    assert (seed.broker, seed.pack, seed.data) == ("mqtts://broker.local:8883", PACK, DATA)
    token = Token.parse((first.path / "token").read_text())
    assert (token.fleet, token.device, token.broker) == ("lab", "nano-0", "mqtts://broker.local:8884")
    assert second.device == "nano-1"
    assert token.text not in (second.path / "token").read_text()


@pytest.mark.parametrize("name", ["mine", "fleet"])
def test_a_device_gets_its_own_entry_of_the_fleet_file_and_no_other(
    authority: Authority, tmp_path: Path, name: str
) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        f"schema: 1\nname: {name}\nboard: A board\ntier: t4\nmemory: 3GiB\nsources: {{memory: its label}}\n"
    )
    file = inventory(tmp_path, profile="mine.yaml")
    first, _ = seeds(file, authority, tmp_path / "seeds")
    own = read_fleet(first.path / "fleet.yaml")
    assert own.name == "lab"
    assert own.devices == (read_fleet(file).devices[0],)
    assert "nano-1" not in (first.path / "fleet.yaml").read_text()


@pytest.mark.parametrize("form", ["folder", "image", "rootfs"])
def test_the_same_command_again_changes_nothing(authority: Authority, tmp_path: Path, form: str) -> None:
    file, out = inventory(tmp_path), tmp_path / "seeds"
    assert [one.state for one in seeds(file, authority, out, form=form)] == ["new", "new"]
    before, tokens = state(out), authority.ledger.tokens()
    time.sleep(0.05)
    assert [one.state for one in seeds(file, authority, out, form=form)] == ["kept", "kept"]
    assert state(out) == before
    assert authority.ledger.tokens() == tokens


def test_only_its_owner_may_read_a_seed(authority: Authority, tmp_path: Path) -> None:
    for form in ("folder", "image", "rootfs"):
        seeds(inventory(tmp_path), authority, tmp_path / "seeds", form=form)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "seeds").rglob("*") if path.name != ".lock"}
    assert modes <= {0o600, 0o700, 0o644, 0o755}
    assert (tmp_path / "seeds").stat().st_mode & 0o777 == 0o700
    assert all(mode & 0o077 == 0 for _, mode, _ in state(tmp_path / "seeds").values())


def test_an_image_holds_the_same_files(authority: Authority, tmp_path: Path) -> None:
    first, _ = seeds(inventory(tmp_path), authority, tmp_path / "seeds", form="image")
    assert first.path.name == "nano-0.img"
    assert first.path.stat().st_size == 1 << 20
    label = subprocess.run([shutil.which("mlabel") or "", "-s", "-i", first.path, "::"], capture_output=True, text=True)
    assert "FLEETSEED" in label.stdout
    for name in ("seed.json", "token", "fleet.yaml"):
        content = subprocess.run(
            [shutil.which("mtype") or "", "-i", first.path, f"::{name}"], capture_output=True
        ).stdout
        assert content == (tmp_path / "seeds/nano-0" / name).read_bytes(), name


def test_a_rootfs_goes_by_the_boards_serial_number(authority: Authority, tmp_path: Path) -> None:
    first, _ = seeds(inventory(tmp_path), authority, tmp_path / "seeds", form="rootfs")
    assert first.path.name == "140000.rootfs"
    assert (first.path / "var/lib/fleetune/seed/seed.json").is_file()


def test_a_token_that_was_used_stays_and_one_that_ended_is_replaced(authority: Authority, tmp_path: Path) -> None:
    file, out = inventory(tmp_path), tmp_path / "seeds"
    first, second = seeds(file, authority, out, hours=1 / 60)
    used = Token.parse((first.path / "token").read_text())
    authority.ledger.use_token(used.id, "key", time.time())
    assert [one.state for one in seeds(file, authority, out)] == ["used", "new"]
    assert Token.parse((first.path / "token").read_text()).id == used.id
    assert Token.parse((second.path / "token").read_text()).expires > time.time() + 3600
    assert [one.state for one in seeds(file, authority, out, renew=True)] == ["new", "new"]


def test_a_seed_elsewhere_that_counts_no_more_is_told(authority: Authority, tmp_path: Path) -> None:
    file = inventory(tmp_path)
    assert [one.ended for one in seeds(file, authority, tmp_path / "one")] == [False, False]
    assert [one.ended for one in seeds(file, authority, tmp_path / "two")] == [True, True]
    assert [(one.state, one.ended) for one in seeds(file, authority, tmp_path / "two")] == [("kept", False)] * 2


def test_a_token_that_another_took_the_place_of_is_replaced(authority: Authority, tmp_path: Path) -> None:
    file, out = inventory(tmp_path), tmp_path / "seeds"
    seeds(file, authority, out)
    authority.make_token("nano-1", 1.0)
    assert [one.state for one in seeds(file, authority, out)] == ["kept", "new"]


def test_a_change_of_the_inventory_reaches_the_seed_and_leaves_the_token(authority: Authority, tmp_path: Path) -> None:
    out = tmp_path / "seeds"
    seeds(inventory(tmp_path), authority, out)
    token = (out / "nano-0/token").read_bytes()
    file = inventory(tmp_path, profile="jetson-nano-4gb")
    assert [one.state for one in seeds(file, authority, out)] == ["kept", "kept"]
    assert read_fleet(out / "nano-0/fleet.yaml").devices[0].profile.name == "jetson-nano-4gb"
    assert (out / "nano-0/token").read_bytes() == token


def test_two_boards_of_one_serial_number_are_refused(tmp_path: Path) -> None:
    file = inventory(tmp_path)
    file.write_text(file.read_text().replace("140001", "140000"))
    with pytest.raises(DuplicateDeviceError, match=r"line 5: field devices\[1\].serial.*140000.*nano-0.*nano-1"):
        read_fleet(file)


def test_a_device_without_a_profile_is_refused(tmp_path: Path) -> None:
    file = inventory(tmp_path)
    file.write_text(re.sub(r"profile: \S+, ", "", file.read_text(), count=1))
    with pytest.raises(ConfigError, match=r"line 4: field devices\[0\].*`profile`"):
        read_fleet(file)


def test_an_authority_of_another_fleet_is_refused(tmp_path: Path) -> None:
    with closing(Authority.make(tmp_path / "authority", "plant", Site(("broker.local",)))) as other:
        with pytest.raises(ConfigError, match="of the fleet lab, the authority of plant"):
            seeds(inventory(tmp_path), other, tmp_path / "seeds")
        assert not other.ledger.tokens()


def test_a_root_that_ends_before_the_tokens_is_refused(tmp_path: Path) -> None:
    Authority.make(tmp_path / "authority", "lab", Site(("broker.local",))).close()
    later = 19.99 * 365.25 * 86400
    with (
        closing(Authority(tmp_path / "authority", clock=lambda: time.time() + later)) as old,
        pytest.raises(ConfigError, match="root certificate"),
    ):
        seeds(inventory(tmp_path), old, tmp_path / "seeds", hours=24 * 365.0)


def test_two_at_once_are_refused(authority: Authority, tmp_path: Path) -> None:
    with closing(FolderLock(tmp_path / "seeds")), pytest.raises(RunFolderError, match="in use"):
        seeds(inventory(tmp_path), authority, tmp_path / "seeds")


def test_the_command_prints_what_it_did_and_no_secret(authority: Authority, tmp_path: Path) -> None:
    authority.close()
    command = [sys.executable, "-m", "fleetune.tools.cli", "flash", "seed", "--inventory", inventory(tmp_path)]
    command += ["--authority", tmp_path / "authority", "--pack", "minilm", "--out", tmp_path / "seeds", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["device"], row["state"]) for row in rows] == [("nano-0", "new"), ("nano-1", "new")]
    assert read_seed((tmp_path / "seeds/nano-0/seed.json").read_bytes(), "seed.json").pack == PACK
    for row in rows:
        assert (tmp_path / "seeds" / row["device"] / "token").read_text().strip() not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{", "seed.json: "),
        (b'{"schema": 2, "fleet": "lab"}', "field schema"),
        (b'{"schema": 1, "fleet": "lab", "device": "a/b", "broker": "", "pack": "/p", "data": "/d"}', "field device"),
        (b'{"schema": 1, "fleet": "lab", "device": "a", "broker": "", "pack": "p", "data": "/d"}', "field pack"),
    ],
)
def test_a_damaged_seed_is_refused_with_its_field(text: bytes, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        read_seed(text, "seed.json")
