"""The peers' own environment: built once, beside the assets, so that nothing of it enters Fleetune's."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fleetune.edge.protocol.errors import AssetError
from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.assets.fetch import cache_root

REQUIREMENTS = Path(__file__).with_name("peers.txt")


def peers_python(say: Callable[[str], None]) -> Path:
    """The interpreter of the peers' environment, which is made if it is missing.

    Raises:
        AssetError: pip cannot install the peers.
    """
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_root() / "peers" / digest
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        say("installs the peers into an environment of their own, once (1.3 GB)")
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
                raise AssetError(f"the peers cannot be installed: {last[0]}", "see that pip works, or use --peers none")
        write_atomic(complete, b"")
    return python


def peer_versions(python: Path) -> dict[str, str]:
    """Versions of the packages that matter."""
    code = (
        "import json, importlib.metadata as m; "
        "print(json.dumps({n: m.version(n) for n in ('torch', 'transformers', 'peft', 'bitsandbytes')}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
