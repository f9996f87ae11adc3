"""A board, as tests see it: what runs on it, what its agent says, and how it is brought back to a known state."""

from __future__ import annotations

import base64
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.edge.protocol.files import file_sha256
from fleetune.tools.places import AGENT, KITS, UPDATES
from fleetune.tools.waiting import wait_until

SCRATCH = "/run/fleetune-hil"
"""What a test leaves on a board lies here, or is a unit of this name: a power cut takes it away, too."""

UNIT = "fleetune-hil"
FILLER = "/var/lib/fleetune-hil.filler"
"""What fills the disk. It outlives a power cut."""

_QUIETLY = "exec </dev/null; export SYSTEMD_PAGER=cat PAGER=cat"
"""On a serial console a command has a terminal: it would open a pager there, or read what is typed after it."""

_DROP_IN = f"/run/systemd/system/{AGENT}.d/90-hil.conf"
_CLOCK_S = 60.0
"""Seconds that its clock may differ from this machine's between two tests."""

_PIECE = 1500
"""Bytes of a file in one command: a console's line has 4096 characters at most."""

_RESTORE = rf"""\
changed=
for unit in $(systemctl list-units --plain --no-legend --all '{UNIT}*' | cut -d' ' -f1); do
    systemctl stop "$unit"; systemctl reset-failed "$unit" 2>/dev/null; changed=yes
done
for place in $(cut -d' ' -f2 /proc/self/mounts | grep '/fleetune/'); do
    case "$(findmnt -no SOURCE "$place")" in *{SCRATCH.removeprefix("/run")}/*) umount "$place"; changed=yes;; esac
done
[ ! -e {_DROP_IN} ] || {{ rm {_DROP_IN}; systemctl daemon-reload; changed=yes; }}
[ ! -e {FILLER} ] || {{ rm {FILLER}*; changed=yes; }}
link=$(ip -o route show default | sed 's/.* dev \([^ ]*\).*/\1/')
[ -z "$link" ] || ! tc qdisc show dev "$link" | grep -q tbf || {{ tc qdisc del dev "$link" root; changed=yes; }}
for link in $(ls /sys/class/net); do
    [ "$link" = lo ] || ip link set "$link" up
done
rm -rf {SCRATCH}
[ -n "$changed" ] || systemctl is-active {AGENT}
date +%s
"""


class Commands(Protocol):
    """What labgrid's CommandProtocol has."""

    def run(self, cmd: str, *, timeout: float = ...) -> tuple[list[str], list[str], int]:
        """Run a command."""


class DeviceUnderTest:
    """One board of a lab.

    Args:
        name: Its id in the fleet.
        strategy: Its `FleetuneStrategy`.
        features: What it has, by its environment.

    Attributes:
        name: Its id in the fleet.
        features: What it has, by its environment; ``power`` if it can be cut, and ``console`` if it has a serial one.
        strategy: Its `FleetuneStrategy`.
        is_known: Whether no test has had it since it was brought into a known state.
    """

    def __init__(self, name: str, strategy: Any, features: frozenset[str]) -> None:
        self.name = name
        self.features = features | {name for name in ("power", "console") if getattr(strategy, name) is not None}
        self.strategy, self.is_known = strategy, False

    @property
    def _commands(self) -> Commands:
        commands: Commands = self.strategy.command
        return commands

    # --- commands and files -----------------------------------------------------------------------------------------

    def ask(self, command: str, *, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a shell command, as root, whatever it comes to; all that it says is its output, as on a console."""
        out, err, code = self._commands.run(f"{_QUIETLY}; {command}", timeout=timeout_s)
        return subprocess.CompletedProcess(command, code, "\n".join([*out, *err]))

    def run(self, command: str, *, timeout_s: float = 120.0) -> str:
        """Run a shell command that has to end well, and return what it prints.

        Raises:
            RunFailedError: It does not end well; with what it said.
        """
        answer = self.ask(command, timeout_s=timeout_s)
        if answer.returncode:
            raise RunFailedError(
                f"{self.name}: {command.strip()[:120]!r} ended with {answer.returncode}: {answer.stdout[-1000:]}",
                f"log in to {self.name}, and try it there",
            )
        return answer.stdout

    def python(self, script: str, *, timeout_s: float = 300.0) -> str:
        """Run a Python script with the board's own kit."""
        self.put(f"{SCRATCH}/script.py", script.encode())
        return self.run(f'"$({_KIT})/bin/python3" {SCRATCH}/script.py', timeout_s=timeout_s)

    def put(self, path: str, data: bytes) -> None:
        """Write a file, over any console."""
        place = shlex.quote(path)
        self.run(f"mkdir -p {shlex.quote(path.rpartition('/')[0])}; : >{place}")
        for start in range(0, len(data), _PIECE):
            piece = base64.b64encode(data[start : start + _PIECE]).decode("ascii")
            self.run(f"echo {piece} | base64 -d >>{place}")

    def get(self, path: str) -> bytes:
        """Read a file, over any console."""
        return base64.b64decode(self.run(f"base64 {shlex.quote(path)}"))

    def equip(self, files: Mapping[str, Path]) -> None:
        """Put files there that are missing, or others: path on the board → file."""
        for path, file in files.items():
            if self.ask(f"sha256sum {shlex.quote(path)}").stdout.partition(" ")[0] != file_sha256(file):
                self.put(path, file.read_bytes())
                self.run(f"chmod 0644 {shlex.quote(path)}")

    # --- units ------------------------------------------------------------------------------------------------------

    def unit(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a systemd unit."""
        said = self.run(f"systemctl show {unit} --property={','.join(names)}")
        return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)

    def start(self, name: str, command: str, *properties: str) -> None:
        """Start a transient unit; it ends with the test at the latest."""
        options = " ".join(f"--property={shlex.quote(one)}" for one in properties)
        self.run(f"systemd-run --quiet --unit={UNIT}-{name} {options} /bin/sh -c {shlex.quote(command)}")

    def stop(self, name: str) -> None:
        """Stop a transient unit."""
        self.ask(f"systemctl stop {UNIT}-{name}; systemctl reset-failed {UNIT}-{name}")

    # --- the agent --------------------------------------------------------------------------------------------------

    @property
    def says(self) -> str:
        """What the agent says of itself, as systemd shows it."""
        return self.unit(AGENT, "StatusText").get("StatusText", "")

    @property
    def restarts(self) -> int:
        """How often systemd had to start the agent anew."""
        return int(self.unit(AGENT, "NRestarts")["NRestarts"])

    @property
    def kit(self) -> str:
        """Folder of the kit that the agent runs."""
        process = self.unit(AGENT, "MainPID")["MainPID"]
        return self.run(f"tr '\\0' '\\n' </proc/{process}/cmdline | head -n1").strip().removesuffix("/bin/python3")

    def restart_agent(self, *, within_s: float = 300.0) -> None:
        """Start the agent anew, and wait until it is up.

        Raises:
            RunFailedError: It does not come up in time, or not at the first attempt.
        """
        self.run(f"systemctl reset-failed {AGENT}; systemctl restart --no-block {AGENT}")
        self.wait_for_agent(within_s=within_s)
        if attempts := self.restarts:
            raise RunFailedError(
                f"the agent of {self.name} came up at attempt {attempts + 1} only",
                f"see why: journalctl -u {AGENT} on {self.name}",
            )

    def wait_for_agent(self, *, within_s: float = 300.0) -> None:
        """Wait until the agent is up.

        Raises:
            RunFailedError: It is not, in time.
        """
        up = {"ActiveState": "active", "Job": ""}  # a job would be systemd's that has not stopped the one before
        self.wait_until(lambda: {"Job": "", **self.unit(AGENT, *up)} == up, "is up", within_s)

    def wait_until(self, is_so: Callable[[], bool], words: str, within_s: float) -> None:
        """Wait until something is so.

        Args:
            is_so: Asked again and again.
            words: What is waited for, such as "the agent of NAME … in time".
            within_s: Seconds.

        Raises:
            RunFailedError: It is not so in time.
        """

        def late() -> RunFailedError:
            return RunFailedError(
                f"the agent of {self.name} {words}: not in {within_s:.0f} s; it says: {self.says}",
                f"journalctl -u {AGENT} on {self.name}",
            )

        wait_until(is_so, within_s, late, every_s=1.0)

    def mark(self) -> str:
        """Now, in the journal."""
        said = self.run("journalctl --lines=0 --show-cursor --quiet")
        return said.rpartition("cursor: ")[2].strip()

    def log(self, since: str, unit: str = AGENT) -> str:
        """What a unit said after a mark."""
        return self.run(f"journalctl --unit={unit} --after-cursor={shlex.quote(since)} --output=cat --no-pager --quiet")

    @contextmanager
    def agent_with(self, *options: str) -> Iterator[None]:
        """The agent, with more options, as long as the block lasts."""
        command = self.unit(AGENT, "ExecStart")["ExecStart"].partition("argv[]=")[2].partition(" ;")[0]
        more = " ".join(shlex.quote(one) for one in options)
        self.put(_DROP_IN, f"[Service]\nExecStart=\nExecStart={command} {more}\n".encode())
        self.run("systemctl daemon-reload")
        self.restart_agent()
        try:
            yield
        finally:
            self.run(f"rm {_DROP_IN}; systemctl daemon-reload")
            self.restart_agent()

    # --- faults -----------------------------------------------------------------------------------------------------

    @property
    def link(self) -> str:
        """Its network interface."""
        return self.run("ip -o route show default").split(" dev ")[1].split()[0]

    @contextmanager
    def slow_link(self, rate: str) -> Iterator[None]:
        """What it sends goes out at a rate, such as ``16kbit``."""
        link = self.link
        self.run(f"tc qdisc replace dev {link} root tbf rate {rate} burst 2kb latency 2s")
        try:
            yield
        finally:
            self.run(f"tc qdisc del dev {link} root")

    def fill_disk(self, folder: str) -> None:
        """Leave nothing on the disk that a folder is on."""
        self.run(f"fallocate --length $(df --block-size=1 --output=avail {folder} | tail -n1) {FILLER}; sync")
        self.ask(f"dd if=/dev/zero of={FILLER}.rest bs=4096 2>/dev/null")  # and what is kept for root

    @contextmanager
    def clock(self, when: str) -> Iterator[None]:
        """Its clock is wrong, and nobody sets it right."""
        before, start = int(self.run("date +%s")), time.monotonic()
        self.run(f"systemctl stop systemd-timesyncd; date --set={shlex.quote(when)}")
        try:
            yield
        finally:
            self.run(f"date --set=@{before + time.monotonic() - start:.0f}; systemctl start systemd-timesyncd")

    # --- state ------------------------------------------------------------------------------------------------------

    def bring(self, status: str) -> None:
        """Bring it to a state of its strategy."""
        self.strategy.transition(status)

    def cut_power(self) -> None:
        """Cut the power, put it on again, and wait until the board is up."""
        self.strategy.cut_power()

    def restore(self) -> None:
        """Take away what a test left, whoever left it, and see that the agent is up.

        Raises:
            RunFailedError: It does not come up, or answers what nobody asked.
        """
        self.bring("provisioned")
        said = self.run(_RESTORE)
        *state, now = said.split() or [""]
        if not now.isdecimal():
            raise RunFailedError(
                f"{self.name} was asked for its time, and says {said[-200:]!r}", "see who else writes to its console"
            )
        is_wrong = abs(int(now) - time.time()) > _CLOCK_S
        if is_wrong:
            self.run(f"date --set=@{time.time():.0f}")
        if is_wrong or not state:
            self.restart_agent()
        elif state != ["active"]:
            self.wait_for_agent()
        self.is_known = True


_KIT = f'k=/{UPDATES}/current; [ -x "$k/bin/python3" ] || k=/{KITS}/current; readlink -f "$k"'
