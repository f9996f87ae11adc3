"""Rounds of FedAvg that train nothing, as a ServerApp: run by Flower's interpreter."""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Write a line at each round's end: seconds of the monotonic clock, or what went wrong."""
    config = context.run_config
    with Path(config["ends"]).open("a", encoding="utf-8", buffering=1) as ends:
        try:
            _rounds(grid, config["devices"], config["rounds"], config["poll-s"], config["tensors"], ends)
        except Exception as error:
            ends.write(f"error: {error!r}\n")
            raise


def _rounds(grid, devices, rounds, poll_s, tensors, ends) -> None:  # type: ignore[no-untyped-def]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices)
    with np.load(tensors) as file:
        arrays = ArrayRecord(list(file.values()))
    for number in range(1, rounds + 1):
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        replies = _send_and_receive(grid, messages, poll_s)
        if wrong := [reply.error.reason for reply in replies if reply.has_error()]:
            raise RuntimeError(wrong[0])
        averaged, _ = strategy.aggregate_train(number, replies)
        assert averaged is not None
        arrays = averaged
        ends.write(f"{time.monotonic()}\n")


def _send_and_receive(grid: Grid, messages: Iterable[Message], poll_s: float) -> list[Message]:
    """``Grid.send_and_receive``, which sleeps for three seconds before it looks again."""
    waiting, replies = set(grid.push_messages(messages)), []
    while waiting:
        time.sleep(poll_s)
        found = list(grid.pull_messages(waiting))
        waiting -= {reply.metadata.reply_to_message_id for reply in found}
        replies += found
    return replies
