"""Reading below a root: what is not there is None, what cannot be read is named, and every read has a bound."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.edge.resources.probes.tree import ENTRIES_LIMIT, TEXT_LIMIT, Tree, integer
from support.trees import plant


def test_what_is_not_there_is_none_and_not_skipped(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/proc/file": "1"})
    assert tree.text("/proc/absent") is None
    assert tree.text("/proc/file/below") is None
    assert tree.integer("/proc/absent") is None
    assert tree.counters("/proc/absent") == {}
    assert tree.names("/absent", ".*") == []
    assert tree.link("/absent") is None
    assert tree.modified_s("/absent") is None
    assert not tree.has("/absent")
    assert tree.skipped == ()


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    """As a user who is not root: permissions do not bind root."""
    plant(tmp_path, {"/sys/closed": "1", "/sys/folder/open": "1"})
    (tmp_path / "sys/closed").chmod(0)
    (tmp_path / "sys/folder").chmod(0)
    for folder in (tmp_path, tmp_path / "sys"):
        folder.chmod(0o755)
    script = f"""
import os, sys
from pathlib import Path
from fleetune.edge.resources.probes.tree import Tree
here = Path({str(tmp_path)!r})
os.chdir(here)
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
tree = Tree(Path("."))
assert tree.text("/sys/closed") is None
assert tree.integer("/sys/closed") is None
assert tree.names("/sys/folder", ".*") == []
assert tree.text("/sys/folder/open") is None
print("|".join(tree.skipped))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    (tmp_path / "sys/folder").chmod(0o755)
    assert done.stdout.strip().split("|") == [
        "/sys/closed: permission denied",
        "/sys/folder: permission denied",
        "/sys/folder/open: permission denied",
    ]


def test_what_is_too_large_is_named_and_not_read(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/proc/large": "1" * (TEXT_LIMIT + 1), "/proc/fits": "1" * TEXT_LIMIT})
    assert tree.text("/proc/large") is None
    assert len(tree.text("/proc/fits") or "") == TEXT_LIMIT
    assert tree.skipped == (f"/proc/large: more than {TEXT_LIMIT} bytes",)


def test_a_file_without_an_end_is_let_go(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless")
    let_go = []

    def write() -> None:
        try:
            with (tmp_path / "endless").open("wb", buffering=0) as file:
                for _ in range(100):
                    file.write(bytes(TEXT_LIMIT))
        except BrokenPipeError:
            let_go.append(True)

    writer = threading.Thread(target=write)
    writer.start()
    tree = Tree(tmp_path)
    assert tree.text("/endless") is None
    writer.join(timeout=10)
    assert let_go
    assert tree.skipped == (f"/endless: more than {TEXT_LIMIT} bytes",)


def test_a_folder_with_too_many_names_is_named(tmp_path: Path) -> None:
    for number in range(ENTRIES_LIMIT + 1):
        (tmp_path / f"f{number}").touch()
    tree = Tree(tmp_path)
    assert len(tree.names("/", "f[0-9]+")) == ENTRIES_LIMIT
    assert tree.skipped == (f"/: more than {ENTRIES_LIMIT} entries",)


def test_names_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    tree = plant(tmp_path, {f"/sys/zone{number}": "" for number in (10, 2, 1)} | {"/sys/other": "", "/sys/zone1x": ""})
    assert tree.names("/sys", "zone[0-9]+") == ["zone1", "zone2", "zone10"]


def test_a_number_that_is_none_is_named_once(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/sys/temp": "warm\n"})
    assert tree.integer("/sys/temp") is None
    assert tree.integer("/sys/temp") is None
    assert tree.skipped == ("/sys/temp: not a number: 'warm'",)


def test_counters_take_what_they_can(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/proc/meminfo": "MemTotal:    12 kB\nMemFree: much\nlow 7\n"})
    assert tree.counters("/proc/meminfo") == {"MemTotal": 12, "low": 7}
    assert tree.skipped == ("/proc/meminfo: not a name and a number: 'MemFree: much'",)


def test_a_note_is_one_short_line_that_a_terminal_can_show(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/sys/temp": "x\n" * 500})
    tree.integer("/sys/temp")
    tree.skip("/sys/a\n\x1b[31mred\0é", "x" * 500)
    first, second = tree.skipped
    assert first.startswith("/sys/temp: not a number: 'x\\nx")
    assert second.startswith("/sys/a [31mred : xxx")
    assert len(first) <= 250
    assert len(second) <= 250


@pytest.mark.parametrize("path", ["/a\0b", "/" + "x" * 300, "/loop", "/folder"])
def test_a_path_that_the_system_refuses_is_named(tmp_path: Path, path: str) -> None:
    tree = plant(tmp_path, {"/loop": "->loop", "/folder/file": ""})
    assert tree.text(path) is None
    assert len(tree.skipped) == 1


def test_only_the_real_root_is_live(tmp_path: Path) -> None:
    assert Tree().live
    assert not Tree(tmp_path).live


def test_a_file_that_fails_when_it_is_read_is_named() -> None:
    tree = Tree()
    assert tree.text("/proc/self/mem") is None  # may be opened, but has nothing at address 0
    assert tree.skipped == ("/proc/self/mem: input/output error",)


@given(st.text())
def test_a_number_of_the_kernel_has_64_bits(text: str) -> None:
    value = integer(text)
    assert value is None or (value == int(text) and abs(value) < 1 << 64)


@pytest.mark.parametrize(("text", "value"), [
    ("0", 0), ("-5000", -5000), ("18446744073709551615", (1 << 64) - 1), ("18446744073709551616", None),
    ("9" * 5000, None), ("", None), ("1.5", None), ("max", None),
])  # fmt: skip
def test_numbers(text: str, value: int | None) -> None:
    assert integer(text) == value
