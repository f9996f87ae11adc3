"""The checks that a board passes before anything can be installed, also as a file of its own on an old Python."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.tools.doctor import host
from fleetune.tools.doctor.host import Board, Check
from support.lacking import lacking
from support.trees import plant, sample
from support.wheels import pins, plain_install

SOURCE = Path(host.__file__)

OS_RELEASE = 'PRETTY_NAME="Ubuntu {0}.6 LTS"\nNAME="Ubuntu"\nVERSION_ID="{0}"\nID=ubuntu\nID_LIKE=debian\n'


def board_of(
    root: Path, name: str, system: str = "", machine: str = "aarch64", python: tuple[int, ...] = (3, 10)
) -> Board:
    """A recorded board with a userland."""
    plant(root, sample(name) | ({"/etc/os-release": OS_RELEASE.format(system)} if system else {}))
    return host.read_board(root, machine, python)


# --- alone, on an old Python --------------------------------------------------------------------------------------


def test_the_file_is_one_that_python_3_6_reads_with_nothing_installed() -> None:
    parsed = ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 6))
    imported = set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            imported.add(node.module.partition(".")[0])
    assert imported <= sys.stdlib_module_names - {"__future__"}


def old_pythons() -> list[Path]:
    """Interpreters older than those that Fleetune takes, where pyenv has installed some."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    return sorted(path / "bin/python" for minor in (6, 7, 8, 9) for path in versions.glob(f"3.{minor}.*"))


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_an_old_python_runs_it_alone_and_hears_what_to_install(options: list[str], tmp_path: Path) -> None:
    pythons = old_pythons()
    if not pythons:
        pytest.skip("needs an old Python: pyenv install 3.6")
    copy = tmp_path / "host.py"  # as curl brings it to a board
    copy.write_bytes(SOURCE.read_bytes())
    for python in pythons:
        done = subprocess.run([python, "-I", copy, *options], capture_output=True, text=True, check=False)
        assert done.stderr == ""
        assert done.returncode == host.PYTHON
        if options:
            found = json.loads(done.stdout)
            assert [(check["name"], check["verdict"], check["code"]) for check in found["checks"]] == [
                ("board", "ok", 0),
                ("python", "failure", host.PYTHON),
                ("glibc", "ok", 0),
            ]
        else:
            assert re.search(
                r"^failure  python   CPython 3\.\d\.\d+, 64-bit: .*3\.10", done.stdout, re.MULTILINE | re.DOTALL
            )


def test_this_python_passes_all_of_it() -> None:
    done = subprocess.run([sys.executable, "-I", SOURCE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines() if line[0] != " "] == [
        ["ok", "board"],
        ["ok", "python"],
        ["ok", "glibc"],
    ]


# --- board --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "system", "tier", "verdict"),
    [
        ("jetson-nano-r32", "18.04", "t0", "failure"),
        ("jetson-nano-r32", "20.04", "", "note"),
        ("jetson-nano-r32", "22.04", "t1", "ok"),
        ("orin-nano-r36", "22.04", "t2", "ok"),
        ("raspberry-pi-5", "24.04", "t4", "ok"),
    ],
)
def test_boards_have_the_tier_that_the_readme_gives_them(
    name: str, system: str, tier: str, verdict: str, tmp_path: Path
) -> None:
    board = board_of(tmp_path, name, system)
    check = host.check_board(board)
    assert (board.tier, check.verdict) == (tier, verdict)
    assert board.name in check.found
    assert f"Ubuntu {system}" in check.found


def test_a_stock_nano_hears_why_it_is_not_supported_and_where_to_go(tmp_path: Path) -> None:
    check = host.check_board(board_of(tmp_path, "jetson-nano-r32", "18.04"))
    assert check.code == host.BOARD
    assert "L4T 32.7.1" in check.found
    assert "Python is 3.6" in check.found
    assert "T1" in check.fix
    assert "Ubuntu 22.04" in check.fix


def test_a_nano_that_names_no_system_is_judged_by_its_python(tmp_path: Path) -> None:
    assert board_of(tmp_path / "stock", "jetson-nano-r32", python=(3, 6)).tier == "t0"
    assert board_of(tmp_path / "rebuilt", "jetson-nano-r32", python=(3, 10)).tier == "t1"


def test_another_systems_low_number_is_not_taken_for_an_old_ubuntu(tmp_path: Path) -> None:
    plant(tmp_path, sample("jetson-nano-r32") | {"/etc/os-release": 'ID=debian\nVERSION_ID="12"\n'})
    assert host.read_board(tmp_path, "aarch64", (3, 11)).tier == ""


@pytest.mark.parametrize(
    ("release", "kernel", "l4t", "tier"),
    [
        ("# R35 (release), REVISION: 5.0, GCID: 1, BOARD: generic", "5.10.192-tegra", "35.5.0", ""),
        ("# R38 (release), REVISION: 2.0, GCID: 1, BOARD: generic", "6.8.12-tegra", "38.2.0", "t3"),
        ("", "5.15.148-tegra", "36", "t2"),
        ("", "4.9.253-tegra", "32", "t1"),
        ("", "6.8.0-45-generic", "", "t4"),
    ],
)
def test_a_container_that_hides_the_release_leaves_the_kernels_version(
    release: str, kernel: str, l4t: str, tier: str, tmp_path: Path
) -> None:
    files = {"/proc/sys/kernel/osrelease": f"{kernel}\n", "/etc/os-release": OS_RELEASE.format("22.04")}
    plant(tmp_path, files | ({"/etc/nv_tegra_release": release} if release else {}))
    board = host.read_board(tmp_path, "aarch64", (3, 10))
    assert (board.l4t, board.tier) == (l4t, tier)


def test_a_processor_without_wheels_is_refused(tmp_path: Path) -> None:
    board = board_of(tmp_path, "raspberry-pi-5", machine="armv7l")
    check = host.check_board(board)
    assert (check.verdict, check.code, board.tier) == ("failure", host.BOARD, "")
    assert "armv7l" in check.found
    assert "64-bit" in check.fix


# --- Python -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "verdict"),
    [((3, 6, 9), "failure"), ((3, 9, 18), "failure"), ((3, 10, 0), "ok"), ((3, 12, 9), "ok"), ((3, 13, 0), "note")],
)
def test_python_is_judged_by_its_version(version: tuple[int, ...], verdict: str) -> None:
    check = host.check_python(version, 64, "aarch64", "CPython")
    assert (check.verdict, check.code) == (verdict, host.PYTHON if verdict == "failure" else 0)
    assert ".".join(map(str, version)) in check.found
    assert ("3.10" in check.fix) == (verdict != "ok")


@pytest.mark.parametrize("machine", ["aarch64", "armv8l"])
def test_a_32_bit_userland_on_a_64_bit_kernel_is_named_as_such(machine: str, tmp_path: Path) -> None:
    assert host.check_board(board_of(tmp_path, "raspberry-pi-5", machine=machine)).verdict == "ok"
    check = host.check_python((3, 11, 2), 32, machine, "CPython")
    assert (check.verdict, check.code) == ("failure", host.PYTHON)
    assert "32-bit userland" in check.found
    assert "arm64" in check.fix


def test_another_implementation_has_no_wheels() -> None:
    assert host.check_python((3, 10, 14), 64, "aarch64", "PyPy").code == host.PYTHON


# --- C library ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("libc", "python", "code"),
    [
        ("glibc 2.27", (3, 10), 0),
        ("glibc 2.27", (3, 11), host.GLIBC),
        ("glibc 2.26", (3, 10), host.GLIBC),
        ("glibc 2.9", (3, 10), host.GLIBC),
        ("glibc 2.35", (3, 10), 0),
        ("glibc 3.0", (3, 12), 0),
        ("", (3, 12), host.GLIBC),
    ],
)
def test_glibc_is_held_against_what_the_wheels_need(libc: str, python: tuple[int, ...], code: int) -> None:
    check = host.check_glibc(libc, python)
    assert (check.verdict, check.code) == ("failure" if code else "ok", code)
    assert libc in check.found
    assert ("musl" in check.found) == (not libc)


def oldest_glibc(tags: list[str]) -> tuple[int, int]:
    """The oldest glibc with which a wheel of these platform tags is installed."""
    legacy = {"manylinux2010": (2, 12), "manylinux2014": (2, 17)}
    found = []
    for tag in tags:
        match = re.search(r"manylinux_(\d+)_(\d+)_|(manylinux20\d\d)_", tag)
        if match is not None:
            found.append(legacy[match[3]] if match[3] else (int(match[1]), int(match[2])))
    return min(found, default=(0, 0))


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
def test_the_glibc_that_is_asked_for_is_that_of_every_pinned_wheel(python: str, machine: str, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    pinned = pins(python_full_version=f"{python}.5", python_version=python, platform_machine=machine)
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(5, 36)]
    platforms += [f"--platform={legacy}_{machine}" for legacy in ("manylinux2010", "manylinux2014")]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={python}", "--implementation=cp", *platforms, "--ignore-requires-python"]
    command += [f"--target={tmp_path}/none", "--report=-", f"--constraint={constraints}", *sorted(plain_install())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lacking(f"needs a package registry: {done.stderr.strip().splitlines()[-1]}")
    names = [item["download_info"]["url"].rpartition("/")[2] for item in json.loads(done.stdout)["install"]]
    assert len(names) == len(plain_install())
    needed = max(oldest_glibc(name.removesuffix(".whl").rpartition("-")[2].split(".")) for name in names)
    assert needed == host.needed_glibc(tuple(map(int, python.split("."))))


def test_this_c_library_is_read() -> None:
    name, version = platform.libc_ver()
    assert host.read_glibc() == f"{name} {version}"


# --- output -------------------------------------------------------------------------------------------------------


def test_a_line_tells_verdict_name_and_code_within_80_columns() -> None:
    check = Check("wheels", "failure", "numpy 2.4.6: SIGILL " * 9 + "x" * 30, "pip install numpy==2.2.6 " * 6, 33)
    text = host.as_text(check)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("failure  wheels   numpy 2.4.6: SIGILL")
    assert "fix (exit code 33): pip install" in text
    assert all(line.startswith(" " * 18) for line in text.splitlines()[1:])
    advice = host.as_text(Check("clock", "note", "not synchronised", "set it"))
    assert advice.splitlines()[1].strip() == "advice: set it"


def test_the_first_failure_gives_the_exit_code() -> None:
    fine = [Check("a", "ok", ""), Check("b", "note", "")]
    assert host.exit_code(fine) == 0
    assert host.exit_code(fine + [Check("c", "failure", "", "", code) for code in (36, 31, 42)]) == 36
