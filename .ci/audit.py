"""Read what pip-audit found: ``python .ci/audit.py audit.json``.

Ends with an error if a package has a known vulnerability. Where no advisories can be had, because the index has none or
nobody answers, nothing is audited; that is said aloud, and fails only with ``FLEETUNE_AUDIT=required``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(report: Path) -> None:
    """Say what was found."""
    packages = json.loads(report.read_text())["dependencies"] if report.exists() else []
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"{package['name']} {package['version']}: {', '.join(one['id'] for one in package['vulns'])}"
        for package in packages
        if package.get("vulns")
    ]
    if found:
        sys.exit("known vulnerabilities:\n" + "\n".join(found))
    if skipped or not packages:
        words = (
            f"NOT AUDITED: no advisories can be had for {len(skipped) or 'any'} of {len(packages) or 'the'} packages"
        )
        if os.environ.get("FLEETUNE_AUDIT") == "required":
            sys.exit(words)
        print(f"{words}; run .ci/supply where it has")  # noqa: T201
    else:
        print(f"{len(packages)} packages: no known vulnerability")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
