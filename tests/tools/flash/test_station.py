"""Flashing, without a board: NVIDIA's programs are stand-ins that write down how they are called."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import ConfigError, FileAccessError, RunFolderError
from fleetune.edge.protocol.files import FolderLock
from fleetune.profiles.fleet import read_fleet
from fleetune.server.authority.authority import Authority, Site
from fleetune.tools.doctor.host import Check
from fleetune.tools.flash.seed import Order, make_seeds
from fleetune.tools.flash.station.boards import boards_in_recovery
from fleetune.tools.flash.station.ledger import Ledger, read_ledger
from fleetune.tools.flash.station.plan import Plan, Wanted, Way, make_plan
from fleetune.tools.flash.station.preflight import PREFLIGHT, Station, preflight
from fleetune.tools.flash.station.run import Flashed, run_plan
from support.mqtt5 import wait_until
from support.station import calls, make_bsp, make_station, write

CLI = [sys.executable, "-m", "fleetune.tools.cli", "flash"]
NANO, ORIN = "7f21", "7523"

INVENTORY = """\
schema: 1
fleet: lab
devices:
  - {id: nano-1, serial: "1400", profile: jetson-nano-2gb, budget: {memory: 160MiB}}
  - {id: nano-2, serial: "1401", profile: jetson-nano-2gb, budget: {memory: 160MiB}}
  - {id: orin-1, serial: "2400", profile: orin-nano-8gb, budget: {memory: 160MiB}}
  - {id: orin-2, serial: "2401", profile: orin-nano-8gb, budget: {memory: 160MiB}}
"""


def inventory(folder: Path) -> Path:
    file = folder / "fleet.yaml"
    file.write_text(INVENTORY, encoding="utf-8")
    return file


def seeds(folder: Path, *devices: str, hours: float = 24.0, renew: bool = False) -> Path:
    """Seeds as the real command makes them."""
    made = (folder / "authority").exists()
    site, fleet = Site(("broker.local",)), read_fleet(inventory(folder))
    with closing(
        Authority(folder / "authority") if made else Authority.make(folder / "authority", "lab", site)
    ) as authority:
        order = Order(fleet, "/packs/minilm", "/samples.jsonl", hours, "folder", renew=renew)
        make_seeds(order, [fleet.device(name) for name in devices], authority, folder / "seeds", lambda _: None)
    return folder / "seeds"


def plan_of(
    folder: Path,
    way: Way,
    boards: Mapping[str, tuple[str, str]],
    *,
    bsp: Path | None = None,
    board: str = "jetson-nano-devkit",
    at: Mapping[str, str] | None = None,
    erase: bool = False,
    with_seeds: Path | None = None,
) -> tuple[Plan, Station]:
    root = make_station(folder, dict(boards))
    devices = read_fleet(inventory(folder)).devices
    wanted = Wanted(way, devices, at or {}, with_seeds, None, bsp or make_bsp(folder), board, erase=erase)
    return make_plan(wanted, boards_in_recovery(root), read_ledger(folder / "ledger")), Station(root)


def found(plan: Plan, station: Station) -> dict[str, Check]:
    return {check.name: check for check in preflight(plan, station)}


def run(plan: Plan, folder: Path, *, again: bool = False) -> list[Flashed]:
    assert plan.bsp is not None
    with closing(Ledger(folder / "ledger")) as ledger:
        return run_plan(plan, ledger, lambda _: None, again=again)


# --- which board is which --------------------------------------------------------------------------------------------


def test_boards_in_recovery_mode_are_found_by_their_usb_ids(tmp_path: Path) -> None:
    root = make_station(tmp_path, {"1-2.1": (NANO, "1400"), "3-1": (ORIN, ""), "1-4": ("7020", "running")})
    boards = boards_in_recovery(root)
    assert [(board.port, board.serial) for board in boards] == [("1-2.1", "1400"), ("3-1", "")]
    assert [board.module.name for board in boards if board.module] == ["Jetson Nano", "Jetson Orin Nano 8GB"]


def test_a_board_becomes_the_device_with_its_serial_number(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path, "usb", {"1-2.1": (NANO, "1401"), "1-2.2": (NANO, "1400")})
    assert [(job.where, job.device.id) for job in plan.jobs] == [("1-2.1", "nano-2"), ("1-2.2", "nano-1")]


def test_a_board_that_tells_no_number_becomes_what_the_operator_says(tmp_path: Path) -> None:
    boards = {"1-2.1": (NANO, ""), "1-2.2": (NANO, "1400")}
    with pytest.raises(ConfigError, match=r"1-2\.1, which tells no serial number, is nobody's") as caught:
        plan_of(tmp_path, "usb", boards)
    assert "--at 1-2.1=DEVICE" in caught.value.remedy
    plan, _ = plan_of(tmp_path, "usb", boards, at={"1-2.1": "nano-2"})
    assert {job.where: job.device.id for job in plan.jobs} == {"1-2.1": "nano-2", "1-2.2": "nano-1"}


@pytest.mark.parametrize(
    ("boards", "at", "why"),
    [
        ({}, {}, "no board in recovery mode is connected"),
        ({"1-1": (NANO, "9999")}, {}, "serial number 9999"),
        ({"1-1": (NANO, "1400")}, {"1-7": "nano-1"}, "no board in recovery mode at 1-7"),
        ({"1-1": (NANO, "1400")}, {"1-1": "nano-9"}, "nano-9 is not in the inventory"),
        ({"1-1": (NANO, "1400"), "1-2": (NANO, "")}, {"1-2": "nano-1"}, "two boards would become nano-1"),
        ({"1-1": (NANO, ""), "1-2": (NANO, "")}, {"1-1": "nano-1", "1-2": "nano-1"}, "nano-1 is there twice"),
    ],
)
def test_a_board_that_cannot_be_told_is_refused(
    tmp_path: Path, boards: dict[str, tuple[str, str]], at: dict[str, str], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        plan_of(tmp_path, "usb", boards, at=at)


# --- what is known to go wrong ---------------------------------------------------------------------------------------


def test_a_station_without_fault_passes(tmp_path: Path) -> None:
    (tmp_path / "nano").mkdir()
    plan, station = plan_of(tmp_path / "nano", "usb", {"1-1": (NANO, "1400")})
    assert {check.verdict for check in found(plan, station).values()} == {"ok"}
    (tmp_path / "orin").mkdir()
    bsp = make_bsp(tmp_path / "orin", "R36 (release), REVISION: 4.3", "t2")
    boards = {"1-1": (ORIN, "2400"), "1-2": (ORIN, "2401")}
    plan, station = plan_of(tmp_path / "orin", "initrd", boards, bsp=bsp, board="jetson-orin-nano-devkit", erase=True)
    verdicts = {name: check.verdict for name, check in found(plan, station).items()}
    assert verdicts.pop("seeds") == "note"
    assert set(verdicts.values()) == {"ok"}


def orin(folder: Path) -> tuple[Plan, Station]:
    bsp = make_bsp(folder, "R36 (release), REVISION: 4.3", "t2")
    return plan_of(folder, "initrd", {"1-1": (ORIN, "2400")}, bsp=bsp, board="jetson-orin-nano-devkit")


def refused(plan: Plan, station: Station, name: str, why: str, remedy: str) -> None:
    check = found(plan, station)[name]
    assert (check.verdict, check.code) == ("failure", PREFLIGHT)
    assert why in check.found
    assert remedy in check.fix


def test_a_bsp_on_zfs_cannot_be_exported(tmp_path: Path) -> None:
    plan, station = orin(tmp_path)
    write(station.root / "proc/mounts", f"/dev/sda1 / ext4 rw 0 0\ntank/home {tmp_path} zfs rw 0 0\n")
    refused(plan, station, "export", "zfs", "move the BSP")
    write(station.root / "proc/mounts", f"tank / zfs rw 0 0\n/dev/sda1 {tmp_path} ext4 rw 0 0\n")
    assert found(plan, station)["export"].verdict == "ok"


def test_a_masked_nfs_server_is_named(tmp_path: Path) -> None:
    plan, station = orin(tmp_path)
    unit = station.root / "etc/systemd/system/nfs-server.service"
    unit.parent.mkdir(parents=True)
    unit.symlink_to("/dev/null")
    refused(plan, station, "nfs", "nfs-server.service", "systemctl unmask nfs-server.service")
    unit.unlink()
    (station.root / "usr/lib/systemd/system/nfs-server.service").unlink()
    refused(plan, station, "nfs", "no NFS server", "nfs-kernel-server")


def test_udev_that_renames_the_boards_network_interface_is_found(tmp_path: Path) -> None:
    plan, station = orin(tmp_path)
    write(station.root / "usr/lib/systemd/network/73-usb-net-by-mac.link", "[Match]\n")
    refused(plan, station, "network", "renames usb0", '"0955"')
    fix = found(plan, station)["network"].fix
    write(station.root / "etc/udev/rules.d/70-l4t-flash.rules", f"{fix.partition(' in /etc')[0]}\n")
    assert found(plan, station)["network"].verdict == "ok"


def test_a_slot_that_never_starts_is_erased_or_warned_of(tmp_path: Path) -> None:
    plan, station = orin(tmp_path)
    assert found(plan, station)["slots"].verdict == "note"
    assert "--erase" in found(plan, station)["slots"].fix
    bsp = tmp_path / "Linux_for_Tegra"
    boards = {"1-1": (ORIN, "2400")}
    plan, _ = plan_of(tmp_path, "initrd", boards, bsp=bsp, board="jetson-orin-nano-devkit", erase=True)
    assert found(plan, station)["slots"].verdict == "ok"
    assert "--erase-all" in plan.jobs[0].commands[0]


def test_a_bsp_of_another_board_is_refused_with_the_serial_number(tmp_path: Path) -> None:
    bsp = make_bsp(tmp_path, "R36 (release), REVISION: 4.3", "t2")
    plan, station = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")}, bsp=bsp)
    refused(plan, station, "bsp", "1400", "name the BSP of those boards")
    refused(plan, station, "content", "tier t2", "build it for that tier")


def test_another_board_than_the_inventory_means_is_refused_with_the_serial_number(tmp_path: Path) -> None:
    plan, station = plan_of(tmp_path, "usb", {"1-1": (ORIN, "1400")})
    refused(plan, station, "boards", "a Jetson Orin Nano 8GB; nano-1 (serial number 1400)", "correct its profile")


def test_a_board_that_the_bsp_does_not_know_is_answered_with_those_it_does(tmp_path: Path) -> None:
    plan, station = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")}, board="jetson-nona")
    refused(plan, station, "program", "jetson-nona", "jetson-nano-devkit, jetson-orin-nano-devkit")


def test_a_rootfs_without_system_or_kit_is_refused(tmp_path: Path) -> None:
    plan, station = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")})
    bsp = tmp_path / "Linux_for_Tegra"
    (bsp / "rootfs/usr/share/fleetune/manifest.json").unlink()
    plan, station = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")}, bsp=bsp)
    refused(plan, station, "content", "no kit", "overlay.tar.gz")
    (bsp / "rootfs/etc/nv_tegra_release").unlink()
    plan, station = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")}, bsp=bsp)
    refused(plan, station, "bsp", "no root file system", "apply_binaries.sh")


def test_a_full_disk_is_found_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, station = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")})
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr("fleetune.tools.flash.station.preflight.shutil.disk_usage", lambda _: usage)
    refused(plan, station, "room", "0 MiB free", "make room")


def test_whoever_is_not_root_is_told(tmp_path: Path) -> None:
    plan, station = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")})
    refused(plan, Station(station.root, user=1000), "rights", "root", "sudo")


def test_a_seed_that_a_broken_off_run_left_reaches_no_other_board(tmp_path: Path) -> None:
    plan, station = orin(tmp_path)
    left = tmp_path / "Linux_for_Tegra/rootfs/var/lib/fleetune/seed"
    write(left / "seed.json", '{"device": "nano-1"}')
    refused(plan, station, "rootfs", "every board would get", f"rm -r {left}")
    nano = tmp_path / "nano"
    nano.mkdir()
    plan, _ = plan_of(nano, "usb", {"1-1": (NANO, "1400")})
    left = nano / "Linux_for_Tegra/rootfs/var/lib/fleetune/seed"
    write(left / "seed.json", '{"device": "nano-2"}')
    run(plan, nano)
    assert calls(nano / "Linux_for_Tegra") == ["flash.sh --usb-instance 1-1 jetson-nano-devkit mmcblk0p1 seed="]
    assert not left.exists()


def test_a_serial_number_that_is_not_the_devices_is_refused(tmp_path: Path) -> None:
    plan, station = plan_of(tmp_path, "usb", {"1-1": (NANO, "1401")}, at={"1-1": "nano-1"})
    refused(plan, station, "boards", "says that its serial number is 1401; that of nano-1 is 1400", "--at")


def test_a_nano_is_not_flashed_with_orins_program(tmp_path: Path) -> None:
    plan, station = plan_of(tmp_path, "initrd", {"1-1": (NANO, "1400")})
    refused(plan, station, "program", "does not flash a Jetson Nano", "--way usb")


# --- seeds -----------------------------------------------------------------------------------------------------------


def spoiled(folder: Path, how: str) -> Path:
    made = seeds(folder, "nano-1", "nano-2", hours=0.0001 if how == "ended" else 24.0)
    seed = made / "nano-1"
    if how == "another's":
        for file in (made / "nano-2").iterdir():
            shutil.copyfile(file, seed / file.name)
    elif how == "without a token":
        (seed / "token").unlink()
    elif how == "empty":
        shutil.rmtree(seed)
        seed.mkdir()
    elif how == "of another board":
        text = (seed / "seed.json").read_text()
        (seed / "seed.json").write_text(text.replace('"1400"', '"9999"'))
    return made


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("ended", "counts no more"),
        ("another's", "is the seed of nano-2, not of nano-1"),
        ("without a token", "token is missing"),
        ("empty", "seed.json is missing"),
        ("of another board", "is for the board 9999"),
    ],
)
def test_a_seed_that_a_board_could_not_use_is_refused_before_it_is_flashed(tmp_path: Path, how: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")}, with_seeds=spoiled(tmp_path, how))
    assert "fleetune flash seed" in caught.value.remedy


def test_a_board_whose_seed_was_renewed_is_not_done(tmp_path: Path) -> None:
    boards = {"1-1": (NANO, "1400")}
    plan, _ = plan_of(tmp_path, "usb", boards, with_seeds=seeds(tmp_path, "nano-1"))
    assert [one.code for one in run(plan, tmp_path)] == [0]
    bsp, again = tmp_path / "Linux_for_Tegra", seeds(tmp_path, "nano-1", renew=True)
    plan, _ = plan_of(tmp_path, "usb", boards, bsp=bsp, with_seeds=again)
    assert [one.code for one in run(plan, tmp_path)] == [0]


def test_boards_that_are_flashed_all_at_once_get_no_seed_of_one(tmp_path: Path) -> None:
    bsp = make_bsp(tmp_path, "R36 (release), REVISION: 4.3", "t2")
    with pytest.raises(ConfigError, match="--seeds"):
        plan_of(tmp_path, "initrd", {"1-1": (ORIN, "2400")}, bsp=bsp, with_seeds=seeds(tmp_path, "orin-1"))


# --- the run ---------------------------------------------------------------------------------------------------------


def test_each_nano_gets_its_own_seed_and_no_other(tmp_path: Path) -> None:
    boards = {"1-1": (NANO, "1400"), "1-2": (NANO, "1401")}
    plan, _ = plan_of(tmp_path, "usb", boards, with_seeds=seeds(tmp_path, "nano-1", "nano-2"))
    done = run(plan, tmp_path)
    assert [(one.device, one.code) for one in done] == [("nano-1", 0), ("nano-2", 0)]
    assert calls(tmp_path / "Linux_for_Tegra") == [
        "flash.sh --usb-instance 1-1 jetson-nano-devkit mmcblk0p1 seed=nano-1",
        "flash.sh --usb-instance 1-2 jetson-nano-devkit mmcblk0p1 seed=nano-2",
    ]
    assert not (tmp_path / "Linux_for_Tegra/rootfs/var/lib/fleetune/seed").exists()


def test_all_orins_are_flashed_at_once_and_one_by_its_port(tmp_path: Path) -> None:
    bsp = make_bsp(tmp_path, "R36 (release), REVISION: 4.3", "t2")
    boards = {"1-1": (ORIN, "2400"), "1-2": (ORIN, "2401")}
    plan, _ = plan_of(tmp_path, "initrd", boards, bsp=bsp, board="jetson-orin-nano-devkit")
    assert [one.code for one in run(plan, tmp_path)] == [0, 0]
    common = "l4t_initrd_flash.sh --flash-only --network usb0"
    assert calls(bsp) == [f"{common} --massflash 2 jetson-orin-nano-devkit mmcblk0p1 seed="]
    (tmp_path / "one").mkdir()
    plan, _ = plan_of(tmp_path / "one", "initrd", {"1-2": (ORIN, "2401")}, bsp=bsp, board="jetson-orin-nano-devkit")
    run(plan, tmp_path / "one")
    assert calls(bsp)[1] == f"{common} --usb-instance 1-2 jetson-orin-nano-devkit mmcblk0p1 seed="


def test_the_next_run_does_what_failed_and_leaves_the_rest(tmp_path: Path) -> None:
    boards = {"1-1": (NANO, "1400"), "1-2": (NANO, "1401")}
    plan, _ = plan_of(tmp_path, "usb", boards, with_seeds=seeds(tmp_path, "nano-1", "nano-2"))
    bsp = tmp_path / "Linux_for_Tegra"
    (bsp / "fail-1-2").touch()
    assert [one.code for one in run(plan, tmp_path)] == [0, 3]
    assert not (bsp / "rootfs/var/lib/fleetune/seed").exists()
    (bsp / "fail-1-2").unlink()
    assert [one.code for one in run(plan, tmp_path)] == [None, 0]
    assert [one.code for one in run(plan, tmp_path)] == [None, None]
    assert [call.split()[2] for call in calls(bsp)] == ["1-1", "1-2", "1-2"]
    assert [one.code for one in run(plan, tmp_path, again=True)] == [0, 0]


def test_another_image_is_flashed_anew(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")})
    run(plan, tmp_path)
    manifest = tmp_path / "Linux_for_Tegra/rootfs/usr/share/fleetune/manifest.json"
    write(manifest, manifest.read_text().replace("0123456789ab", "ba9876543210"))
    newer, _ = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")}, bsp=tmp_path / "Linux_for_Tegra")
    assert newer.image != plan.image
    assert [one.code for one in run(newer, tmp_path)] == [0]


def test_the_ledger_says_who_what_when_and_how_it_ended(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")})
    (one,) = run(plan, tmp_path)
    began, ended = read_ledger(tmp_path / "ledger")
    assert (began.device, began.serial, began.where, began.code) == ("nano-1", "1400", "1-1", None)
    assert (ended.code, ended.image) == (0, plan.image)
    assert began.at <= ended.at
    assert one.log is not None
    assert "flashing --usb-instance 1-1" in one.log.read_text()


def test_a_run_that_is_killed_goes_on_with_the_board_it_was_at(tmp_path: Path) -> None:
    """The station loses its power in the midst of a board."""
    root = make_station(tmp_path, {"1-1": (NANO, "1400")})
    bsp = make_bsp(tmp_path)
    (bsp / "kill").touch()
    command = [*CLI, "run", "--inventory", inventory(tmp_path), "--way", "usb", "--bsp", bsp]
    command += ["--board", "jetson-nano-devkit", "--root", root, "--ledger", tmp_path / "ledger"]
    command += ["--seeds", seeds(tmp_path, "nano-1")]
    if os.geteuid() != 0:
        pytest.skip("needs root, which NVIDIA's programs ask for")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9
    assert [entry.code for entry in read_ledger(tmp_path / "ledger")] == [None]
    (bsp / "kill").unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "which an earlier run broke off" in done.stderr
    assert "nano-1" in done.stdout
    assert not (bsp / "rootfs/var/lib/fleetune/seed").exists()
    assert [entry.code for entry in read_ledger(tmp_path / "ledger")] == [None, None, 0]


def test_a_line_that_a_power_cut_tore_is_left_out(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")})
    run(plan, tmp_path)
    file = tmp_path / "ledger/ledger.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"device":"nano-1","ser')
    assert len(list(read_ledger(tmp_path / "ledger"))) == 2
    Ledger(tmp_path / "ledger").close()
    assert file.read_bytes() == whole
    file.write_bytes(b"{}\n" + whole)
    with pytest.raises(ConfigError, match=r"ledger\.jsonl, line 1"):
        Ledger(tmp_path / "ledger")


def test_a_board_that_is_done_may_have_left_recovery_mode(tmp_path: Path) -> None:
    """As every real one does."""
    boards, at = {"1-1": (NANO, ""), "1-2": (NANO, "")}, {"1-1": "nano-1", "1-2": "nano-2"}
    plan, _ = plan_of(tmp_path, "usb", boards, at=at)
    bsp = tmp_path / "Linux_for_Tegra"
    (bsp / "fail-1-2").touch()
    assert [one.code for one in run(plan, tmp_path)] == [0, 3]
    (bsp / "fail-1-2").unlink()
    shutil.rmtree(tmp_path / "station/sys/bus/usb/devices/1-1")
    plan, station = plan_of(tmp_path, "usb", {"1-2": (NANO, "")}, at=at, bsp=bsp)
    assert found(plan, station)["boards"].verdict == "ok"
    assert [(one.device, one.code) for one in run(plan, tmp_path)] == [("nano-1", None), ("nano-2", 0)]


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_stop_ends_with_the_board_it_is_at_and_says_so(tmp_path: Path, told: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, which NVIDIA's programs ask for")
    root, bsp = make_station(tmp_path, {"1-1": (NANO, "1400"), "1-2": (NANO, "1401")}), make_bsp(tmp_path)
    (bsp / "flash.sh").write_text("#!/bin/sh\ntouch began\nsleep 3\n", encoding="utf-8")
    command = [*CLI, "run", "--inventory", inventory(tmp_path), "--way", "usb", "--bsp", bsp]
    command += ["--board", "jetson-nano-devkit", "--root", root, "--ledger", tmp_path / "ledger"]
    command += ["--seeds", seeds(tmp_path, "nano-1", "nano-2")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert wait_until((bsp / "began").exists, 30)
        process.send_signal(told)
        assert process.wait(40) == 130
    assert [(entry.device, entry.code) for entry in read_ledger(tmp_path / "ledger")] == [
        ("nano-1", None),
        ("nano-1", 0),
    ]
    assert not (bsp / "rootfs/var/lib/fleetune/seed").exists()


def test_what_a_killed_run_has_started_keeps_the_next_one_out(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "ledger")) as ledger:
        orphan = subprocess.Popen(["/bin/sleep", "30"], pass_fds=(ledger.held,))
    try:
        with pytest.raises(RunFolderError, match="in use"):
            Ledger(tmp_path / "ledger")
    finally:
        orphan.kill()
        orphan.wait()
    Ledger(tmp_path / "ledger").close()


def test_two_ledgers_do_not_let_two_runs_into_one_bsp(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")})
    with closing(FolderLock(tmp_path / "Linux_for_Tegra")), pytest.raises(RunFolderError, match="in use"):
        run(plan, tmp_path)
    assert calls(tmp_path / "Linux_for_Tegra") == []


def test_a_full_disk_tears_no_line_of_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes a part of the line, and no more."""
    plan, _ = plan_of(tmp_path, "usb", {"1-1": (NANO, "1400")})
    run(plan, tmp_path)
    file = tmp_path / "ledger/ledger.jsonl"
    whole = file.read_bytes()
    with closing(Ledger(tmp_path / "ledger")) as ledger:
        write_part = os.write
        monkeypatch.setattr("os.write", lambda number, data: write_part(number, data[:20]))
        with pytest.raises(FileAccessError, match=r"ledger\.jsonl: no room"):
            ledger.begin("nano-2", None, "1-2", "0" * 64)
        monkeypatch.undo()
        assert file.read_bytes() == whole
        ledger.begin("nano-2", None, "1-2", "0" * 64)
    assert len(list(read_ledger(tmp_path / "ledger"))) == 3


def test_one_card_under_two_names_is_refused(tmp_path: Path) -> None:
    for name in ("image", "card"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "by-id").symlink_to("card")
    at = {str(tmp_path / "card"): "nano-1", str(tmp_path / "by-id"): "nano-2"}
    wanted = Wanted("card", read_fleet(inventory(tmp_path)).devices, at, None, tmp_path / "image")
    with pytest.raises(ConfigError, match="are one card"):
        make_plan(wanted, ())


def test_two_runs_at_once_on_one_ledger_are_refused(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "ledger")), pytest.raises(RunFolderError, match="in use"):
        Ledger(tmp_path / "ledger")


def test_a_dry_run_prints_the_very_commands_and_runs_none(tmp_path: Path) -> None:
    root = make_station(tmp_path, {"1-1": (NANO, "1400")})
    bsp = make_bsp(tmp_path)
    common = ["--inventory", inventory(tmp_path), "--way", "usb", "--bsp", bsp, "--board", "jetson-nano-devkit"]
    common += ["--root", root, "--ledger", tmp_path / "ledger"]
    done = subprocess.run([*CLI, "run", *common, "--dry-run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    clear = f"rm --recursive --force {bsp}/rootfs/var/lib/fleetune/seed\n"
    assert done.stdout == f"{clear}{bsp}/flash.sh --usb-instance 1-1 jetson-nano-devkit mmcblk0p1\n{clear}"
    assert calls(bsp) == []
    assert not (tmp_path / "ledger").exists()
    done = subprocess.run([*CLI, "plan", *common, "--json"], capture_output=True, text=True, check=False)
    (board,) = json.loads(done.stdout)["boards"]
    assert (board["device"], board["serial"], board["where"], board["state"]) == ("nano-1", "1400", "1-1", "open")


def test_a_run_touches_no_board_where_the_preflight_fails(tmp_path: Path) -> None:
    root = make_station(tmp_path, {"1-1": (ORIN, "1400")})
    bsp = make_bsp(tmp_path)
    common = ["--inventory", inventory(tmp_path), "--way", "usb", "--bsp", bsp, "--board", "jetson-nano-devkit"]
    common += ["--root", root, "--ledger", tmp_path / "ledger"]
    for action in ("preflight", "run"):
        done = subprocess.run([*CLI, action, *common], capture_output=True, text=True, check=False)
        assert done.returncode == PREFLIGHT, done.stderr
        assert "1400" in done.stdout + done.stderr
    assert calls(bsp) == []
