"""NVIDIA's Jetson boards: which one, which release of L4T, and which power mode holds it back."""

from __future__ import annotations

import re

import msgspec

from fleetune.edge.resources.probes.command import run_command
from fleetune.edge.resources.probes.tegrastats import TegraStats, read_tegrastats
from fleetune.edge.resources.probes.tree import Tree

_RELEASE = re.compile(r"R(\d{1,4}) \(release\), REVISION: (\d{1,4}(?:\.\d{1,4})*)")
_MODE = re.compile(r"^NV Power Mode: ?(\S.*?)\s*\n\s*(\d{1,4})\s*$", re.MULTILINE)
_MODE_NAME_ONLY = re.compile(r"^NV Power Mode: ?(\S.*?)\s*$", re.MULTILINE)
_STATUS = re.compile(r"pmode:(\d{1,8})")
_MODELS = re.compile(r"<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=(\S+?)\s*>")


class PowerMode(msgspec.Struct, frozen=True):
    """A row of `/etc/nvpmodel.conf`, which caps clocks and switches cores off.

    Attributes:
        name: Such as ``MAXN``, ``5W``, ``15W``.
        number: What ``nvpmodel -m`` takes.
    """

    name: str | None
    number: int | None


class Tegra(msgspec.Struct, frozen=True):
    """A Jetson board.

    Attributes:
        soc: Such as ``tegra210`` (Nano), ``tegra234`` (Orin).
        l4t: Release of L4T, such as ``32.7.1``.
        power_mode: The mode that it is in.
        stats: A line of tegrastats, if it was asked for.
    """

    soc: str | None
    l4t: str | None
    power_mode: PowerMode | None
    stats: TegraStats | None


def read_tegra(tree: Tree, *, commands: bool = False) -> Tegra | None:
    """The board; None if this is no Tegra.

    Args:
        tree: Where to read.
        commands: Whether ``nvpmodel -q`` and ``tegrastats`` may be run, which takes about half a second. Otherwise the
            power mode is what nvpmodel has written down.
    """
    compatible = tree.text("/proc/device-tree/compatible")
    release = tree.text("/etc/nv_tegra_release")
    soc = re.search(r"nvidia,(tegra\d{1,4})", compatible or "")
    if soc is None and release is None:
        return None
    return Tegra(
        soc=soc[1] if soc else None,
        l4t=_l4t(tree, release),
        power_mode=(_asked_mode(tree) if commands else None) or _written_mode(tree),
        stats=read_tegrastats(tree) if commands else None,
    )


def _l4t(tree: Tree, release: str | None) -> str | None:
    match = _RELEASE.search(release or "")
    if match is None and release is not None:
        tree.skip("/etc/nv_tegra_release", f"not understood: {release!r}")
    return f"{match[1]}.{match[2]}" if match else None


def _asked_mode(tree: Tree) -> PowerMode | None:
    """What ``nvpmodel -q`` answers; without root it complains after its answer."""
    output = run_command(tree, "nvpmodel", "-q")
    if output is None:
        return None
    match = _MODE.search(output)
    if match is not None:
        return PowerMode(match[1], int(match[2]))
    match = _MODE_NAME_ONLY.search(output)
    if match is None:
        tree.skip("nvpmodel", f"not understood: {output.strip()!r}")
        return None
    return PowerMode(match[1], None)


def _written_mode(tree: Tree) -> PowerMode | None:
    path = "/var/lib/nvpmodel/status"
    text = tree.text(path)
    if text is None:
        return None
    match = _STATUS.search(text)
    if match is None:
        tree.skip(path, f"not understood: {text!r}")
        return None
    number = int(match[1])
    names = {int(id_): name for id_, name in _MODELS.findall(tree.text("/etc/nvpmodel.conf") or "")}
    return PowerMode(names.get(number), number)
