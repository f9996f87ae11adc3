"""The systemd unit of an agent."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

_UNIT = """\
# Install:  sudo mkdir -p {state}
#           fleetune agent … --unit | sudo tee /etc/systemd/system/fleetune-agent.service
#           sudo systemctl daemon-reload && sudo systemctl enable --now fleetune-agent
# Look:     systemctl status fleetune-agent; journalctl -fu fleetune-agent

[Unit]
Description=Fleetune agent of {device}
Wants=network-online.target
After=network-online.target
# A device that is far away is never given up.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
# It is up once it knows what training costs here: minutes, at the first start.
TimeoutStartSec=infinity
# Between two signs of life lies one step of training, or one pass through a block.
WatchdogSec=300
Restart=always
RestartSec=1
# What no restart mends: the command line, a file that was written by hand, the pack, the budget, the data.
RestartPreventExitStatus=2 10 13 14 17 18 25 26 28
# It gives way to what the machine is for.
Nice=10
NoNewPrivileges=true
PrivateTmp=true
ProtectHome=read-only
ProtectSystem=strict
ReadWritePaths={state}

[Install]
WantedBy=multi-user.target
"""


def systemd_unit(device: str, command: Sequence[str], state: Path) -> str:
    """The text of a unit that runs an agent.

    Args:
        device: Its id.
        command: Its command line, with absolute paths.
        state: Its state folder, the only place that it writes to.
    """
    return _UNIT.format(device=device, command=" ".join(map(_quoted, command)), state=_quoted(str(state)))


def _quoted(word: str) -> str:
    """A word as both systemd and a shell read it."""
    return shlex.quote(word).replace("%", "%%").replace("$", "$$")
