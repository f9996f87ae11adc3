"""Progressive activation: how deep the fleet may train in the next round."""

from __future__ import annotations

from collections.abc import Sequence

from fleetune.server.job import ScheduleSettings


def scheduled_depth(results: Sequence[float], settings: ScheduleSettings, max_depth: int) -> int:
    """Depth of the round that follows these validation results.

    The queue holds the last ``window`` results. When it is full and their mean gain (last minus first, over the
    steps between them) is below ``threshold``, what is active has learned what it can: ``step`` more blocks join and
    the queue starts over. The paper names the capability queue; its rule is Fleetune's.

    Args:
        results: Mean validation accuracy of the fleet after each round so far.
        settings: The schedule.
        max_depth: Depth beyond which it does not go.
    """
    depth, queue = settings.start, list[float]()
    for result in results:
        queue = [*queue, result][-settings.window :]
        if len(queue) == settings.window and settings.window > 1:
            gain = (queue[-1] - queue[0]) / (settings.window - 1)
            if gain < settings.threshold:
                depth, queue = depth + settings.step, []
    return min(depth, max_depth)
