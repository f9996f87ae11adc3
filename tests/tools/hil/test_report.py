"""One report of all boards."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fleetune.tools.hil.report import summary, write_report
from fleetune.tools.hil.run import Figure, Result, Results

PEAK = Figure(84.25, "MiB")
PASSED = Result("passed", 2.5, figures={"peak": PEAK})
NEEDS = Result("skipped", 0.0, "needs hardware: cuda")
FAILED = Result("failed", 1.0, "AssertionError: <b>9</b>")
ERROR = Result("error", 1.0, "StrategyError: it does not answer")


def write(out: Path, boards: dict[str, dict[str, Result]]) -> bool:
    for name, tests in boards.items():
        (out / name).mkdir()
        cases = "".join(f'<testcase name="{test}"/>' for test in tests)
        suite = f'<testsuite name="{name}" tests="{len(tests)}">{cases}</testsuite>'
        (out / name / "junit.xml").write_text(f"<testsuites>{suite}</testsuites>", encoding="utf-8")
    return write_report({name: Results(1, tests) for name, tests in boards.items()}, out)


def test_it_is_a_matrix_of_boards_and_tests(tmp_path: Path) -> None:
    first, second = {"a.py::test_it_boots": PASSED, "a.py::test_cuda": NEEDS}, {"a.py::test_it_boots": FAILED}
    assert not write(tmp_path, {"nano-1": first, "nano-2": second})
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert not report["passed"]
    assert report["boards"]["nano-1"]["a.py::test_it_boots"]["figures"] == {"peak": {"value": 84.25, "unit": "MiB"}}
    assert report["boards"]["nano-1"]["a.py::test_cuda"]["outcome"] == "skipped"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "it boots" in page
    assert "peak: 84.25 MiB" in page
    assert "needs hardware: cuda" in page
    assert "not run" in page
    assert "<b>9</b>" not in page  # what a test says is text
    junit = ElementTree.parse(tmp_path / "junit.xml").getroot()  # noqa: S314
    assert [suite.get("name") for suite in junit] == ["nano-1", "nano-2"]
    assert len(junit.findall("testsuite/testcase")) == 3


def test_what_needs_hardware_is_counted_as_such() -> None:
    tests = {"a": PASSED, "b": NEEDS, "c": FAILED, "d": Result("skipped", why="no build"), "e": ERROR}
    rows = summary({"nano-1": Results(1, tests)})
    assert rows == [
        ["board", "passed", "failed", "error", "needs hardware", "skipped otherwise"],
        ["nano-1", "1", "1", "1", "1", "1"],
    ]


@pytest.mark.parametrize(
    ("tests", "good"),
    [
        ({"a": PASSED}, True),
        ({"a": PASSED, "b": NEEDS}, True),
        ({"a": NEEDS}, False),
        ({}, False),
        ({"a": FAILED}, False),
        ({"a": PASSED, "b": FAILED}, False),
        ({"a": PASSED, "b": ERROR}, False),
    ],
)
def test_boards_on_which_nothing_passed_did_not_pass(tmp_path: Path, tests: dict[str, Result], good: bool) -> None:
    assert write(tmp_path, {"nano-1": tests}) is good
