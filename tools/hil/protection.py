"""Protections, and how each is switched off: a test of a fault that passes even then tests nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import write_atomic
from fleetune.server.authority.founding import BROKER_FOLDER
from fleetune.server.authority.mosquitto import ACL
from fleetune.tools.hil.device import SCRATCH, DeviceUnderTest
from fleetune.tools.places import AGENT
from fleetune.tools.rig import Rig


class Protection(Protocol):
    """Something that protects a fleet."""

    @property
    def name(self) -> str:
        """What it is called."""

    def off(self, device: DeviceUnderTest, rig: Rig) -> AbstractContextManager[None]:
        """Switch it off for as long as the block lasts."""


@dataclass(frozen=True)
class KitLine:
    """A line of the kit.

    Attributes:
        name: What it is called.
        file: Where it is, below Fleetune's folder in the kit.
        line: The line, without its indentation.
        instead: What stands in its place where the protection is off.
    """

    name: str
    file: str
    line: str
    instead: str

    @contextmanager
    def off(self, device: DeviceUnderTest, rig: Rig) -> Iterator[None]:  # noqa: ARG002
        """Mount a changed file over the kit's own: nothing is written to the kit, and a power cut ends it.

        The mount stays: `DeviceUnderTest.restore` takes it away with all else that a test left, such as a full disk,
        and starts the agent anew.

        Raises:
            ConfigError: The board's kit has no such line: it is another version than this one.
        """
        place = device.run(f"ls {device.kit}/lib/python3*/site-packages/fleetune/{self.file}").strip()
        lines = device.get(place).decode().split("\n")
        found = [number for number, line in enumerate(lines) if line.strip() == self.line]
        if len(found) != 1:
            raise ConfigError(
                f"{place} on {device.name} has {len(found)} lines {self.line!r}",
                "give the board this version of Fleetune",
            )
        (number,) = found
        lines[number] = lines[number].replace(self.line, self.instead)
        changed = f"{SCRATCH}/without/{self.file}"
        device.put(changed, "\n".join(lines).encode())
        device.run(f"mount --bind {changed} {place}")
        device.restart_agent()
        yield


@dataclass(frozen=True)
class AgentOptions:
    """A default of the agent's.

    Attributes:
        name: What it is called.
        options: Of ``fleetune agent``, with which it is off.
    """

    name: str
    options: tuple[str, ...]

    def off(self, device: DeviceUnderTest, rig: Rig) -> AbstractContextManager[None]:  # noqa: ARG002
        """Run the agent with the options."""
        return device.agent_with(*self.options)


@dataclass(frozen=True)
class StartsAtBoot:
    """That the agent's unit is wanted at boot."""

    name: str = "it starts at boot"

    @contextmanager
    def off(self, device: DeviceUnderTest, rig: Rig) -> Iterator[None]:  # noqa: ARG002
        """Let nothing want it."""
        wanted = f"/etc/systemd/system/multi-user.target.wants/{AGENT}"
        device.run(f"mv {wanted} {wanted}.off; sync")
        try:
            yield
        finally:
            device.run(f"mv {wanted}.off {wanted}")
            device.restart_agent()


@dataclass(frozen=True)
class ConsoleWakes:
    """The strategy's care for a serial console."""

    name: str = "a console is woken"

    @contextmanager
    def off(self, device: DeviceUnderTest, rig: Rig) -> Iterator[None]:  # noqa: ARG002
        """Take a console as it is."""
        device.strategy.wake_console = False
        try:
            yield
        finally:
            device.strategy.wake_console = True


@dataclass(frozen=True)
class BrokerRights:
    """The broker's list of who may say what."""

    name: str = "the broker's rights"

    @contextmanager
    def off(self, device: DeviceUnderTest, rig: Rig) -> Iterator[None]:  # noqa: ARG002
        """Let everybody say all."""
        file = rig.authority / BROKER_FOLDER / ACL
        kept = file.read_bytes()
        write_atomic(file, b"pattern readwrite #\n")
        rig.broker.close()
        rig.broker.start()
        try:
            yield
        finally:
            write_atomic(file, kept)
            rig.broker.close()
            rig.broker.start()
