"""The systems that boards run: what a kit is built for."""

from __future__ import annotations

from dataclasses import dataclass

from fleetune.edge.protocol.errors import ConfigError


@dataclass(frozen=True)
class Tier:
    """One kind of system, always arm64.

    Attributes:
        name: ``t1`` to ``t4``.
        system: What runs on the board.
        python: Full version of its Python; wheels and the kit's folders go by its first two numbers.
        glibc: Version of its C library: no wheel may ask for a newer one.
        unused: Packages that others declare and nothing on a device imports. They are left out.
    """

    name: str
    system: str
    python: str
    glibc: tuple[int, int]
    unused: frozenset[str] = frozenset()

    @property
    def minor(self) -> str:
        """Such as ``3.10``."""
        return self.python.rpartition(".")[0]

    @property
    def environment(self) -> dict[str, str]:
        """What the markers of requirements ask for (PEP 508)."""
        return {
            "implementation_name": "cpython",
            "implementation_version": self.python,
            "os_name": "posix",
            "platform_machine": "aarch64",
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": self.python,
            "python_version": self.minor,
            "sys_platform": "linux",
        }

    @property
    def platforms(self) -> tuple[str, ...]:
        """Tags of the wheels that run there (PEP 600)."""
        major, newest = self.glibc
        return ("manylinux2014_aarch64", *(f"manylinux_{major}_{minor}_aarch64" for minor in range(17, newest + 1)))


# onnxruntime 1.23 declares what its shape inference in Python uses: 70 MB for a module that no device imports.
_OLD_RUNTIME = frozenset({"coloredlogs", "humanfriendly", "mpmath", "sympy"})

TIERS = {
    tier.name: tier
    for tier in (
        Tier("t1", "Ubuntu 22.04 on L4T r32 (Jetson Nano)", "3.10.12", (2, 35), _OLD_RUNTIME),
        Tier("t2", "JetPack 6 (Orin)", "3.10.12", (2, 35), _OLD_RUNTIME),
        Tier("t3", "JetPack 7 (Orin)", "3.12.3", (2, 39)),
        Tier("t4", "Debian 12, Raspberry Pi OS 12, and what is emulated", "3.11.2", (2, 36)),
    )
}
"""Name → tier."""


def find_tier(name: str) -> Tier:
    """The tier of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in TIERS:
        known = "; ".join(f"{tier.name}: {tier.system}" for tier in TIERS.values())
        raise ConfigError(f"the tier {name!r} is unknown", f"choose from {known}")
    return TIERS[name]
