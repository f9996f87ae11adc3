"""Devices whose updates were refused for cause, again and again: the run goes on without them.

One bad update is refused and costs nobody anything; a device that sends nothing else keeps rounds waiting for it. What
may happen to a good device does not count: damage on the way, an update that comes late, an aggregator without room.
"""

from __future__ import annotations

import logging
import time

from fleetune.server.journal import Journal, Quarantined, Readmitted, Refused
from fleetune.server.registry import Registry
from fleetune.server.store import Store

log = logging.getLogger(__name__)

REASON = "quarantined"
"""Why an update of such a device is refused, whatever is in it."""

FOR_CAUSE = frozenset(
    {
        *("malformed", "payload-too-large", "chunk-too-large", "too-many-chunks"),
        *("unknown-codec", "too-many-tensors", "duplicate-tensor", "unexpected-tensor", "wrong-dtype", "wrong-shape"),
        *("not-finite", "norm-outlier", "no-samples", "not-private", "wrong-backbone", "wrong-topic"),
    }
)
"""Reasons that no good device gives, each found in what the device has signed: nobody can give one in its name."""


class Quarantine:
    """Who is kept out of a run; it follows from the journal.

    Args:
        journal: Where it is kept.
        store: Knows what the journal says.
        registry: Is told, so that no round waits for who is kept out.
        after: Refusals for cause after which a device is.
    """

    def __init__(self, journal: Journal, store: Store, registry: Registry, after: int) -> None:
        self._journal, self._store, self._registry, self._after = journal, store, registry, after
        self._strikes = store.strikes()
        self._struck: dict[str, set[str]] = {}  # of each device no more than put it into quarantine
        for device, reason in store.quarantined().items():
            registry.keep_out(device, reason)

    def holds(self, device: str) -> bool:
        """Whether a device is kept out."""
        return device in self._registry.kept_out

    def strike(self, device: str, update: str, reason: str) -> bool:
        """An update of a device was refused. However often it comes, a repeated one too, it counts once.

        Returns:
            Whether that was once too often: from now on the device is kept out.
        """
        struck = self._struck.setdefault(device, set())
        if reason not in FOR_CAUSE or self.holds(device) or update in struck:
            return False
        struck.add(update)
        self._strikes[device] = self._strikes.get(device, 0) + 1
        enough = self._strikes[device] >= self._after
        now = time.time()
        records = [Refused(device, reason, now), *([Quarantined(device, reason, now)] if enough else ())]
        try:
            self._journal.append(*records, sync=enough)
        except OSError as error:
            log.error("%s: %s; a restart forgets this refusal", self._journal.folder, error.strerror)  # noqa: TRY400
        else:
            self._store.add(records, self._journal.size)
        if enough:
            self._registry.keep_out(device, reason)
            log.warning(
                "%s is quarantined: %d of its updates were refused, the last one as %s; mend it, then start "
                "`fleetune serve` with --readmit %s",
                *(device, self._strikes[device], reason, device),
            )
        return enough

    def readmit(self, device: str) -> None:
        """Let a device in again, as if nothing had happened.

        Raises:
            OSError: There is no room in the journal.
        """
        if not self.holds(device):
            log.info("%s is not in quarantine", device)
            return
        record = Readmitted(device, time.time())
        self._journal.append(record)
        self._store.add([record], self._journal.size)
        self._strikes.pop(device, None)
        self._struck.pop(device, None)
        self._registry.let_in(device)
        log.info("%s is out of quarantine", device)
