"""What is installed: an install that is not editable has every folder of the sources, and what lies beside the code."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[1]
MEMBERS = ("edge", "server", "profiles", "tools")


def test_every_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = setup["options"]["packages"].split()
    files = (file for member in MEMBERS for file in (ROOT / member).rglob("__init__.py"))
    found = sorted(".".join(("fleetune", *file.parent.relative_to(ROOT).parts)) for file in files)
    assert sorted(listed) == found
