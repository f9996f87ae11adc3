"""Programs of a board: found, bounded in time and output, and named when they fail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetune.edge.resources.probes.command import OUTPUT_LIMIT, run_command
from fleetune.edge.resources.probes.tree import Tree

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a shell script on PATH."""

    def write(name: str, script: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return write


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_what_a_program_prints(install: Install, tree: Tree) -> None:
    install("tool", 'echo "$@"; echo $LC_ALL')
    assert run_command(tree, "tool", "-q", "a b") == "-q a b\nC\n"
    assert tree.skipped == ()


def test_a_program_that_is_not_installed_is_none(tree: Tree) -> None:
    assert run_command(tree, "no-such-program-anywhere") is None
    assert tree.skipped == ()


def test_one_that_fails_is_named_with_its_words(install: Install, tree: Tree) -> None:
    install("tool", "echo half an answer; echo must be root >&2; exit 3")
    assert run_command(tree, "tool") == "half an answer\nmust be root\n"
    assert tree.skipped == ("tool: exit status 3: 'half an answer\\nmust be root'",)


def test_one_that_hangs_is_ended_with_what_it_started(install: Install, tree: Tree, tmp_path: Path) -> None:
    install("tool", f"echo begun; (sleep 2; touch {tmp_path}/survived) & wait")
    start = time.monotonic()
    assert run_command(tree, "tool", timeout_s=0.3) == "begun\n"
    assert time.monotonic() - start < 1.5
    assert tree.skipped == ("tool: did not end in time: 'begun'",)
    time.sleep(2.2)
    assert not (tmp_path / "survived").exists()


def test_one_that_closes_its_output_and_stays_is_ended(install: Install, tree: Tree) -> None:
    install("tool", "exec >&- 2>&-; sleep 30")
    start = time.monotonic()
    assert run_command(tree, "tool", timeout_s=0.3) == ""
    assert time.monotonic() - start < 5
    assert tree.skipped == ("tool: did not end in time",)


def test_one_that_goes_on_for_ever_is_ended_after_its_lines(install: Install, tree: Tree) -> None:
    install("tool", "while true; do echo line; sleep 0.01; done")
    start = time.monotonic()
    output = run_command(tree, "tool", lines=2, timeout_s=30)
    assert time.monotonic() - start < 5
    assert output is not None
    assert output.startswith("line\nline\n")
    assert tree.skipped == ()


def test_one_that_floods_is_ended(install: Install, tree: Tree) -> None:
    install("tool", "while true; do echo 0123456789012345678901234567890123456789; done")
    output = run_command(tree, "tool", timeout_s=10)
    assert output is not None
    assert len(output) == OUTPUT_LIMIT
    assert tree.skipped[0].startswith(f"tool: printed more than {OUTPUT_LIMIT} bytes")


def test_one_that_cannot_be_started_is_named(tmp_path: Path, install: Install, tree: Tree) -> None:
    (tmp_path / "tool").write_bytes(b"\x7fELF of another processor")
    (tmp_path / "tool").chmod(0o755)
    assert run_command(tree, "tool") is None
    assert tree.skipped == ("tool: exec format error",)


def test_one_that_reads_does_not_wait_for_a_user(install: Install, tree: Tree) -> None:
    install("tool", "cat; echo done")
    terminal, keyboard = os.pipe()  # on which nobody types
    stdin = os.dup(0)
    os.dup2(terminal, 0)
    try:
        assert run_command(tree, "tool", timeout_s=2) == "done\n"
    finally:
        os.dup2(stdin, 0)
        for descriptor in (terminal, keyboard, stdin):
            os.close(descriptor)
