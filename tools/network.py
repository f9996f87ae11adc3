"""A network of its own for each device: a namespace, joined to a bridge by a wire that can be cut or made slow."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fleetune.edge.protocol.errors import ConfigError
from fleetune.tools.programs import find_program, run_program

FAST_KBIT = 10_000
"""Rate of a wire that nobody has made slow: tensors still take a moment, in which a fault can come."""

_PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux"}
_NAMES = re.compile(r"\bftc([0-9]+)")


def check_networks() -> None:
    """See that networks can be made, before anything long is begun.

    Raises:
        ConfigError: This is not root, or a program is missing.
    """
    if os.geteuid() != 0:
        raise ConfigError("networks are made here, which only root may", "start it with sudo, or in a container")
    for program, package in _PROGRAMS.items():
        find_program(program, package)


class Network:
    """A bridge in this namespace, and a namespace for each device.

    Args:
        devices: Their ids.

    Attributes:
        address: Of the bridge, where devices find the broker.

    Raises:
        ConfigError: A program is missing, or this is not root.
        RunFailedError: The kernel does not do it.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        check_networks()
        self._ip, self._tc, self._nsenter = (find_program(*needed) for needed in _PROGRAMS.items())
        self._sweep()
        self._name, self._devices = f"ftc{os.getpid()}", tuple(devices)
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        net = self._free_net()
        self.address = f"{net}.1"
        self._do("link", "add", self._name, "type", "bridge")
        self._do("addr", "add", f"{self.address}/24", "dev", self._name)
        self._do("link", "set", self._name, "up")
        for number, device in enumerate(self._devices, start=2):
            space, wire = self._space(device), self._wire(device)
            self._do("netns", "add", space)
            self._do("link", "add", wire, "type", "veth", "peer", "name", "wire", "netns", space)
            self._do("link", "set", wire, "master", self._name, "up")
            self._do("-n", space, "addr", "add", f"{net}.{number}/24", "dev", "wire")
            self._do("-n", space, "link", "set", "wire", "up")
            self._do("-n", space, "link", "set", "lo", "up")

    def _free_net(self) -> str:
        """A net of those that are set aside for benchmarks (RFC 2544)."""
        routes = self._do("route", "show")
        nets = (f"198.{18 + number // 256 % 2}.{number % 256}" for number in range(os.getpid(), os.getpid() + 512))
        return next(net for net in nets if f"{net}.0/24" not in routes)

    def _space(self, device: str) -> str:
        return f"{self._name}-{device}"

    def _wire(self, device: str) -> str:
        return f"{self._name}w{self._devices.index(device)}"  # 15 letters at most

    def command(self, device: str, command: Sequence[str]) -> list[str]:
        """The same command in a device's namespace."""
        return [self._nsenter, f"--net=/run/netns/{self._space(device)}", *command]

    def reset(self) -> None:
        """Every wire whole and fast."""
        for device in self._devices:
            self.mend(device)
            self.slow(device, FAST_KBIT)

    def cut(self, device: str) -> None:
        """Nothing comes through."""
        self._do("link", "set", self._wire(device), "down")

    def mend(self, device: str) -> None:
        """The wire is whole again."""
        self._do("link", "set", self._wire(device), "up")

    def slow(self, device: str, kbit: int) -> None:
        """Let so many kbit/s through, in either direction."""
        limits = ("root", "tbf", "rate", f"{kbit}kbit", "burst", "16kb", "latency", "400ms")
        self._run(self._tc, "qdisc", "replace", "dev", self._wire(device), *limits)
        self._run(self._tc, "-n", self._space(device), "qdisc", "replace", "dev", "wire", *limits)

    def close(self) -> None:
        """Take all of it away."""
        self._remove({self._name})

    def _sweep(self) -> None:
        """Take away what processes that were killed have left."""
        found = {match[0]: int(match[1]) for match in _NAMES.finditer(self._do("netns") + self._do("-br", "link"))}
        self._remove({name for name, pid in found.items() if not Path(f"/proc/{pid}").exists()})

    def _remove(self, names: set[str]) -> None:
        for line in self._do("-br", "link").splitlines():  # first these: a namespace takes its time to let go of them
            link = line.split()[0].partition("@")[0]
            if (match := _NAMES.match(link)) is not None and match[0] in names:
                self._do("link", "del", link)
        for line in self._do("netns").splitlines():
            if (space := line.split()[0]).partition("-")[0] in names:
                self._do("netns", "del", space)

    def _do(self, *arguments: str) -> str:
        return self._run(self._ip, *arguments)

    @staticmethod
    def _run(*command: str) -> str:
        return run_program(command, "the kernel must have bridges, veth, network namespaces and tbf")
