"""A run's folder goes on with the options that it was begun with, and says which are others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.protocol.errors import RunFolderError
from fleetune.server.job import Job, RuleSettings
from fleetune.server.journal import Started
from fleetune.server.run import identify

JOB = Job(
    id="fedms", method="fedms", backbone="b", quantisation="nf4", shapes={"head.bias": (2,)}, rounds={"global": 2},
    settings={"rank": 8, "classes": 2},
)  # fmt: skip


def test_the_same_options_go_on() -> None:
    started = Started("r", "lab", (JOB,))
    assert identify(started, Path("state"), "lab", (JOB,)) is started


@pytest.mark.parametrize(("change", "says"), [
    ({"settings": {"rank": 8, "classes": 3}}, r"fedms: classes 2 \(now 3\)"),
    ({"settings": {"rank": 8}}, r"fedms: classes 2 \(now absent\)"),  # begun by another version of Fleetune
    ({"settings": {"rank": 8, "classes": 2, "mix": "logits"}}, r"fedms: mix absent \(now logits\)"),
    ({"rounds": {"personal": 2}}, r"fedms: global rounds 2 \(now absent\), personal rounds absent \(now 2\)"),
    ({"shapes": {"head.bias": (3,)}}, "fedms: the pack has adapters of other shapes"),
    ({"id": "other"}, r"jobs fedms \(now other\)"),
])  # fmt: skip
def test_other_options_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RunFolderError, match=says):
        identify(Started("r", "lab", (JOB,)), Path("state"), "lab", (replace(JOB, **change),))


@pytest.mark.parametrize(("rule", "named"), [
    (RuleSettings("median"), r"fedms: rule mean \(now median\)"),
    (RuleSettings(malicious=0.3), r"fedms: the rule's malicious 0.2 \(now 0.3\)"),
])  # fmt: skip
def test_a_run_keeps_its_rule(rule: RuleSettings, named: str) -> None:
    started = identify(None, Path("run"), "lab", (JOB,))
    assert identify(started, Path("run"), "lab", (JOB,)) == started
    with pytest.raises(RunFolderError, match=named):
        identify(started, Path("run"), "lab", (replace(JOB, rule=rule),))
