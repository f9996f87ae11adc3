"""``fleetune release`` and ``fleetune update``, from a build to a board."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.identity.signature import sign_file
from fleetune.server.authority.authority import Authority, Site
from fleetune.tools.firstboot.seed import read_seed
from fleetune.tools.flash.build import build
from fleetune.tools.flash.tier import TIERS
from fleetune.tools.release.repository import TARGETS
from fleetune.tools.trees import extract, tree_digest

pytestmark = pytest.mark.slow

CLI = [sys.executable, "-m", "fleetune.tools.cli"]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images")
    build(TIERS["t4"], out, say=lambda _: None)
    (record,) = out.glob("*.build.json")
    return record


def release(folder: Path, *arguments: str | Path, code: int = 0) -> str:
    action, *rest = arguments
    command = [*CLI, "release", action, *rest, "--out", folder / "releases"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_release_goes_from_a_build_to_canaries_to_all_and_back(
    record: Path, tiny_bert_pack: Pack, tmp_path: Path
) -> None:
    release(tmp_path, "init", "--url", "https://updates.example.org/lab/")
    assert "nothing is published yet" in release(tmp_path, "show")
    pack = tmp_path / "minilm"
    shutil.copytree(tiny_bert_pack.path, pack)
    assert "is not signed" in release(tmp_path, "publish", record, "--pack", pack, code=29)
    with closing(Authority.make(tmp_path / "authority", "lab", Site(("localhost",)))) as authority:
        sign_file(pack, authority.make_member("publisher", tmp_path / "publisher"), authority.now())
    said = release(tmp_path, "publish", record, "--pack", pack, "--canary", "nano-1")
    assert said.startswith("release 1: 0% of the fleet, and nano-1 before them\n")
    shown = json.loads(release(tmp_path, "show", "--json"))
    assert shown["url"] == "https://updates.example.org/lab"
    (kit,) = shown["rollout"]["kits"].values()
    assert shown["rollout"]["packs"]["minilm"]["target"].startswith("pack-minilm-")
    (archive,) = (tmp_path / "releases" / TARGETS).glob(f"*.{kit['target']}")
    tree = tmp_path / "tree"
    tree.mkdir()
    extract(archive, tree)
    assert tree_digest(tree) == kit["digest"]
    assert kit["digest"].startswith(json.loads(record.read_text())["kit"])
    assert (tree / "bin/fleetune").is_file()
    assert release(tmp_path, "advance", "--share", "0.25").startswith("release 1: 25% of the fleet")
    release(tmp_path, "publish", "--pack", pack, "--share", "1")
    assert json.loads(release(tmp_path, "show", "--json"))["rollout"]["kits"] == shown["rollout"]["kits"]
    assert release(tmp_path, "withdraw").startswith("release 3: 100% of the fleet")
    before = json.loads(release(tmp_path, "show", "--json"))["fresh_until"]
    assert before <= release(tmp_path, "renew").split()[-1]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["publish"], "there is nothing to publish"),
        (["advance", "--share", "0.5"], "nothing is published yet"),
        (["advance", "--share", "2"], "out of range"),
        (["withdraw"], "no release before"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, arguments: list[str], why: str) -> None:
    release(tmp_path, "init", "--url", "http://127.0.0.1:8000")
    assert why in release(tmp_path, *arguments, code=10)


def test_an_address_that_is_none_makes_no_repository(tmp_path: Path) -> None:
    assert "no address of a web server" in release(tmp_path, "init", "--url", "updates.example.org", code=10)
    assert not (tmp_path / "releases").exists()


def test_a_seed_says_where_releases_are_and_whom_to_believe(tmp_path: Path) -> None:
    release(tmp_path, "init", "--url", "https://updates.example.org/lab")
    Authority.make(tmp_path / "authority", "lab", Site(("broker.local",))).close()
    (tmp_path / "fleet.yaml").write_text(
        "schema: 1\nfleet: lab\ndevices:\n  - {id: nano-1, profile: jetson-nano-2gb, budget: {memory: 160MiB}}\n"
    )
    command = [*CLI, "flash", "seed", "--inventory", "fleet.yaml", "--pack", "minilm", "--form", "folder"]
    done = subprocess.run([*command, "--releases", "releases"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seed = read_seed((tmp_path / "seeds/nano-1/seed.json").read_bytes(), "seed.json")
    assert (seed.releases, seed.pack) == ("https://updates.example.org/lab", "/var/lib/fleetune-kits/packs/minilm")
    root = (tmp_path / "seeds/nano-1/releases.root.json").read_bytes()
    assert root == (tmp_path / "releases/public/metadata/1.root.json").read_bytes()
    done = subprocess.run([*CLI, "update", "--show", "--root", tmp_path], capture_output=True, text=True)
    assert json.loads(done.stdout)["good"] == 0
    done = subprocess.run([*CLI, "update", "--root", tmp_path], capture_output=True, text=True)
    assert done.returncode != 0
