"""One report of all boards: a matrix of devices and tests, what was measured, and JUnit for whoever reads that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import msgspec
from jinja2 import Environment, StrictUndefined

from fleetune.edge.protocol.files import read_bytes, write_atomic
from fleetune.tools.hil.run import JUNIT, Figure, Result, Results

REPORT, PAGE = "report.json", "report.html"

_MARKS = {"passed": "✓", "failed": "✗", "error": "✗", "skipped": "–"}
_MAX_JUNIT = 1 << 24
_SHORT = 400


def write_report(found: Mapping[str, Results], out: Path) -> bool:
    """Write ``report.json``, ``report.html`` and ``junit.xml``.

    Args:
        found: Board → what came of its tests; each board's own files lie in a folder of its name.
        out: For the files.

    Returns:
        Whether no test failed, and some passed on each board.

    Raises:
        OSError: They cannot be written.
    """
    good = all(_is_good(results) for results in found.values())
    boards = {name: msgspec.to_builtins(results.tests) for name, results in found.items()}
    write_atomic(out / REPORT, json.dumps({"schema": 1, "passed": good, "boards": boards}, indent=1).encode() + b"\n")
    write_atomic(out / PAGE, _page(found).encode())
    write_atomic(out / JUNIT, _junit(list(found), out))
    return good


def summary(found: Mapping[str, Results]) -> list[list[str]]:
    """Rows of a table for people: each board, and how its tests came out."""
    rows = [["board", "passed", "failed", "error", "needs hardware", "skipped otherwise"]]
    for name, results in found.items():
        outcomes = [_kind(result) for result in results.tests.values()]
        counts = [outcomes.count(kind) for kind in ("passed", "failed", "error", "needs hardware", "skipped")]
        rows.append([name, *map(str, counts)])
    return rows


def first_failure(found: Mapping[str, Results]) -> str:
    """Why not all is good, in a line."""
    for name, results in found.items():
        for test, result in results.tests.items():
            if result.outcome in ("failed", "error"):
                return f"not all tests passed; the first: {name}: {test}: {' '.join(result.why.split())[:_SHORT]}"
    return "no test passed: all were skipped"


def _kind(result: Result) -> str:
    return (
        "needs hardware" if result.outcome == "skipped" and result.why.startswith("needs hardware") else result.outcome
    )


def _is_good(results: Results) -> bool:
    outcomes = {result.outcome for result in results.tests.values()}
    return "passed" in outcomes <= {"passed", "skipped"}


def _page(found: Mapping[str, Results]) -> str:
    tests = list(dict.fromkeys(test for results in found.values() for test in results.tests))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"words": _words, "figure": _figure}
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(found=found, tests=tests, marks=_MARKS, rows=summary(found))


def _words(test: str) -> str:
    """A test's name, as a sentence."""
    return test.partition("::")[2].removeprefix("test_").replace("_", " ")


def _figure(figure: Figure) -> str:
    return f"{figure.value:.4g} {figure.unit}".strip()


def _junit(boards: list[str], out: Path) -> bytes:
    """The suites of all boards in one document; pytest wrote each of them here."""
    merged = ElementTree.Element("testsuites", name="fleetune")
    for board in boards:
        root = ElementTree.fromstring(read_bytes(out / board / JUNIT, _MAX_JUNIT))  # noqa: S314 - pytest's own
        merged.extend(root.iter("testsuite"))
    ElementTree.indent(merged)
    document: bytes = ElementTree.tostring(merged, encoding="utf-8", xml_declaration=True)
    return document + b"\n"
