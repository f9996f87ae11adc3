"""Options that say how much others may learn of a device, and the job's settings that follow from them."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fleetune.server.job import JobPrivacy

log = logging.getLogger(__name__)

DELTA, CLIP, GATE_CLIP = 1e-5, 0.5, 0.02
"""Defaults. The clips are about the norms of an update with the other defaults, of the expert and of the gate."""


def add_privacy_options(parser: argparse.ArgumentParser) -> None:
    """``--dp-epsilon`` and its companions."""
    group = parser.add_argument_group(
        "what others may learn of a device",
        "Differential privacy of whole devices: each cuts its update to a norm and adds noise before anything leaves "
        "it. With either of the first two options. Only factor B of the adapters and the head are trained together "
        "then, and no device tells losses, accuracies or how many samples it has. See docs/privacy.md.",
    )
    group.add_argument(
        "--dp-epsilon",
        type=float,
        metavar="E",
        help="as much noise as gives each device this ε after all rounds, with --quorum devices in each: whatever one "
        "device learned changes the odds of any outcome by at most e^ε. 1 is strong, 8 weak",
    )
    group.add_argument("--dp-noise", type=float, metavar="Z", help="or this much noise: its deviation over the clip")
    group.add_argument(
        "--dp-against",
        choices=("model", "device", "aggregator"),
        default="device",
        help="against whom ε is meant: whoever has the model; another device, which also knows its own noise; or the "
        "aggregator and whoever reads along, who see each device alone: that takes √devices times the noise (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--dp-delta",
        type=float,
        metavar="D",
        help=f"probability that ε does not hold; far below one over the number of devices (default: {DELTA:g})",
    )
    group.add_argument(
        "--dp-clip",
        type=float,
        metavar="C",
        help="L2 norm that an update is cut to. It does not change ε: smaller is less noise and less learned. A "
        f"device's log has the norms of its updates: the median is a good choice (default: {CLIP:g})",
    )
    group.add_argument(
        "--dp-gate-clip", type=float, metavar="C", help=f"the same for the gate in stage 2 (default: {GATE_CLIP:g})"
    )
    group.add_argument(
        "--report-accuracy",
        action="store_true",
        help="have devices tell their accuracies on test samples when the job ends; no noise covers these",
    )


def read_privacy(args: argparse.Namespace, rounds: Mapping[str, int], devices: int) -> JobPrivacy | None:
    """What the options ask for; None if they ask for nothing.

    Args:
        args: Values of the options.
        rounds: Stage → rounds in which updates come.
        devices: Devices that answer each round, at least.

    Raises:
        ConfigError: An option is out of range, or says nothing without another, or a package is missing.
    """
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.tools.require import require_accountant

    own = {name: getattr(args, name) for name in ("dp_epsilon", "dp_noise", "dp_delta", "dp_clip", "dp_gate_clip")}
    for name, value in own.items():
        if value is not None and not (0 < value < math.inf and (name != "dp_delta" or value < 1)):
            wanted = "a number between 0 and 1" if name == "dp_delta" else "a finite number above zero"
            raise ConfigError(f"--{name.replace('_', '-')}: {value} is out of range", f"use {wanted}")
    if args.dp_epsilon is None and args.dp_noise is None:
        given = [name for name, value in {**own, "report_accuracy": args.report_accuracy or None}.items() if value]
        if given:
            raise ConfigError(
                f"--{given[0].replace('_', '-')}: without noise it says nothing", "add --dp-epsilon or --dp-noise"
            )
        return None
    if args.dp_epsilon is not None and args.dp_noise is not None:
        raise ConfigError("--dp-epsilon and --dp-noise: one follows from the other", "give one of them")
    require_accountant()

    from fleetune.server.accountant import noise_for
    from fleetune.server.job import JobPrivacy
    from fleetune.server.privacy import expected, others

    delta, updates = args.dp_delta or DELTA, sum(rounds.values())
    noise = args.dp_noise
    if noise is None:
        seen = {"model": devices, "device": others(devices), "aggregator": 1}[args.dp_against]
        noise = noise_for(args.dp_epsilon, delta, updates, seen)
    clip, gate_clip = args.dp_clip or CLIP, args.dp_gate_clip or GATE_CLIP
    privacy = JobPrivacy(noise, clip, gate_clip, delta, args.report_accuracy)
    guarantee = expected(privacy, updates, devices)
    if guarantee is not None:
        log.info("updates are private; if all goes as planned, %s", guarantee.in_words())
    return privacy
