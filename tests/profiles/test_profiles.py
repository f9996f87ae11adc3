"""Profiles and fleet files: the shipped ones are valid, and an error says where it is and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.protocol.errors import ConfigError
from fleetune.profiles.fleet import read_fleet
from fleetune.profiles.profile import profile_names, read_profile

FLEET = """\
schema: 1
fleet: lab
devices:
  - id: nano-1
    profile: jetson-nano-2gb
    budget:
      memory: 900MiB
      cpu_seconds: 30
  - id: pi-1
    profile: raspberry-pi-5
    budget: {memory: 1.5 GiB, cpu_seconds: 12.5}
"""

PROFILE = """\
schema: 1
name: bench
board: A board on a bench
tier: t4
memory: 512MiB
processor:
  cores: 2
  core: Arm Cortex-A53
  architecture: armv8.0-a
sources: {}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str | bytes = FLEET, name: str = "fleet.yaml", *changes: tuple[str, str]) -> Path:
        for old, new in changes:
            assert isinstance(text, str)
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path: Path, read: Callable[[Path], Any] = read_fleet) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert caught.value.remedy
    assert str(path) in caught.value.what
    return caught.value


# --- profiles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_are_valid_and_say_where_their_values_are_from(name: str) -> None:
    profile = read_profile(name)
    assert profile.name == name
    assert profile.memory.mib >= 1024
    assert profile.processor.cores >= 1
    for field in ("memory", "processor"):
        assert len(profile.sources[field]) > 20, f"{name} has no source for {field}"


def test_the_boards_that_the_kit_is_made_for_are_shipped() -> None:
    assert {"jetson-nano-2gb", "jetson-nano-4gb", "orin-nano-8gb", "raspberry-pi-5"} <= set(profile_names())


def test_a_profile_of_ones_own_is_read_by_its_path(write: Callable[..., Path]) -> None:
    profile = read_profile(str(write(PROFILE, "bench.yaml")))
    assert (profile.board, profile.memory.mib, profile.processor.cores) == ("A board on a bench", 512, 2)


def test_an_unknown_profile_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="profile: 'jetson' is unknown") as caught:
        read_profile("jetson")
    assert "jetson-nano-2gb" in caught.value.remedy


@pytest.mark.parametrize(("old", "new", "where"), [
    ("tier: t4", "tier: t9", "line 4: field tier: .*t9"),
    ("cores: 2", "cores: two", "line 7: field processor.cores: .*'two'"),
    ("cores: 2", "cores: 0", "line 7: field processor.cores: .*'0'"),
    ("memory: 512MiB", "memory: 512", "line 5: field memory: .*unit.*'512'"),
    ("memory: 512MiB", "memory: 512MB", "line 5: field memory: .*unit.*'512MB'"),
    ("memory: 512MiB", "memory: 0MiB", "line 5: field memory: .*above zero, found '0MiB'"),
    ("name: bench\n", "", "name"),
    ("sources: {}", "sources: {}\nmeasured: 1", "measured"),
])  # fmt: skip
def test_a_bad_profile_names_file_and_field(old: str, new: str, where: str, write: Callable[..., Path]) -> None:
    path = write(PROFILE, "bench.yaml", (old, new))
    error = refusal(path, lambda path: read_profile(str(path)))
    assert re.search(where, error.what), error.what


# --- fleet files --------------------------------------------------------------------------------------------


def test_a_good_fleet_file(write: Callable[..., Path]) -> None:
    fleet = read_fleet(write())
    assert fleet.name == "lab"
    nano, pi = fleet.devices
    assert (nano.id, nano.profile.name, nano.budget.memory_mib, nano.budget.cpu_s) == (
        "nano-1",
        "jetson-nano-2gb",
        900,
        30,
    )
    assert (pi.id, pi.profile.name, pi.budget.memory_mib, pi.budget.cpu_s) == (
        "pi-1",
        "raspberry-pi-5",
        1536,
        12.5,
    )
    assert fleet.device("pi-1") is pi
    assert nano.budget.disk_mib == math.inf  # what is free there


def test_a_device_may_state_its_disk(write: Callable[..., Path]) -> None:
    fleet = read_fleet(write(FLEET, "fleet.yaml", ("cpu_seconds: 30", "cpu_seconds: 30\n      disk: 1.5GiB")))
    assert fleet.device("nano-1").budget.disk_mib == 1536


def test_a_fleet_file_may_name_a_profile_of_ones_own(write: Callable[..., Path]) -> None:
    own = write(PROFILE, "bench.yaml")
    fleet = read_fleet(write(FLEET, "fleet.yaml", ("raspberry-pi-5", str(own)), ("1.5 GiB", "200MiB")))
    assert fleet.device("pi-1").profile.board == "A board on a bench"


def test_a_device_that_the_fleet_does_not_have_lists_those_it_has(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="lab has no device 'nano-9'") as caught:
        read_fleet(write()).device("nano-9")
    assert "nano-1, pi-1" in caught.value.remedy


@pytest.mark.parametrize(("old", "new", "where"), [
    ("memory: 900MiB", "memory: 900", r"line 7: field devices\[0\]\.budget\.memory: .*unit.*'900'"),
    ("memory: 900MiB", "memory: '900'", r"line 7: field devices\[0\]\.budget\.memory: .*unit.*'900'"),
    ("memory: 900MiB", "memory: 900MB", r"line 7: field devices\[0\]\.budget\.memory: .*unit.*'900MB'"),
    ("memory: 900MiB", "memory: 900MiBit", r"line 7: field devices\[0\]\.budget\.memory: .*'900MiBit'"),
    ("memory: 900MiB", "memory: -900MiB", r"line 7: field devices\[0\]\.budget\.memory: .*'-900MiB'"),
    ("memory: 900MiB", "memory: 0MiB", r"line 7: field devices\[0\]\.budget\.memory: .*above zero, found '0MiB'"),
    ("memory: 900MiB", "memory: [900MiB]", r"line 7: field devices\[0\]\.budget\.memory: .*unit"),
    ("memory: 900MiB", "memory: 3GiB", r"line 7: field devices\[0\]\.budget\.memory: 3GiB is not within the board's"),
    ("cpu_seconds: 30", "cpu_seconds: 0", r"line 8: field devices\[0\]\.budget\.cpu_seconds: .*'0'"),
    ("cpu_seconds: 30", "cpu_seconds: -1", r"line 8: field devices\[0\]\.budget\.cpu_seconds: .*'-1'"),
    ("cpu_seconds: 30", "cpu_seconds: .nan", r"line 8: field devices\[0\]\.budget\.cpu_seconds: .*nan"),
    ("cpu_seconds: 30", "cpu_seconds: half", r"line 8: field devices\[0\]\.budget\.cpu_seconds: .*'half'"),
    ("cpu_seconds: 30", "cpu_seconds: 30\n      disk: 500", r"line 9: field devices\[0\]\.budget\.disk: .*unit.*'500'"),
    ("cpu_seconds: 30", "cpu_seconds: 30\n      disk: 0MiB", r"line 9: field devices\[0\]\.budget\.disk: .*above zero"),
    ("      cpu_seconds: 30\n", "", r"line [67]: field devices\[0\]\.budget: .*cpu_seconds"),
    ("cpu_seconds: 30", "cpu_seconds: 30\n      gpu: 1", r"line 9: field devices\[0\]\.budget\.gpu: .*no such field"),
    ("id: pi-1", "id: nano-1", r"line 9: field devices\[1\]\.id: 'nano-1' is there twice"),
    ("id: pi-1", "id: 7", r"line 9: field devices\[1\]\.id: .*'7'"),
    ("id: pi-1", "id: pi/1", r"line 9: field devices\[1\]\.id: 'pi/1'"),
    ("id: pi-1", "id: ''", r"devices\[1\]\.id: ''"),
    ("id: pi-1", "name: pi-1", r"line 9: field devices\[1\]\.name: there is no such field"),
    ("raspberry-pi-5", "raspberry-pi-6", r"line 10: field devices\[1\]\.profile: profile: 'raspberry-pi-6' is unknown"),
    ("raspberry-pi-5", "no/such.yaml", r"devices\[1\]\.profile: .*no/such\.yaml"),
    ("fleet: lab", "fleet: my lab", "line 2: field fleet: 'my lab'"),
    ("fleet: lab", "fleet: [lab]", "line 2: field fleet: "),
    ("fleet: lab\n", "", "fleet"),
    ("schema: 1", "schema: 2", "line 1: field schema: .*2"),
    ("schema: 1", "schema: 1\nbroker: x", "line 2: field broker: there is no such field"),
])  # fmt: skip
def test_a_bad_field_is_named_with_its_value(old: str, new: str, where: str, write: Callable[..., Path]) -> None:
    error = refusal(write(FLEET, "fleet.yaml", (old, new)))
    assert re.search(where, error.what), error.what


@pytest.mark.parametrize("text", [
    b"",
    b"# nothing but a comment\n",
    b"just words",
    b"- a list",
    b"schema: 1\nfleet: lab\ndevices: []\n",
    b"schema: 1\nfleet: lab\ndevices: nano-1\n",
    b"schema: 1\n\tfleet: lab\n",
    b"schema: [1\n",
    b"schema: 1\n---\nschema: 1\n",
    b"\xff\xfe\xff",
    b"schema: !!python/object/apply:os.getcwd []\n",
    b"? [a]\n: b\n",
    b"a: &a [*a]\n",
    b"\x00",
])  # fmt: skip
def test_what_is_no_fleet_file_is_refused_by_name(text: bytes, write: Callable[..., Path]) -> None:
    refusal(write(text))


def test_where_the_yaml_breaks_is_said(write: Callable[..., Path]) -> None:
    assert "line 5" in refusal(write(FLEET, "fleet.yaml", ("    profile:", "   profile:"))).what


def test_a_key_that_is_there_twice_is_refused(write: Callable[..., Path]) -> None:
    error = refusal(write(FLEET, "fleet.yaml", ("memory: 900MiB", "memory: 900MiB\n      memory: 100MiB")))
    assert "memory" in error.what


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "fleet.yaml").what


def test_a_file_that_is_too_large_is_refused(write: Callable[..., Path]) -> None:
    assert "larger than" in refusal(write(b"#" * ((1 << 20) + 1))).what
