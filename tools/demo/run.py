"""The demo from beginning to end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import RunFailedError
from fleetune.edge.protocol.files import write_atomic
from fleetune.profiles.fleet import Fleet, read_fleet
from fleetune.server.broker import free_port
from fleetune.tools.demo.folder import Kit, RunFolder, prepare
from fleetune.tools.demo.page import write_page
from fleetune.tools.demo.report import Main, RunFacts, build_report
from fleetune.tools.demo.task import Task
from fleetune.tools.demo.watch import Watch
from fleetune.tools.processes import Processes, processes


@dataclass(frozen=True)
class DemoOptions:
    """What to run.

    Attributes:
        task: Backbone and data.
        method: What the report is about: ``fedms`` or ``pfedmoe``.
        jobs: Options of ``fleetune serve`` that say what is trained.
        max_depth: Deepest that any device may train; all blocks if None.
        epochs: Local epochs a round.
        batch: Samples an optimiser step.
        broker: A broker to use; the embedded one if None.
        record: All options, as they are compared when a run goes on and shown in the report.
    """

    task: Task
    method: Main
    jobs: list[str]
    max_depth: int | None
    epochs: int
    batch: int
    broker: BrokerAddress | None
    record: dict[str, Any]


def run_demo(folder: RunFolder, options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run a fleet on this machine and write its report.

    Raises:
        FleetuneError: Something is missing or failed; what was done so far stays in the folder.
    """
    again = folder.claim(options.record)
    what = "goes on with an interrupted run" if again else "a new run"
    console.print(f"{folder.path}: {what}", soft_wrap=True)
    start = time.monotonic() - folder.seconds
    try:
        report = _run(folder, options, console, start)
    finally:
        folder.save_seconds(time.monotonic() - start)
    write_page(report, folder.page)
    write_atomic(folder.report, json.dumps(report, indent=1).encode())
    return report


def _run(folder: RunFolder, options: DemoOptions, console: Console, start: float) -> dict[str, Any]:
    with console.status("starts") as status:
        said = ""

        def say(what: str) -> None:
            nonlocal said
            step = what.partition(" (")[0]
            if console.is_terminal:
                status.update(what)
            elif step != said:
                said = step
                _print_line(console, start, step)

        kits = prepare(
            folder,
            options.task,
            mixed=options.method == "pfedmoe",
            max_depth=options.max_depth,
            epochs=options.epochs,
            batch=options.batch,
            say=say,
        )
    fleet = read_fleet(folder.fleet)
    packs = {kit: Pack.open(kit.pack) for kit in dict.fromkeys(kits.values())}
    before = {pack.sha256: pack.weights_sha256() for pack in packs.values()}
    with processes() as running:
        address = options.broker or _start_broker(folder, running)
        with Watch(address, fleet) as watch:
            _start_fleet(folder, options, kits, fleet, address, running)
            _follow(watch, running, console, start)
        running.stop([device.id for device in fleet.devices])
    facts = RunFacts(
        seconds=time.monotonic() - start,
        seed=options.task.seed,
        broker=f"rumqttd (iotcore {version('iotcore')})" if options.broker is None else "external",
        url=str(address),
        method=options.method,
        sha256_before=before,
        sha256_after={pack.sha256: Pack.open(kit.pack).weights_sha256() for kit, pack in packs.items()},
        settings=options.record,
    )
    task = options.task
    data = {"name": task.data, "train": task.train, "val": task.val, "test": task.test, "classes": task.classes}
    return build_report(folder.aggregator, fleet, {device: packs[kit] for device, kit in kits.items()}, data, facts)


def _start_broker(folder: RunFolder, running: Processes) -> BrokerAddress:
    port = free_port()
    running.start("broker", folder.log("broker"), ["broker", "--port", str(port)])
    return BrokerAddress("127.0.0.1", port)


def _start_fleet(
    folder: RunFolder,
    options: DemoOptions,
    kits: Mapping[str, Kit],
    fleet: Fleet,
    address: BrokerAddress,
    running: Processes,
) -> None:
    common = ["--fleet", str(folder.fleet), "--broker", str(address)]
    common += [] if address.is_local else ["--insecure"]  # messages are signed all the same
    serve = ["serve", *common, "--pack", str(folder.pack), "--state", str(folder.aggregator)]
    running.start(
        "aggregator", folder.log("aggregator"), [*serve, "--classes", str(options.task.classes), *options.jobs]
    )
    for device in fleet.devices:
        data, state, kit = folder.data(device.id, options.task.suffix), folder.device(device.id), kits[device.id]
        agent = ["agent", *common, "--pack", str(kit.pack), "--id", device.id, "--data", str(data)]
        agent += ["--state", str(state), "--threads", "1", "--costs", str(kit.costs)]
        running.start(device.id, folder.log(device.id), agent)


def _follow(watch: Watch, running: Processes, console: Console, start: float) -> None:
    """Show the fleet until the aggregator is done: a live table, or a line for each round without a terminal."""
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while not running.ended("aggregator"):
            running.check()
            rounds = watch.update(timeout=0.5)
            if console.is_terminal:
                live.update(watch.render(), refresh=True)
            else:
                for line in rounds:
                    _print_line(console, start, line)


def _print_line(console: Console, start: float, line: str) -> None:
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    console.print(f"{minutes:2d}:{seconds:02d}  {line}", highlight=False, soft_wrap=True)


def print_summary(report: dict[str, Any], folder: RunFolder, console: Console) -> None:
    """What came out, in a few lines."""
    budgets = Table("device", box=box.SIMPLE, title="budgets", title_justify="left")
    for heading in ("active depth", "bound by", "peak / budget, MiB", "CPU s a round, most / budget"):
        budgets.add_column(heading, justify="right")
    names = list(report["summary"]["accuracy"])
    accuracy = Table("device", box=box.SIMPLE, title="accuracy on unseen samples", title_justify="left")
    for name in names:
        accuracy.add_column(name.replace("_", " "), justify="right")
    for device in report["devices"]:
        budgets.add_row(
            device["id"],
            f"{max(device['blocks_active'])} of {device['blocks_total']}",
            "schedule" if max(device["blocks_active"]) < device["plan"]["depth"] else device["plan"]["bound_by"],
            f"{device['peak_mib']:.0f} / {device['budget_mib']:.0f}",
            f"{max(device['cpu_s']):.1f} / {device['budget_cpu_s']:.1f}",
        )
        accuracy.add_row(device["id"], *(f"{device['accuracy'][name]:.3f}" for name in names))
    accuracy.add_row("mean", *(f"{report['summary']['accuracy'][name]:.3f}" for name in names), style="bold")
    console.print(budgets, accuracy, sep="\n")
    console.print(f"{report['seconds']:.0f} s; report: {folder.page} and {folder.report}", soft_wrap=True)


def check_report(report: dict[str, Any]) -> None:
    """Make sure that the run kept its promises.

    Raises:
        RunFailedError: A process exceeded its memory budget, or the backbone changed.
    """
    over = [device["id"] for device in report["devices"] if device["peak_mib"] > device["budget_mib"]]
    if over:
        raise RunFailedError(
            f"the memory budget of {', '.join(over)} was exceeded", "see report.json; please report this as a bug"
        )
    if any(backbone["sha256_before"] != backbone["sha256_after"] for backbone in report["backbones"]):
        raise RunFailedError("the backbone's weights changed during the run", "check the disk")
