"""SD cards, for which files stand: bmaptool, sfdisk and debugfs are the real ones."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import ConfigError, RunFailedError
from fleetune.profiles.fleet import read_fleet
from fleetune.server.authority.authority import Authority, Site
from fleetune.tools.ext4 import put_files
from fleetune.tools.flash.seed import Order, make_seeds
from fleetune.tools.flash.station import card as card_module
from fleetune.tools.flash.station.card import check_card, read_back, read_map, release_of, root_offset, write_card
from support.lacking import lacking

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MIB = 1 << 20


def tool(name: str, package: str) -> str:
    program = shutil.which(name, path=PATH)
    if program is None:
        lacking(f"needs {name}: apt-get install {package}")
    return program


@pytest.fixture(autouse=True)
def _tools() -> None:
    for name, package in (("bmaptool", "bmap-tools"), ("sfdisk", "fdisk"), ("debugfs", "e2fsprogs")):
        tool(name, package)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Partitions as on a Nano's card: a small one, then APP with the root file system."""
    rootfs, image = tmp_path / "rootfs.ext4", tmp_path / "nano.img"
    content = tmp_path / "content/var/lib/fleetune"
    content.mkdir(parents=True)
    (tmp_path / "content/data").write_bytes(os.urandom(MIB))
    command = [tool("mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext4", "-d", tmp_path / "content", rootfs, "16M"]
    subprocess.run(command, check=True)
    with image.open("wb") as stream:
        stream.truncate(24 * MIB)
    table = 'label: gpt\nstart=2048, size=2048, name="TBC"\nstart=4096, size=32768, name="APP"\n'
    subprocess.run([tool("sfdisk", "fdisk"), "-q", image], input=table, text=True, check=True)
    with image.open("r+b") as stream:
        stream.seek(4096 * 512)
        stream.write(rootfs.read_bytes())
    return image


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """A card that held something else before."""
    card = tmp_path / "card"
    card.write_bytes(os.urandom(32 * MIB))
    return card


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    (tmp_path / "fleet.yaml").write_text(
        "schema: 1\nfleet: lab\ndevices:\n  - {id: nano-1, profile: jetson-nano-2gb, budget: {memory: 160MiB}}\n"
    )
    fleet = read_fleet(tmp_path / "fleet.yaml")
    with closing(Authority.make(tmp_path / "authority", "lab", Site(("broker.local",)))) as authority:
        order = Order(fleet, "/packs/minilm", "/samples.jsonl", 24.0, "folder")
        make_seeds(order, fleet.devices, authority, tmp_path / "seeds", lambda _: None)
    seed = tmp_path / "seeds/nano-1"
    (seed / "holiday.mp4").write_bytes(b"not of a seed")
    return seed


def inside(card: Path, command: str) -> str:
    place = f"{card}?offset={4096 * 512}"
    done = subprocess.run([tool("debugfs", "e2fsprogs"), "-R", command, place], capture_output=True, text=True)
    return done.stdout


def test_a_card_is_written_read_back_and_gets_its_seed(image: Path, card: Path, seed: Path) -> None:
    command = [sys.executable, "-m", "fleetune.tools.cli", "flash", "card", image, card, "--seed", seed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("seed.json", "token", "fleet.yaml"):
        assert inside(card, f"cat /var/lib/fleetune/seed/{name}") == (seed / name).read_text()
    told = inside(card, "stat /var/lib/fleetune/seed/token")
    assert "Mode:  0600" in told
    assert "User:     0" in told
    assert "holiday" not in inside(card, "ls /var/lib/fleetune/seed")
    checked = subprocess.run(
        [tool("e2fsck", "e2fsprogs"), "-fn", f"{card}?offset={4096 * 512}"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_a_card_that_does_not_keep_what_is_written_is_refused(
    image: Path, card: Path, seed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes everything, and gives back something else: as cards do that claim more room than they have."""
    run = card_module.run_program

    def worn(command: list[str | Path], remedy: str, **options: object) -> str:
        said = run(command, remedy, **options)  # type: ignore[arg-type]
        if "copy" in command:
            with card.open("r+b") as stream:
                stream.seek(4096 * 512 + 1080)
                stream.write(b"\0\0\0\0")
        return said

    monkeypatch.setattr(card_module, "run_program", worn)
    with pytest.raises(RunFailedError, match="does not keep what is written: bytes"):
        write_card(image, card, seed, lambda _: None)
    assert (seed / "token").read_bytes() not in card.read_bytes()


def test_a_compressed_image_is_written_by_its_block_map(image: Path, card: Path) -> None:
    bmaptool = tool("bmaptool", "bmap-tools")
    subprocess.run([bmaptool, "create", "-o", image.with_name("nano.img.gz.bmap"), image], check=True)
    subprocess.run([tool("gzip", "gzip"), image], check=True)
    write_card(image.with_name("nano.img.gz"), card, None, lambda _: None)
    read_back(read_map(image.with_name("nano.img.gz.bmap")), card)
    assert root_offset(card) == 4096 * 512


def test_a_card_that_is_too_small_is_refused_before_it_is_written(image: Path, tmp_path: Path) -> None:
    card = tmp_path / "small"
    before = os.urandom(MIB)
    card.write_bytes(before)
    with pytest.raises(ConfigError, match=r"has 1 MiB.*needs 24"):
        write_card(image, card, None, lambda _: None)
    assert card.read_bytes() == before


def test_a_card_in_use_is_refused(card: Path, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\n{card}1 /media/photos vfat rw 0 0\n")
    with pytest.raises(ConfigError, match="is mounted at /media/photos") as caught:
        check_card(card, mounts)
    assert f"umount {card}1" in caught.value.remedy
    with pytest.raises(ConfigError, match="is not there"):
        check_card(tmp_path / "none")
    with pytest.raises(ConfigError, match="neither a device nor a file"):
        check_card(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no block map"),
        ("<bmap></bmap>", "no block map"),
        ("<bmap><ImageSize>1</ImageSize><BlockSize>4096</BlockSize></bmap>", "no SHA-256"),
        (
            "<bmap><ImageSize>1</ImageSize><BlockSize>4096</BlockSize><ChecksumType> sha1 </ChecksumType>"
            '<BlockMap><Range chksum="0">0</Range></BlockMap></bmap>',
            "no SHA-256",
        ),
    ],
)
def test_a_damaged_block_map_is_refused(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "x.bmap"
    file.write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_map(file)


def test_what_is_no_seed_is_refused_before_a_card_is_written(image: Path, card: Path, tmp_path: Path) -> None:
    before = card.read_bytes()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is no seed"):
        write_card(image, card, tmp_path / "folder", lambda _: None)
    assert card.read_bytes() == before


def test_the_image_itself_is_no_card(image: Path) -> None:
    before = image.read_bytes()
    with pytest.raises(ConfigError, match="is the image itself"):
        write_card(image, image, None, lambda _: None)
    assert image.read_bytes() == before


def test_a_compressed_image_without_a_block_map_is_refused_before_a_card_is_written(image: Path, card: Path) -> None:
    before = card.read_bytes()
    subprocess.run([tool("gzip", "gzip"), image], check=True)
    with pytest.raises(ConfigError, match="is compressed, and has no block map"):
        write_card(image.with_name("nano.img.gz"), card, None, lambda _: None)
    assert card.read_bytes() == before


def test_a_card_that_is_being_written_is_left_alone(image: Path, card: Path) -> None:
    with card.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(RunFailedError, match="being written already"):
            write_card(image, card, None, lambda _: None)


def test_an_image_tells_its_release_of_l4t(image: Path, tmp_path: Path) -> None:
    assert release_of(image) is None
    told = tmp_path / "nv_tegra_release"
    told.write_text("# R32 (release), REVISION: 7.4, GCID: 1\n")
    put_files(image, {"/etc/nv_tegra_release": told}, offset=root_offset(image))
    assert release_of(image) == 32


def test_a_file_that_does_not_fit_is_no_silent_loss(image: Path, card: Path, tmp_path: Path) -> None:
    """debugfs itself ends well whatever became of its commands."""
    write_card(image, card, None, lambda _: None)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(20 * MIB))
    with pytest.raises(RunFailedError, match="could not be put"):
        put_files(card, {"/large": large}, offset=root_offset(card))
