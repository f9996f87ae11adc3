"""One line of NVIDIA's `tegrastats`, whose parts differ from release to release."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from fleetune.edge.resources.probes.command import run_command
from fleetune.edge.resources.probes.tree import Tree

TIMEOUT_S = 5.0
"""Seconds after which tegrastats is ended if it has not printed a line."""

_OFF_C = -256.0  # what a sensor of a part without power reports
_UNCONNECTED = "NC"
_LINE_LIMIT = 4096


class CoreLoad(msgspec.Struct, frozen=True):
    """A core that is switched on.

    Attributes:
        load_percent: Load relative to the frequency it runs at.
        mhz: That frequency; None before L4T r28.
    """

    load_percent: int
    mhz: int | None


class Rail(msgspec.Struct, frozen=True):
    """Power on one rail in mW.

    Attributes:
        now_mw: At the moment; slightly negative where a sensor's offset exceeds the power.
        mean_mw: Mean since tegrastats started.
    """

    now_mw: int
    mean_mw: int


class TegraStats(msgspec.Struct, frozen=True):
    """What one line of tegrastats says. A field that a release does not print is None, or missing from its mapping.

    Attributes:
        text: The line.
        ram_used_mib: Memory in use.
        ram_total_mib: Memory that the kernel manages.
        largest_free_block_mib: Largest block that is free and contiguous, at most 4 MiB.
        largest_free_blocks: How many blocks of that size are free.
        swap_used_mib: Swap in use, zram included.
        swap_total_mib: Swap.
        swap_cached_mib: Swap that is in memory as well.
        cores: Cores; None for one that is switched off.
        gpu_load_percent: Load of the GPU (GR3D), relative to its frequency.
        gpu_mhz: Its frequency; the highest of its clusters' where they are printed apart.
        engines: Other engines, as printed: ``EMC_FREQ``: ``3%@1600``, ``NVENC``: ``off``.
        temperatures_c: Temperatures by zone. ``PMIC`` is a constant on some boards, not a measurement. Sensors of
            parts without power are left out.
        rails_mw: Power by rail. Inputs without a connection are left out.
        unparsed: Parts that this parser does not know.
    """

    text: str
    ram_used_mib: int | None = None
    ram_total_mib: int | None = None
    largest_free_block_mib: float | None = None
    largest_free_blocks: int | None = None
    swap_used_mib: int | None = None
    swap_total_mib: int | None = None
    swap_cached_mib: int | None = None
    cores: tuple[CoreLoad | None, ...] = ()
    gpu_load_percent: int | None = None
    gpu_mhz: int | None = None
    engines: dict[str, str] = {}
    temperatures_c: dict[str, float] = {}
    rails_mw: dict[str, Rail] = {}
    unparsed: tuple[str, ...] = ()


_CORE = r"(?:off|\d{1,9}%(?:@\d{1,9})?)"

# Tried in this order at each part of a line in which every run of spaces is one space.
_PARTS = {
    "time": re.compile(r"\d\d-\d\d-\d{4} \d\d:\d\d:\d\d"),
    "ram": re.compile(r"RAM (\d{1,9})/(\d{1,9})MB ?\(lfb (\d{1,9})x(\d{1,9})([kM])B\)"),
    "swap": re.compile(r"SWAP (\d{1,9})/(\d{1,9})MB ?\(cached (\d{1,9})MB\)"),
    "iram": re.compile(r"IRAM (\d+/\d+kB ?\(lfb \d+kB\))"),
    "cores": re.compile(rf"(?:CPU|cpu) \[({_CORE}(?:,{_CORE})*)\](?:@(\d{{1,9}}))?"),
    "gpu": re.compile(r"GR3D(?:_FREQ)? (\d{1,9})%(?:@(?:\[([\d,]{1,60})\]|(\d{1,9})))?"),
    "mts": re.compile(r"MTS (fg \d+% bg \d+%)"),
    "temperature": re.compile(r"(\w+)@(-?\d{1,9}(?:\.\d{1,9})?)C"),
    "rail": re.compile(r"([A-Za-z]\w*) (-?\d{1,9})(?:mW)?/(-?\d{1,9})(?:mW)?"),
    "engine": re.compile(r"([A-Z][A-Z0-9_]*) (off|\d+%(?:@(?:\[[\d,]*\]|\d+))?|\d+)"),
}


def read_tegrastats(tree: Tree) -> TegraStats | None:
    """Run tegrastats until it has printed a line, which takes about its interval; None where it is not installed."""
    output = run_command(tree, "tegrastats", "--interval", "200", lines=1, timeout_s=TIMEOUT_S)
    if not output:  # not installed, or named already
        return None
    stats = parse_tegrastats(output.partition("\n")[0])
    if stats.ram_total_mib is None:
        tree.skip("tegrastats", f"not understood: {stats.text!r}")
        return None
    return stats


def parse_tegrastats(line: str) -> TegraStats:
    """The parts of a line, whatever release printed it."""
    text = " ".join(line[:_LINE_LIMIT].split())
    found: dict[str, Any] = {"engines": {}, "temperatures_c": {}, "rails_mw": {}}
    unparsed = []
    at = 0
    while at < len(text):
        kind, match = _next(text, at)
        if match is None:
            end = text.find(" ", at)
            end = len(text) if end < 0 else end
            unparsed.append(text[at:end])
            at = end + 1
            continue
        at = match.end() + 1
        if kind == "ram":
            used, total, blocks, size = map(int, match.groups()[:4])
            found.update(ram_used_mib=used, ram_total_mib=total, largest_free_blocks=blocks)
            found["largest_free_block_mib"] = size / 1024 if match[5] == "k" else float(size)
        elif kind == "swap":
            used, total, cached = map(int, match.groups())
            found.update(swap_used_mib=used, swap_total_mib=total, swap_cached_mib=cached)
        elif kind == "cores":
            found["cores"] = tuple(_core(core, match[2]) for core in match[1].split(","))
        elif kind == "gpu":
            clusters = [int(mhz) for mhz in (match[2] or match[3] or "").split(",") if mhz]
            found.update(gpu_load_percent=int(match[1]), gpu_mhz=max(clusters, default=None))
        elif kind == "temperature":
            if float(match[2]) > _OFF_C:
                found["temperatures_c"][match[1]] = float(match[2])
        elif kind == "rail":
            if match[1] != _UNCONNECTED:
                found["rails_mw"][match[1]] = Rail(int(match[2]), int(match[3]))
        elif kind in ("engine", "iram", "mts"):
            name, value = match.groups() if kind == "engine" else (kind.upper(), match[1])
            found["engines"][name] = value
    return TegraStats(text=text, unparsed=tuple(unparsed), **found)


def _next(text: str, at: int) -> tuple[str, re.Match[str] | None]:
    for kind, part in _PARTS.items():
        match = part.match(text, at)
        if match is not None and text[match.end() : match.end() + 1] in ("", " "):
            return kind, match
    return "", None


def _core(text: str, common_mhz: str | None) -> CoreLoad | None:
    if text == "off":
        return None
    load, _, own_mhz = text.partition("%@")
    mhz = own_mhz or common_mhz
    return CoreLoad(int(load.rstrip("%")), int(mhz) if mhz else None)
