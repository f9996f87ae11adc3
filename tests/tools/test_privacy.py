"""Options about privacy become a job's settings; one that says nothing, or is out of range, is named."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fleetune[server]'")

from fleetune.edge.protocol.errors import ConfigError
from fleetune.server.job import JobPrivacy
from fleetune.server.privacy import VIEWS, expected
from fleetune.tools.commands.serve import add_job_options
from fleetune.tools.jobs import build_jobs
from fleetune.tools.privacy import add_privacy_options, read_privacy

from .test_jobs import MANIFEST

ROUNDS = {"global": 6, "personal": 3}
DEVICES = 20


def read(*options: str, devices: int = DEVICES) -> JobPrivacy | None:
    parser = argparse.ArgumentParser()
    add_privacy_options(parser)
    return read_privacy(parser.parse_args(options), ROUNDS, devices)


def asked(*options: str, devices: int = DEVICES) -> JobPrivacy:
    found = read(*options, devices=devices)
    assert found is not None
    return found


def test_nothing_is_private_unless_it_is_asked_for() -> None:
    assert read() is None


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("devices", [1, 2, 20])
def test_the_noise_gives_the_epsilon_against_those_it_is_meant_for(view: str, devices: int) -> None:
    privacy = asked("--dp-epsilon", "4", "--dp-against", view, devices=devices)
    guarantee = expected(privacy, sum(ROUNDS.values()), devices)
    assert guarantee is not None
    assert guarantee.epsilon[view] == pytest.approx(4.0, abs=1e-3)


def test_by_default_no_other_device_and_nobody_with_the_model_learns_more() -> None:
    guarantee = expected(asked("--dp-epsilon", "4"), sum(ROUNDS.values()), DEVICES)
    assert guarantee is not None
    assert guarantee.epsilon["model"] < guarantee.epsilon["device"] == pytest.approx(4.0, abs=1e-3)


def test_options_arrive() -> None:
    words = "--dp-noise 0.7 --dp-delta 1e-6 --dp-clip 0.3 --dp-gate-clip 0.01 --report-accuracy"
    assert asked(*words.split()) == JobPrivacy(0.7, 0.3, 0.01, 1e-6, accuracy=True)
    privacy = asked("--dp-noise", "0.7")
    assert not privacy.accuracy
    assert (privacy.of("global").clip, privacy.of("personal").clip) == (privacy.clip, privacy.gate_clip)


@pytest.mark.parametrize("option", ["--dp-delta=1e-6", "--dp-clip=1", "--dp-gate-clip=1", "--report-accuracy"])
def test_what_says_nothing_without_noise_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=option.partition("=")[0]) as caught:
        read(option)
    assert "--dp-epsilon" in caught.value.remedy


def test_noise_and_epsilon_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="one follows from the other"):
        read("--dp-epsilon", "4", "--dp-noise", "1")


def test_a_private_job_takes_one_factor_alone() -> None:
    parser = argparse.ArgumentParser()
    add_job_options(parser)
    open_, private = (
        build_jobs(parser.parse_args([]), MANIFEST, classes=2, privacy=privacy)[0]
        for privacy in (None, asked("--dp-noise", "1"))
    )
    assert {name for name in open_.shapes if not name.endswith(".A")} == set(private.shapes)
    assert open_.settings == {name: value for name, value in private.settings.items() if name != "factors"}
    assert private.settings["factors"] == "B"
    assert dataclasses.replace(private, settings={}, shapes={}, privacy=None) == dataclasses.replace(
        open_, settings={}, shapes={}
    )
