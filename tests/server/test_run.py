"""The identity of a run: a folder goes on with what it was started with, or says what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import RunFolderError
from fleetune.server.job import Job, RuleSettings
from fleetune.server.run import identify

JOB = Job(
    id="fedms", method="fedms", backbone="b", quantisation="nf4", shapes={"head.bias": (2,)}, rounds={"global": 6},
    settings={"seed": 0},
)  # fmt: skip


@pytest.mark.parametrize(("rule", "named"), [
    (RuleSettings("median"), r"fedms: rule mean \(now median\)"),
    (RuleSettings(malicious=0.3), r"fedms: the rule's malicious 0.2 \(now 0.3\)"),
])  # fmt: skip
def test_a_run_keeps_its_rule(rule: RuleSettings, named: str) -> None:
    started = identify(None, Path("run"), "lab", (JOB,))
    assert identify(started, Path("run"), "lab", (JOB,)) == started
    with pytest.raises(RunFolderError, match=named):
        identify(started, Path("run"), "lab", (replace(JOB, rule=rule),))
