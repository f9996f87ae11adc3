"""Whoever is revoked is waited for no more; the rounds of the others go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.server.authority.desk import Desk
from fleetune.server.journal import FILE, Started, read_records
from support.attacklab import HONEST, MALLORY, Lab, attack_lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with attack_lab(tmp_path) as lab:
        yield lab


def test_a_round_that_waits_for_a_device_closes_when_it_is_revoked(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.patience = 600.0
    lab.start(*HONEST, MALLORY)
    lab.await_round(1)
    for device in HONEST:
        lab.workers[device].may.release(10)
    lab.wait(lambda: {record.manifest.device for record in lab.accepted() if record.into == 1} == set(HONEST))
    with pytest.raises(AssertionError, match="did not come"):
        lab.wait(lambda: lab.workers[HONEST[0]].begun[-1].version > 1, seconds=1.5)  # it waits
    with lab.authority() as authority:
        authority.revoke(MALLORY)
        Desk(authority, authority.make_member("authority", lab.folder / "desk"), lab.secured.address).announce({})
    lab.finish()
    assert lab.came_out_right()
    assert caplog.text.count(f"{MALLORY} is revoked; no round waits for it") == 1


def test_an_aggregator_that_starts_later_does_not_wait_either(lab: Lab) -> None:
    lab.patience = 600.0
    with lab.authority() as authority:
        authority.revoke(MALLORY)
        authority.make_member("aggregator", lab.secured.identities / "aggregator")
    lab.start(*HONEST)
    lab.await_round(1)
    lab.finish()
    assert lab.came_out_right()
    assert isinstance(next(read_records(lab.folder / "aggregator" / FILE)), Started)
