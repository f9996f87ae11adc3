"""Every reason for a refusal that the code gives is in docs/transfer.md, and the other way round."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from fleetune.server.quarantine import FOR_CAUSE, REASON

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "transfer.md").read_text(encoding="utf-8").partition("## Refusals")[2]


def given() -> Iterator[str]:
    """What stands as ``reason`` in a call, or as the second argument of an error about a header."""
    for file in (*(ROOT / "edge").rglob("*.py"), *(ROOT / "server").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                shown = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
                if isinstance(node.func, ast.Name) and node.func.id in ("HeaderError", "_refuse"):
                    shown += node.args[1:2]
                yield from (some.value for some in shown if isinstance(some, ast.Constant) and some.value)


def documented() -> set[str]:
    table = [line for line in DOCUMENT.splitlines() if line.startswith("|")]
    return set(re.findall(r"`([a-z]+(?:-[a-z]+)*)`", "\n".join(line.split("|")[1] for line in table)))


def test_every_reason_is_documented() -> None:
    found = {*given(), REASON, "no-room"}
    assert len(found) > 20
    assert found - documented() == set()


def test_no_reason_is_documented_that_nobody_gives() -> None:
    assert documented() - {*given(), *FOR_CAUSE, REASON, "no-room"} == set()


def test_what_counts_towards_a_quarantine_is_marked() -> None:
    rows = [line for line in DOCUMENT.splitlines() if line.startswith("|")]
    marked = {code for row in rows if row.rstrip(" |").endswith("counts") for code in re.findall(r"`([a-z-]+)`", row)}
    assert marked == FOR_CAUSE & documented()
