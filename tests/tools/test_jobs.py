"""Options of a command become jobs; one that is out of range is named."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec
import pytest

from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.methods import METHODS
from fleetune.edge.methods.base import ExpertSettings, Round, read_settings
from fleetune.edge.methods.fedms.method import FedMSSettings
from fleetune.edge.methods.pfedmoe.method import PFedMoESettings
from fleetune.edge.pack.manifest import Backbone, Extractor, Manifest, Quantisation
from fleetune.edge.protocol.errors import ConfigError, MessageError
from fleetune.edge.resources.guard import Guard
from fleetune.server.job import RuleSettings
from fleetune.server.strategies import STRATEGIES
from fleetune.tools.commands.serve import add_job_options
from fleetune.tools.jobs import build_jobs, check_rule

MANIFEST = Manifest(
    schema=1,
    kit="1",
    backbone=Backbone(id="x", architecture="bert", sha256="ab" * 32, licence="none", source="test"),
    blocks=6,
    width=64,
    heads=2,
    epsilon=1e-12,
    rank=4,
    targets={"query": (64, 64), "fc1": (64, 128)},
    quantisation=Quantisation(type="nf4", block_size=64, code=(0.0,) * 16),
    opset=20,
    files={},
    extractor=Extractor("dan", representation=32, gate=8, shapes={"extractor.fc1.bias": (32,)}, sha256="cd" * 32),
)


def jobs(*options: str, classes: int = 3, manifest: Manifest = MANIFEST) -> Any:
    parser = argparse.ArgumentParser()
    add_job_options(parser)
    return build_jobs(parser.parse_args(options), manifest, classes=classes)


def test_fedms_is_the_default() -> None:
    (job,) = jobs()
    assert (job.id, job.method, job.backbone) == ("fedms", "fedms", "ab" * 32)
    assert job.settings["max_depth"] == 6
    assert job.settings["classes"] == 3


def test_options_arrive_in_the_job() -> None:
    options = (
        "--job fedms --global-rounds 4 --personal-rounds 2 --epochs 3 --batch 8 --optimiser sgd "
        "--learning-rate 0.01 --weight-decay 0.5 --max-depth 5 --sal-start 2 --sal-step 3 --sal-window 4 "
        "--sal-threshold 0.2 --gate-rank 6 --gate-split val --mix features --seed 9"
    )
    (job,) = jobs(*options.split())
    assert job.rounds == {"global": 4, "personal": 2}
    wanted = {
        "epochs": 3, "batch": 8, "optimiser": "sgd", "learning_rate": 0.01, "weight_decay": 0.5,
        "max_depth": 5, "gate_rank": 6, "gate_split": "val", "mix": "features", "seed": 9,
    }  # fmt: skip
    assert wanted.items() <= job.settings.items()
    schedule = job.schedule
    assert (schedule.start, schedule.step, schedule.window, schedule.threshold) == (2, 3, 4, 0.2)


def test_a_device_understands_the_settings_of_every_job() -> None:
    kinds = {"fedms": FedMSSettings, "pfedmoe": PFedMoESettings}
    for job in jobs(*(part for method in METHODS for part in ("--job", method))):
        kind = kinds.get(job.method, ExpertSettings)
        announced = Round("prepare", 0, {**job.settings, "depth": 1}, {}, Guard())
        assert read_settings(announced, kind).batch == 16
        assert job.method in METHODS
        assert STRATEGIES[job.method](job).next([]) is not None


def test_jobs_come_in_the_order_given_and_once_each() -> None:
    assert [job.id for job in jobs("--job", "standalone", "--job", "fedms", "--job", "standalone")] == [
        "standalone",
        "fedms",
    ]


def test_every_tensor_that_a_device_may_send_has_its_shape() -> None:
    (job,) = jobs("--gate-rank", "5")
    expert = Expert(Layout.of(MANIFEST, classes=3))
    for name, tensor in expert.tensors.items():
        assert job.shapes[name] == tensor.shape
    assert job.shapes["gate.A"] == (64, 5)
    assert job.shapes["gate.B"] == (5, 64)
    assert not {"gate.weight", "gate.bias"} & set(job.shapes)


def test_devices_with_different_backbones_share_the_extractor_alone() -> None:
    (job,) = jobs("--job", "pfedmoe", "--global-rounds", "4", "--personal-rounds", "2", "--gate", "element")
    assert (job.backbone, job.quantisation) == ("cd" * 32, "")
    assert job.shapes == {"extractor.fc1.bias": (32,)}
    assert job.rounds == {"train": 6}
    assert job.settings["gate"] == "element"
    assert not {"rank", "targets", "mix"} & job.settings.keys()


def test_baselines_beside_it_are_for_any_backbone_too() -> None:
    _, beside = jobs("--job", "pfedmoe", "--job", "standalone")
    assert (beside.backbone, beside.quantisation) == ("", "")
    (alone,) = jobs("--job", "standalone")
    assert alone.backbone == "ab" * 32


def test_a_pack_without_an_extractor_has_none_to_share() -> None:
    with pytest.raises(ConfigError, match="--job pfedmoe") as caught:
        jobs("--job", "pfedmoe", manifest=msgspec.structs.replace(MANIFEST, extractor=None))
    assert "--extractor" in caught.value.remedy


def test_standalone_has_as_many_training_rounds_as_both_stages() -> None:
    (job,) = jobs("--job", "standalone", "--global-rounds", "4", "--personal-rounds", "2")
    assert job.rounds == {"train": 6}


@pytest.mark.parametrize(("option", "value"), [
    ("--global-rounds", "0"),
    ("--personal-rounds", "0"),
    ("--epochs", "0"),
    ("--batch", "0"),
    ("--batch", "-4"),
    ("--learning-rate", "0"),
    ("--learning-rate", "-0.001"),
    ("--learning-rate", "nan"),
    ("--learning-rate", "inf"),
    ("--gate-learning-rate", "0"),
    ("--gate-learning-rate", "nan"),
    ("--shared-learning-rate", "0"),
    ("--weight-decay", "-0.1"),
    ("--weight-decay", "nan"),
    ("--max-depth", "0"),
    ("--max-depth", "7"),
    ("--sal-start", "0"),
    ("--sal-step", "-1"),
    ("--sal-window", "1"),
    ("--sal-threshold", "nan"),
    ("--gate-rank", "0"),
    ("--seed", "-1"),
])  # fmt: skip
def test_an_option_out_of_range_is_named(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=option) as caught:
        jobs(f"{option}={value}")
    assert value.removeprefix("-").rstrip("0") in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize("classes", [1, 0, -3])
def test_a_task_with_too_few_classes_is_refused(classes: int) -> None:
    with pytest.raises(ConfigError, match=f"--classes: {classes}"):
        jobs(classes=classes)


@pytest.mark.parametrize(("name", "value"), [
    ("classes", 1), ("max_depth", 0), ("depth", 0), ("epochs", 0), ("batch", 0), ("learning_rate", 0.0),
    ("learning_rate", -1.0), ("weight_decay", -0.1), ("optimiser", "adamax"), ("seed", -1), ("batch", "many"),
])  # fmt: skip
def test_a_device_refuses_settings_that_it_cannot_train_with(name: str, value: float | str) -> None:
    (job,) = jobs("--job", "standalone")
    announced = Round("prepare", 0, {**job.settings, "depth": 1, name: value}, {}, Guard())
    with pytest.raises(MessageError, match=name):
        read_settings(announced, ExpertSettings)


def test_the_rule_is_the_jobs() -> None:
    assert jobs()[0].rule == RuleSettings("mean")
    (job,) = jobs("--rule", "multi-krum", "--assume-malicious", "0.3")
    assert job.rule == RuleSettings("multi-krum", malicious=0.3)


@pytest.mark.parametrize(("options", "named"), [
    (["--rule", "krumm"], r"--rule: krumm is unknown"),
    (["--assume-malicious", "0.5"], r"--assume-malicious: 0.5 is out of range"),
    (["--assume-malicious", "-0.1"], r"--assume-malicious: -0.1 is out of range"),
    (["--assume-malicious", "nan"], r"--assume-malicious: nan is out of range"),
])  # fmt: skip
def test_a_rule_that_cannot_be_is_named(options: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        jobs(*options)


def test_a_rule_wants_enough_updates_in_a_round() -> None:
    check_rule(RuleSettings("multi-krum", 0.2), updates=5)
    check_rule(RuleSettings("trimmed-mean", 0.2), updates=3)
    check_rule(RuleSettings("mean", 0.2), updates=1)
    check_rule(RuleSettings("median"), updates=1)
    with pytest.raises(
        ConfigError, match=r"0.2 of the 4 updates that close a round are 1, and of those it withstands 0"
    ):
        check_rule(RuleSettings("multi-krum", 0.2), updates=4)
    with pytest.raises(ConfigError, match="of the 2 updates"):
        check_rule(RuleSettings("trimmed-mean", 0.2), updates=2)
