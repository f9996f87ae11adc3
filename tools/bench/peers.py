"""The peers' own environments: built once, beside the assets, so that nothing of them enters Fleetune's."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.errors import AssetError
from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.assets.fetch import cache_root


@dataclass(frozen=True)
class Peers:
    """Peers that share an environment.

    Attributes:
        requirements: What pip installs.
        size: What it takes on disk, for people.
        packages: Those whose versions a document names.
    """

    requirements: Path
    size: str
    packages: tuple[str, ...]


PEFT = Peers(Path(__file__).with_name("peers.txt"), "1.3 GB", ("torch", "transformers", "peft", "bitsandbytes"))
FLOWER = Peers(Path(__file__).with_name("flower.txt"), "0.3 GB", ("flwr", "grpcio", "numpy"))


def peers_python(say: Callable[[str], None], peers: Peers = PEFT) -> Path:
    """The interpreter of the peers' environment, which is made if it is missing.

    Raises:
        AssetError: pip cannot install the peers.
    """
    digest = hashlib.sha256(peers.requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_root() / "peers" / digest
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        say(f"installs {peers.packages[0]} and what it needs into an environment of its own, once ({peers.size})")
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "-q", "-r", str(peers.requirements)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
                raise AssetError(f"the peers cannot be installed: {last[0]}", "see that pip works, or use --peers none")
        write_atomic(complete, b"")
    return python


def peer_versions(python: Path, peers: Peers = PEFT) -> dict[str, str]:
    """Versions of the packages that matter."""
    code = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *peers.packages], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
