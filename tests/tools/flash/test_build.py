"""What is flashed: the same bytes from the same content, and nothing of this machine in it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import AssetError, ConfigError
from fleetune.tools.flash.build import build
from fleetune.tools.flash.content import Content, lay_out
from fleetune.tools.flash.deb import write_deb
from fleetune.tools.flash.lockfile import Pin, locked, read_lock
from fleetune.tools.flash.record import ENDING, Build, check_record, write_record
from fleetune.tools.flash.sbom import bill_of_materials
from fleetune.tools.flash.tier import TIERS, Tier, find_tier
from fleetune.tools.flash.wheelhouse import Wheel, fetch_wheels
from fleetune.tools.hil.releases import build_like
from fleetune.tools.trees import EPOCH, extract, tree_digest, write_tar_gz
from support.wheels import ROOT

pytestmark = pytest.mark.slow

T1, T4 = TIERS["t1"], TIERS["t4"]
DPKG = shutil.which("dpkg-deb") or "dpkg-deb is not there"
_AARCH64 = (183).to_bytes(2, "little")
SMALL = ("paho-mqtt", "psutil")
"""Wheels that are laid out quickly, one of them compiled."""


@pytest.fixture(scope="module")
def wheels() -> list[Wheel]:
    return [wheel for wheel in fetch_wheels(T4, locked(T4)) if wheel.name in SMALL]


@pytest.fixture(scope="module")
def content(wheels: list[Wheel], tmp_path_factory: pytest.TempPathFactory) -> Content:
    return lay_out(tmp_path_factory.mktemp("content"), T4, wheels)


def package(content: Content, folder: Path) -> Path:
    folder.mkdir()
    file = folder / "fleetune.deb"
    write_deb(content, bill_of_materials(content), "A <a@example.org>", folder, file)
    return file


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def strict_umask() -> Iterator[None]:
    old = os.umask(0o077)
    yield
    os.umask(old)


def test_the_same_content_gives_the_same_bytes(
    content: Content, wheels: list[Wheel], tmp_path: Path, strict_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    other = tmp_path / "elsewhere" / "a longer path"
    other.mkdir(parents=True)
    again = lay_out(other, T4, reversed(wheels))
    assert again.kit == content.kit
    files = []
    for name, tree in (("a", content), ("b", again)):
        files.append(package(tree, tmp_path / name))
        write_tar_gz(tree.root, tmp_path / f"{name}.tar.gz")
    assert digest(files[0]) == digest(files[1])
    assert digest(tmp_path / "a.tar.gz") == digest(tmp_path / "b.tar.gz")


def test_other_content_is_another_kit(content: Content, wheels: list[Wheel], tmp_path: Path) -> None:
    """Else Python would take the bytecode that it kept of the one for the other: size and time are the same."""
    assert lay_out(tmp_path, T4, wheels[:1]).kit != content.kit
    file = content.root / "usr/bin/fleetune"
    before = tree_digest(content.root)
    file.chmod(0o644)
    assert tree_digest(content.root) != before
    file.chmod(0o755)
    assert tree_digest(content.root) == before


def test_nothing_in_it_is_of_this_machine_or_of_its_time(content: Content) -> None:
    here = {sys.prefix.encode(), str(content.root).encode(), str(ROOT).encode()}
    for path in content.files():
        assert path.lstat().st_mtime == EPOCH, path
        if not path.is_symlink() and path.suffix != ".so":
            data = path.read_bytes()
            assert not any(name in data for name in here), path
    assert not list(content.root.rglob("__pycache__"))


def test_the_manifest_names_every_file_by_its_hash(content: Content) -> None:
    document = json.loads((content.root / "usr/share/fleetune/manifest.json").read_text(encoding="utf-8"))
    assert document["tier"] == "t4"
    there = {path.relative_to(content.root).as_posix() for path in content.files() if not path.is_symlink()}
    assert document["files"].keys() == there - {"usr/share/fleetune/manifest.json"}
    assert all(digest(content.root / name) == sha256 for name, sha256 in document["files"].items())


def test_an_overlay_belongs_to_root_by_number(content: Content, tmp_path: Path) -> None:
    write_tar_gz(content.root, tmp_path / "overlay.tar.gz")
    with gzip.open(tmp_path / "overlay.tar.gz") as stream, tarfile.open(fileobj=stream) as archive:
        entries = {entry.name: entry for entry in archive}
    assert {(entry.uid, entry.gid, entry.uname, entry.gname) for entry in entries.values()} == {(0, 0, "", "")}
    assert {entry.mtime for entry in entries.values()} == {EPOCH}
    assert entries["usr/bin/fleetune"].mode == 0o755
    assert entries["usr/lib/fleetune/current"].linkname == content.kit
    wanted = "usr/lib/systemd/system/multi-user.target.wants/fleetune-firstboot.service"
    assert entries[wanted].linkname == "../fleetune-firstboot.service"
    assert not any(entry.mode & 0o6022 for entry in entries.values() if not entry.issym())


@pytest.mark.parametrize("updated", [False, True])
def test_a_kit_is_started_by_the_name_of_its_content(content: Content, tmp_path: Path, updated: bool) -> None:
    """Python keeps bytecode by path: of one kit it would take that of another for its own."""
    launcher = (content.root / "usr/bin/fleetune").read_text(encoding="utf-8")
    image, update = tmp_path / "image", tmp_path / "update"
    for kits, name in ((image, "abc"), *([(update, "def")] if updated else [])):
        program = kits / name / "bin/python3"
        program.parent.mkdir(parents=True)
        program.write_text('#!/bin/sh\necho "$0" "$1" "$2"\n', encoding="utf-8")
        program.chmod(0o755)
        (kits / "current").symlink_to(name)
    script = launcher.replace("/var/lib/fleetune-kits", str(update)).replace("/usr/lib/fleetune", str(image))
    said = subprocess.run(["/bin/sh", "-c", script, "fleetune", "doctor"], capture_output=True, text=True, check=True)
    kit = update / "def" if updated else image / "abc"
    assert said.stdout.split() == [f"{kit}/bin/python3", f"{kit}/bin/fleetune", "doctor"]


def test_the_package_is_what_dpkg_takes(content: Content, tmp_path: Path) -> None:
    file = package(content, tmp_path / "made")
    fields = subprocess.run([DPKG, "--field", file], capture_output=True, text=True, check=True).stdout
    assert "Architecture: arm64\n" in fields
    assert "Depends: python3.11," in fields
    subprocess.run([DPKG, "--extract", file, tmp_path / "root"], check=True)
    for name in ("usr/lib/fleetune/current/lib/python3.11/site-packages/fleetune/tools/cli.py", "usr/bin/fleetune"):
        assert (tmp_path / "root" / name).is_file()
    link = tmp_path / "root/usr/lib/fleetune/current/bin/python3"
    assert str(link.readlink()) == "/usr/bin/python3.11"


def test_lintian_has_nothing_to_say(content: Content, tmp_path: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("needs lintian: apt-get install lintian")
    file = package(content, tmp_path / "made")
    command = ["lintian", "--tag-display-limit", "0", "--fail-on", "error,warning", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_bill_of_materials_names_wheels_hashes_and_licences(content: Content) -> None:
    document = json.loads(bill_of_materials(content))
    assert bill_of_materials(content) == bill_of_materials(content)
    assert document["specVersion"] == "1.6"
    parts = {part["name"]: part for part in document["components"]}
    assert parts.keys() == set(SMALL)
    for wheel in content.wheels:
        assert parts[wheel.name]["hashes"] == [{"alg": "SHA-256", "content": wheel.sha256}]
    assert parts["psutil"]["licenses"][0]["license"]["id"] == "BSD-3-Clause"


@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
def test_every_tier_has_a_licence_for_each_wheel_and_code_for_its_boards_alone(tier: Tier, tmp_path: Path) -> None:
    wheels = fetch_wheels(tier, locked(tier))
    assert {"numpy", "onnxruntime", "msgspec", "paho-mqtt"} <= {wheel.name for wheel in wheels}
    content = Content(tmp_path, tier, "0", "0", tuple(wheels), ())
    assert len(json.loads(bill_of_materials(content))["components"]) == len(wheels)
    for wheel in wheels:
        with zipfile.ZipFile(wheel.file) as archive:
            for entry in archive.infolist():
                head = archive.open(entry).read(20)
                assert not head.startswith(b"\x7fELF") or head[18:20] == _AARCH64, (
                    f"{wheel.file.name}: {entry.filename}"
                )


def test_a_wheel_that_was_altered_is_refused(tmp_path: Path) -> None:
    pins = {name: pin for name, pin in locked(T4).items() if name == "paho-mqtt"}
    (wheel,) = fetch_wheels(T4, pins, cache=tmp_path)
    with wheel.file.open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(AssetError, match="is not what was pinned"):
        fetch_wheels(T4, pins, cache=tmp_path)
    wheel.file.unlink()
    with pytest.raises(AssetError, match="lacks paho-mqtt"):
        fetch_wheels(T4, pins, cache=tmp_path)


def test_a_file_that_the_lock_does_not_know_is_not_downloaded(tmp_path: Path) -> None:
    pin = Pin("paho-mqtt", locked(T4)["paho-mqtt"].version, frozenset({"0" * 64}))
    with pytest.raises(AssetError, match=r"(?i)hash"):
        fetch_wheels(T4, {"paho-mqtt": pin}, cache=tmp_path)
    assert not list((tmp_path / "wheelhouse").glob("*/*.whl"))


def test_a_wheel_of_ones_own_takes_the_place_of_the_pinned_one(wheels: list[Wheel], tmp_path: Path) -> None:
    own = tmp_path / "onnxruntime_gpu-1.23.0-cp311-cp311-linux_aarch64.whl"
    own.write_bytes(b"")
    pins = {name: pin for name, pin in locked(T4).items() if name in ("onnxruntime", "paho-mqtt")}
    assert [wheel.name for wheel in fetch_wheels(T4, pins, [own])] == ["onnxruntime-gpu", "paho-mqtt"]
    with pytest.raises(AssetError, match="is not there"):
        fetch_wheels(T4, pins, [tmp_path / "none.whl"])
    wrong = tmp_path / "some.whl"
    wrong.write_bytes(b"")
    with pytest.raises(AssetError, match="as its maker named it"):
        fetch_wheels(T4, pins, [wrong])


def test_markers_are_those_of_the_board() -> None:
    assert locked(T1)["onnxruntime"].version == "1.23.2"
    assert not T1.unused & locked(T1).keys()
    assert "typing-extensions" in locked(T1)
    assert "typing-extensions" not in locked(T4)
    assert "pyreadline3" not in locked(T1)


@pytest.mark.parametrize(
    ("text", "why"), [("numpy==1.0\n", "has no hash"), ("numpy=1 --hash=sha256:\n", "no requirement")]
)
def test_a_damaged_lock_is_refused(text: str, why: str) -> None:
    with pytest.raises(AssetError, match=why):
        read_lock(text, T4)


def test_an_unknown_tier_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"t1: Ubuntu 22\.04") as caught:
        find_tier("t9")
    assert "t9" in caught.value.what


def test_a_build_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="dpkg-deb"):
        build(T4, tmp_path / "out", maintainer="A <a@example.org>", say=lambda _: None)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]


def test_what_was_built_from_the_same_is_not_built_again(
    wheels: list[Wheel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetune.tools.flash.build.fetch_wheels", lambda *_: wheels)  # few, so that it is soon done

    def built(maintainer: str = "A <a@example.org>") -> dict[str, int]:
        build(T4, tmp_path / "out", maintainer=maintainer, say=lambda _: None)
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}

    first = built()
    assert built() == first
    (overlay,) = (tmp_path / "out").glob("*.overlay.tar.gz")
    whole = overlay.read_bytes()
    overlay.write_bytes(whole[:-1])
    mended = built()
    assert overlay.read_bytes() == whole
    others = built("B <b@example.org>")
    (deb,) = (name for name in others if name.endswith(".deb"))
    assert others[deb] != mended[deb]


def test_a_build_that_is_a_little_another_is_one_that_boards_take(content: Content, tmp_path: Path) -> None:
    overlay = tmp_path / "made.overlay.tar.gz"
    write_tar_gz(content.root, overlay)
    like = Build(1, content.version, T4.name, content.kit, {overlay.name: digest(overlay)})
    write_record(like, tmp_path / f"made{ENDING}")
    record = build_like(
        tmp_path / f"made{ENDING}", tmp_path / "other", lambda package: (package / "NEWS").write_text("1")
    )
    made = check_record(record)
    assert made.kit != content.kit
    extract(record.parent / overlay.name, tmp_path / "tree", below="usr/lib/fleetune")
    (kit,) = (tmp_path / "tree").iterdir()
    (news,) = kit.glob("lib/*/site-packages/fleetune/NEWS")
    assert (kit.name, news.read_text(encoding="utf-8")) == (made.kit, "1")
