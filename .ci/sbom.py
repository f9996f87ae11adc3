"""Hold a bill of materials against a lock file: ``python .ci/sbom.py tools/flash/device.lock sbom.json``.

Whatever is installed is locked, but for Fleetune itself and pip's own tools; and each part has a name, a version and a
licence: the one that it states, or the one here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

_OWN = {"fleetune", "pip", "setuptools", "wheel"}
_LICENCES = {"protobuf": "BSD-3-Clause"}
"""Of parts whose wheels state none."""


def main(lock: Path, sbom: Path) -> None:
    """Compare, and end with a list of what is wrong."""
    locked = {
        (match["name"].lower(), match["version"])
        for match in re.finditer(r"^(?P<name>[\w.-]+)==(?P<version>[^ ;\\]+)", lock.read_text(), re.MULTILINE)
    }
    document = json.loads(sbom.read_text())
    parts = document["components"]
    for part in parts:
        if not part.get("licenses") and part["name"] in _LICENCES:
            part["licenses"] = [{"license": {"id": _LICENCES[part["name"]], "acknowledgement": "concluded"}}]
    wrong = [
        f"{part['name']} {part['version']} is installed, and not locked"
        for part in parts
        if part["name"].lower() not in _OWN and (part["name"].lower(), part["version"]) not in locked
    ]
    wrong += [f"{part['name']} {part['version']} names no licence" for part in parts if not part.get("licenses")]
    if wrong:
        sys.exit("\n".join(wrong))
    sbom.write_text(json.dumps(document, indent=1))
    print(f"{sbom}: {len(parts)} parts, each locked by hash and with its licence")  # noqa: T201


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
