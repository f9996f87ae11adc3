"""The README: its commands are the ones that are tested, and what it pins is what is installed."""

from __future__ import annotations

import configparser
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from fleetune.tools.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("flashing.md", "hil.md")]
EXAMPLES = sorted((ROOT / "docs/examples").iterdir())


def blocks(text: str) -> list[str]:
    """Its shell blocks."""
    return re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


BLOCKS = blocks(README)
COMMANDS = [
    line.partition("#")[0].strip()
    for block in [*BLOCKS, *(block for guide in GUIDES for block in blocks(guide))]
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"(^|/|sudo )fleetune ", line.partition("#")[0])
]


def fleetune_part(line: str) -> list[str]:
    """The arguments of the ``fleetune`` command in a shell line."""
    last = line.split("&&")[-1].split("|")[0].strip()
    words = shlex.split(last.removeprefix("sudo "))
    assert Path(words[0]).name == "fleetune"
    return words[1:]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_fleetune_takes(line: str) -> None:
    assert build_parser().parse_args(fleetune_part(line)).run


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_every_example_is_yaml_and_its_command_is_one_that_fleetune_takes(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    assert yaml.safe_load(text)
    commands = re.findall(r"fleetune (hil .*)", text)
    assert commands
    for command in commands:
        assert build_parser().parse_args(shlex.split(command)).run


def test_the_first_command_installs_and_runs_the_demo() -> None:
    first = BLOCKS[0].strip()
    assert "\n" not in first
    assert "pip install -c constraints.txt '.[all]'" in first
    assert fleetune_part(first) == ["demo", "--out", "runs/demo"]


def test_the_second_command_is_the_one_that_ci_runs() -> None:
    second = BLOCKS[1].strip()
    assert "pip install -c constraints.txt -e '.[all,dev]'" in second
    assert second.endswith(".ci/check")
    assert os.access(ROOT / ".ci/check", os.X_OK)
    pattern = re.search(r'grep -m1 -F "([^"]+)" README\.md', (ROOT / ".ci/run").read_text(encoding="utf-8"))
    assert pattern is not None
    assert [line for line in README.splitlines() if pattern[1] in line] == [second]


def test_every_linked_file_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^":]+)"', README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_constraints_pin_every_package_that_setup_names() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].splitlines()
    for extra in setup["options.extras_require"].values():
        lines += extra.splitlines()
    named = {re.split(r"[\s<>=;\[]", line.strip())[0].lower() for line in lines if line.strip()}
    pinned = {
        re.split(r"[=\s;]", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    assert len(named) > 15
    assert {name.replace("_", "-") for name in named} - pinned - {"fleetune"} == set()
