"""A build as Mender and RAUC take it, by their own programs; and whatever was altered on the way is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import AssetError, ConfigError, RunFailedError, SignatureError
from fleetune.edge.protocol.identity.signature import sign_file
from fleetune.server.authority.authority import Authority, Site
from fleetune.tools.flash.build import build
from fleetune.tools.flash.mender import check_mender, write_mender
from fleetune.tools.flash.rauc import check_rauc, write_rauc
from fleetune.tools.flash.record import ENDING, check_record, read_record
from fleetune.tools.flash.tier import TIERS
from support.lacking import lacking

pytestmark = pytest.mark.slow

CLI = (sys.executable, "-m", "fleetune.tools.cli")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a build."""
    out = tmp_path_factory.mktemp("images")
    build(TIERS["t4"], out, say=lambda _: None)
    (record,) = out.glob(f"*{ENDING}")
    return record


def needs(name: str, package: str) -> str:
    program = shutil.which(name)
    if program is None:
        lacking(f"needs {name}: apt-get install {package}")
    return program


def openssl(*arguments: str | Path) -> None:
    subprocess.run([needs("openssl", "openssl"), *arguments], check=True, capture_output=True)


def altered(file: Path, target: Path, at: float = 0.5) -> Path:
    """A copy with another byte in it."""
    shutil.copyfile(file, target)
    with target.open("r+b") as stream:
        stream.seek(int(target.stat().st_size * at))
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    return target


@pytest.fixture
def mender_key(tmp_path: Path) -> Path:
    key = tmp_path / "mender.pem"
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", tmp_path / "mender.pub")
    return key


def test_a_mender_artifact_brings_the_package_and_is_signed(built: Path, mender_key: Path, tmp_path: Path) -> None:
    program = needs("mender-artifact", "mender-artifact")
    command = [*CLI, "flash", "mender", built, "--device-type", "jetson-nano", "--device-type", "nano-2gb"]
    done = subprocess.run([*command, "--key", mender_key], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    artifact = Path(done.stdout.strip())
    check_mender(artifact, tmp_path / "mender.pub")
    said = subprocess.run(
        [program, "read", "--key", tmp_path / "mender.pub", artifact], capture_output=True, text=True
    ).stdout
    assert "signed and verified correctly" in said
    assert "[jetson-nano nano-2gb]" in said
    record = read_record(built)
    assert f"Name: fleetune-{record.fleetune}+t4-{record.kit}" in said
    assert next(sha256 for name, sha256 in record.files.items() if name.endswith(".deb")) in said


def test_an_artifact_that_was_altered_or_that_another_signed_is_refused(
    built: Path, mender_key: Path, tmp_path: Path
) -> None:
    needs("mender-artifact", "mender-artifact")
    deb = next(built.parent.glob("*.deb"))
    artifact = tmp_path / "a.mender"
    write_mender(deb, artifact, name="a", device_types=["nano"], key=mender_key)
    with pytest.raises(RunFailedError, match="mender-artifact"):
        check_mender(altered(artifact, tmp_path / "b.mender"), tmp_path / "mender.pub")
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", tmp_path / "other.pem")
    openssl("pkey", "-in", tmp_path / "other.pem", "-pubout", "-out", tmp_path / "other.pub")
    with pytest.raises(RunFailedError, match="mender-artifact"):
        check_mender(artifact, tmp_path / "other.pub")


@pytest.mark.parametrize("key", ["none.pem", "text.pem", "ed25519.pem"])
def test_a_key_that_mender_cannot_use_is_named(built: Path, tmp_path: Path, key: str) -> None:
    needs("mender-artifact", "mender-artifact")
    (tmp_path / "text.pem").write_text("no key")
    openssl("genpkey", "-algorithm", "ED25519", "-out", tmp_path / "ed25519.pem")
    deb = next(built.parent.glob("*.deb"))
    with pytest.raises(ConfigError, match=key):
        write_mender(deb, tmp_path / "a.mender", name="a", device_types=["nano"], key=tmp_path / key)
    assert not (tmp_path / "a.mender").exists()


@pytest.fixture
def rauc_keys(tmp_path: Path) -> tuple[Path, Path]:
    needs("rauc", "rauc")
    needs("mksquashfs", "squashfs-tools")
    key, certificate = tmp_path / "rauc.key", tmp_path / "rauc.crt"
    wanted = ["-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=fleet"]
    openssl("req", "-x509", *wanted)
    return key, certificate


def test_a_rauc_bundle_brings_the_kit_and_is_signed(built: Path, rauc_keys: tuple[Path, Path], tmp_path: Path) -> None:
    key, certificate = rauc_keys
    command = [*CLI, "flash", "rauc", built, "--compatible", "acme-orin", "--key", key, "--cert", certificate]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bundle, record = Path(done.stdout.strip()), read_record(built)
    program = needs("rauc", "rauc")
    info = [program, "info", "--output-format=json", f"--keyring={certificate}", bundle]
    said = json.loads(subprocess.run(info, capture_output=True, text=True, check=True).stdout)
    assert (said["compatible"], said["build"]) == ("acme-orin", record.kit)
    assert [list(image) for image in said["images"]] == [["appfs"]]
    out = tmp_path / "out"
    subprocess.run([program, "extract", f"--keyring={certificate}", bundle, out], check=True, capture_output=True)
    with tarfile.open(out / "kit.tar.gz") as archive:
        entries = {entry.name: entry for entry in archive}
    assert entries["current"].linkname == record.kit
    assert f"{record.kit}/bin/fleetune" in entries
    assert {(entry.uid, entry.gid) for entry in entries.values()} == {(0, 0)}


def test_a_bundle_that_was_altered_or_that_another_signed_is_refused(
    built: Path, rauc_keys: tuple[Path, Path], tmp_path: Path
) -> None:
    key, certificate = rauc_keys
    overlay, bundle = next(built.parent.glob("*.overlay.tar.gz")), tmp_path / "a.raucb"
    write_rauc(
        overlay, bundle, version="1", kit="k", compatible="c", key=key, certificate=certificate, keyring=certificate
    )
    with pytest.raises(RunFailedError, match="rauc"):
        check_rauc(altered(bundle, tmp_path / "b.raucb", at=0.99999), certificate)
    other = tmp_path / "other.crt"
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "o", "-out", other, "-subj", "/CN=o")
    with pytest.raises(RunFailedError, match="rauc"):
        check_rauc(bundle, other)


def test_an_overlay_without_a_kit_makes_no_bundle(rauc_keys: tuple[Path, Path], tmp_path: Path) -> None:
    key, certificate = rauc_keys
    overlay = tmp_path / "x.overlay.tar.gz"
    with tarfile.open(overlay, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("etc/passwd"), io.BytesIO())
    with pytest.raises(AssetError, match="has no kit"):
        write_rauc(
            overlay,
            tmp_path / "a.raucb",
            version="1",
            kit="k",
            compatible="c",
            key=key,
            certificate=certificate,
            keyring=certificate,
        )
    assert not (tmp_path / "a.raucb").exists()


# --- the record of a build -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".deb", ".overlay.tar.gz", ".sbom.cdx.json"])
def test_a_build_with_another_file_in_it_is_refused(built: Path, tmp_path: Path, ending: str) -> None:
    images = tmp_path / "images"
    shutil.copytree(built.parent, images)
    check_record(images / built.name)
    file = next(images.glob(f"*{ending}"))
    altered(next(built.parent.glob(f"*{ending}")), file)
    with pytest.raises(SignatureError, match="is not what was built"):
        check_record(images / built.name)
    file.unlink()
    with pytest.raises(SignatureError, match="is missing"):
        check_record(images / built.name)


def test_a_signed_build_is_verified_with_all_its_files(built: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(built.parent, images)
    with closing(Authority.make(tmp_path / "authority", "lab", Site(("localhost",)))) as authority:
        publisher = authority.make_member("publisher", tmp_path / "publisher")
        sign_file(images / built.name, publisher, authority.now())
    command = [*CLI, "verify", images / built.name, "--identity", tmp_path / "publisher"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    deb = next(images.glob("*.deb"))
    altered(next(built.parent.glob("*.deb")), deb)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert deb.name in done.stderr


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "build.json: "),
        ('{"schema": 1, "fleetune": "1", "tier": "t1", "kit": "k", "files": {"../x": "00"}}', "regex"),
        ('{"schema": 2, "fleetune": "1", "tier": "t1", "kit": "k", "files": {}}', "field schema"),
    ],
)
def test_a_damaged_record_is_refused_with_its_field(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "x.build.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=why):
        read_record(file)
