"""What lies on sticks and cards, in builds and at the station."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import ConfigError, SignatureError
from fleetune.tools.doctor.slots import check_slots
from fleetune.tools.firstboot.board import Board
from fleetune.tools.firstboot.seed import Seed, read_seed, write_seed
from fleetune.tools.flash.record import check_record
from fleetune.tools.flash.station.boards import boards_in_recovery
from fleetune.tools.flash.station.bsp import read_bsp
from fleetune.tools.flash.station.card import read_map
from fleetune.tools.flash.station.ledger import FILE, Entry, read_ledger, state_of
from fleetune.tools.release.rollout import Part, Rollout, read_rollout, write_rollout
from fleetune.tools.trees import extract
from fleetune.tools.update.state import State, read_state
from fuzz.mutations import from_seeds, mutate_bytes, mutate_json, of_lines
from fuzz.target import MIB, Target

SEED = write_seed(
    Seed(1, "lab", "cam-1", "mqtts://b:8883", "/packs/minilm", "/var/lib/x.jsonl", "https://u.example.org", "142252103")
)
RECORD = json.dumps(
    {
        "schema": 1,
        "fleetune": "0.1.0",
        "tier": "t1",
        "kit": "0123456789ab",
        "files": {"a.deb": hashlib.sha256(b"a").hexdigest()},
    }
).encode()
MANIFEST = json.dumps({"schema": 1, "tier": "t1", "kit": "0123456789ab", "files": {"a": "0" * 64}}).encode()
MAP = b"""<?xml version="1.0" ?>
<bmap version="2.0">
<ImageSize> 25165824 </ImageSize><BlockSize> 4096 </BlockSize><BlocksCount> 6144 </BlocksCount>
<ChecksumType> sha256 </ChecksumType>
<BlockMap><Range chksum="00ff"> 0-2 </Range><Range chksum="11ee"> 512 </Range></BlockMap>
</bmap>
"""
LEDGER = b"".join(
    msgspec.json.encode(Entry("nano-1", "1400", "1-2.1", "0" * 64, 1.5e9, "nano-1.log", code)) + b"\n"
    for code in (None, 0)
)
BSP = b"# R32 (release), REVISION: 7.4, GCID: 1\n\0" + MANIFEST
JOURNAL = b'{"schema": 1, "done": {"grow": "x", "seed": "nano-1"}}'


def seed(data: bytes, _folder: Path) -> None:
    found = read_seed(data, "seed.json")
    assert read_seed(write_seed(found), "seed.json") == found


def record(data: bytes, folder: Path) -> None:
    (folder / "a.deb").write_bytes(b"a")
    (folder / "x.build.json").write_bytes(data)
    check_record(folder / "x.build.json")


def block_map(data: bytes, folder: Path) -> None:
    (folder / "x.bmap").write_bytes(data)
    assert read_map(folder / "x.bmap").ranges


def ledger(data: bytes, folder: Path) -> None:
    (folder / FILE).write_bytes(data)
    entries = list(read_ledger(folder))
    assert state_of(entries, "nano-1", "0" * 64) in ("open", "done", "failed", "interrupted")


def bsp(data: bytes, folder: Path) -> None:
    (folder / "flash.sh").touch()
    for name in ("rootfs/etc/nv_tegra_release", "rootfs/usr/share/fleetune/manifest.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    release, _, manifest = data.partition(b"\0")
    (folder / "rootfs/etc/nv_tegra_release").write_bytes(release)
    (folder / "rootfs/usr/share/fleetune/manifest.json").write_bytes(manifest)
    assert len(read_bsp(folder).image) == 64


def ports(data: bytes, folder: Path) -> None:
    port = folder / "sys/bus/usb/devices/1-1"
    port.mkdir(parents=True, exist_ok=True)
    for name, value in zip(("idVendor", "idProduct", "serial"), data.split(b"\0", 2), strict=False):
        (port / name).write_bytes(value)
    assert len(boards_in_recovery(folder)) <= 1


def slots(data: bytes, folder: Path) -> None:
    place = folder / "sys/firmware/efi/efivars/RootfsStatusSlotA-781e084c-a330-417c-b678-38e696380cb9"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    check_slots(folder)


def journal(data: bytes, folder: Path) -> None:
    board = Board(folder)
    board.state.mkdir(parents=True, exist_ok=True)
    (board.state / "firstboot.json").write_bytes(data)
    board.done()


ROLLOUT = write_rollout(Rollout(1, 3, {"t1": Part("kit.tar.gz", "0" * 64)}, {"minilm": Part("p.tar.gz", "1" * 64)}))
STATE = msgspec.json.encode(State(good=2, trying=3, before={"current": "a"}, after={"current": "b"}, bad=(1,)))


def rollout(data: bytes, _folder: Path) -> None:
    found = read_rollout(data, "rollout.json")
    assert read_rollout(write_rollout(found), "rollout.json") == found
    assert found.reaches("nano-1") in (True, False)


def update_state(data: bytes, folder: Path) -> None:
    (folder / "state.json").write_bytes(data)
    read_state(folder)


def archive(data: bytes, folder: Path) -> None:
    """Whatever an archive holds, nothing is written beside the tree."""
    whole = data if data.startswith(b"\x1f\x8b") else gzip.compress(data, 1)
    (folder / "x.tar.gz").write_bytes(whole)
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    try:
        extract(folder / "x.tar.gz", tree)
    finally:
        assert {path.name for path in folder.iterdir()} == {"x.tar.gz", "tree"}


def _archive() -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (("bin", tarfile.DIRTYPE), ("bin/python3", tarfile.SYMTYPE), ("word", tarfile.REGTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/usr/bin/python3" if kind == tarfile.SYMTYPE else ""
            entry.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(b"word"))
    return plain.getvalue()


ARCHIVES = [_archive(), gzip.compress(_archive(), 0, mtime=0)]
TARGETS = [
    Target("rollout", from_seeds([ROLLOUT], mutate_json, mutate_bytes), rollout, (ConfigError,)),
    Target("state of updates", from_seeds([STATE], mutate_json, mutate_bytes), update_state, (ConfigError,)),
    Target(
        "archive",
        from_seeds(ARCHIVES, mutate_bytes),
        archive,
        (SignatureError,),
        memory=8 * MIB,
    ),
    Target("seed", from_seeds([SEED], mutate_json, mutate_bytes), seed, (ConfigError,)),
    Target("build's record", from_seeds([RECORD], mutate_json, mutate_bytes), record, (ConfigError, SignatureError)),
    Target("block map", from_seeds([MAP], mutate_bytes), block_map, (ConfigError,), memory=8 * MIB),
    Target(
        "ledger of flashed boards", from_seeds([LEDGER], of_lines(mutate_json), mutate_bytes), ledger, (ConfigError,)
    ),
    Target(
        "bsp",
        from_seeds([BSP], mutate_bytes),
        bsp,
        (ConfigError,),
    ),
    Target("ports", from_seeds([b"0955\n\0007f21\n\0001400\n"], mutate_bytes), ports, ()),
    Target("slots", from_seeds([b"\7\0\0\0\xff\0\0\0"], mutate_bytes), slots, ()),
    Target("journal of the first boot", from_seeds([JOURNAL], mutate_json, mutate_bytes), journal, (ConfigError,)),
]
