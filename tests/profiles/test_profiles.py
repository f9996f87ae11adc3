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

ROOT = Path(__file__).resolve().parents[2]

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
  max_mhz: 1200
power_modes:
  - {id: 0, name: all, watts: 10, cores: 2, max_mhz: 1200}
  - {id: 1, name: half, watts: 5, cores: 1, max_mhz: 600}
thermal:
  throttles_c: 80
  shuts_down_c: 90
rtc: none
sources:
  memory: Bench Ltd, data sheet of the board
  processor: Bench Ltd, data sheet of the board
  power_modes: Bench Ltd, handbook
  thermal: Bench Ltd, handbook
  rtc: Bench Ltd, handbook
"""

NOT_A_BOARD = """\
schema: 1
name: bench
board: Whatever is on the bench
tier: t4
sources: {}
"""

DOCUMENTS = re.compile(
    "data sheet|product brief|technical specifications|Developer Guide|Raspberry Pi documentation"
    r"|device tree \S+\.dtsi?|configuration file \S+\.conf|source file \S+\.def"
)


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


def test_the_boards_that_the_kit_is_made_for_are_shipped() -> None:
    assert profile_names() == [
        "jetson-nano-2gb",
        "jetson-nano-4gb",
        "orin-nano-4gb",
        "orin-nano-8gb",
        "orin-nx-16gb",
        "raspberry-pi-4",
        "raspberry-pi-5",
        "x86-64",
    ]


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_are_valid(name: str) -> None:
    assert read_profile(name).name == name


@pytest.mark.parametrize(("name", "gib", "cores", "tier"), [
    ("jetson-nano-2gb", 2, 4, "t1"),
    ("jetson-nano-4gb", 4, 4, "t1"),
    ("orin-nano-4gb", 4, 6, "t2"),
    ("orin-nano-8gb", 8, 6, "t2"),
    ("orin-nx-16gb", 16, 8, "t2"),
    ("raspberry-pi-4", 4, 4, "t4"),
    ("raspberry-pi-5", 4, 4, "t4"),
])  # fmt: skip
def test_shipped_boards_state_memory_processor_and_temperatures(name: str, gib: int, cores: int, tier: str) -> None:
    profile = read_profile(name)
    assert profile.memory is not None
    assert profile.processor is not None
    assert profile.thermal is not None
    assert (profile.memory.mib, profile.processor.cores, profile.tier) == (gib * 1024, cores, tier)
    assert profile.processor.max_mhz is not None
    assert 1000 < profile.processor.max_mhz < 3000  # a slip of a unit would leave this range
    for degrees in (profile.thermal.throttles_c, profile.thermal.shuts_down_c):
        assert degrees is not None
        assert 70 < degrees < 120


def test_the_modes_of_a_shipped_board() -> None:
    full, slow = read_profile("jetson-nano-4gb").power_modes
    assert (full.id, full.name, full.watts, full.cores, full.max_mhz) == (0, "MAXN", 10, 4, 1479)
    assert (slow.id, slow.name, slow.watts, slow.cores, slow.max_mhz) == (1, "5W", 5, 2, 918)


def test_the_generic_profile_declares_nothing() -> None:
    profile = read_profile("x86-64")
    assert (profile.memory, profile.processor, profile.power_modes, profile.thermal, profile.rtc) == (
        None,
        None,
        (),
        None,
        None,
    )


def test_every_shipped_source_names_its_maker_and_a_document() -> None:
    for name in profile_names():
        for field, source in read_profile(name).sources.items():
            assert source.startswith(("NVIDIA, ", "Raspberry Pi Ltd, ", "GCC, ", "Linux, ")), (
                f"{name}: {field}: {source}"
            )
            assert DOCUMENTS.search(source), f"{name}: {field}: {source}"


def test_the_example_in_the_documentation_is_a_profile(write: Callable[..., Path]) -> None:
    text = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert example
    assert read_profile(str(write(example[1], "bench.yaml"))).rtc == "none"


@pytest.mark.parametrize("name", profile_names())
def test_the_documentation_shows_what_the_shipped_profile_says(name: str) -> None:
    text = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    profile = read_profile(name)
    memory, cores, clock, thermal = "–", "–", "–", "–"
    if profile.memory is not None:
        memory = profile.memory.replace("GiB", " GiB")
    if profile.processor is not None:
        cores = f"{profile.processor.cores} × {profile.processor.core.removeprefix('Arm ')}"
        clock = f"{profile.processor.max_mhz:.10g}"
    if profile.thermal is not None:
        thermal = f"{profile.thermal.throttles_c:.10g}, {profile.thermal.shuts_down_c:.10g} °C"
    modes = ", ".join(mode.name for mode in profile.power_modes) or "–"
    rtc = f"`{profile.rtc}`" if profile.rtc else "–"
    assert f"| `{name}` | {profile.board} | {memory} | {cores} | {clock} | {modes} | {thermal} | {rtc} |" in text


def test_a_profile_of_ones_own_is_read_by_its_path(write: Callable[..., Path]) -> None:
    profile = read_profile(str(write(PROFILE, "bench.yaml")))
    assert profile.memory is not None
    assert profile.processor is not None
    assert (profile.board, profile.memory.mib, profile.processor.cores) == ("A board on a bench", 512, 2)
    assert [mode.name for mode in profile.power_modes] == ["all", "half"]
    assert profile.rtc == "none"


def test_what_no_document_states_is_left_out(write: Callable[..., Path]) -> None:
    own = write(
        PROFILE, "bench.yaml", ("  max_mhz: 1200\n", ""), (", watts: 10", ""), (", max_mhz: 600", ""),
        ("  shuts_down_c: 90\n", ""), ("rtc: none\n", ""), ("  rtc: Bench Ltd, handbook\n", ""),
    )  # fmt: skip
    profile = read_profile(str(own))
    assert profile.processor is not None
    assert profile.thermal is not None
    assert (profile.processor.max_mhz, profile.thermal.shuts_down_c, profile.rtc) == (None, None, None)
    assert (profile.power_modes[0].watts, profile.power_modes[1].max_mhz) == (None, None)


def test_modes_are_held_against_no_processor_where_none_is_stated(write: Callable[..., Path]) -> None:
    modes = "power_modes: [{id: 0, name: all, cores: 64, max_mhz: 5000}]\nsources: {power_modes: 'Bench Ltd, handbook'}"
    profile = read_profile(str(write(NOT_A_BOARD, "bench.yaml", ("sources: {}", modes))))
    assert (profile.processor, profile.power_modes[0].cores) == (None, 64)


def test_each_part_of_a_field_may_have_its_own_source(write: Callable[..., Path]) -> None:
    parts = "  thermal.throttles_c: Bench Ltd, handbook\n  thermal.shuts_down_c: Chip Ltd, device tree\n"
    own = write(PROFILE, "bench.yaml", ("  thermal: Bench Ltd, handbook\n", parts))
    assert read_profile(str(own)).sources["thermal.shuts_down_c"] == "Chip Ltd, device tree"


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
    ("sources:\n", "weight: 1\nsources:\n", "line 18: field weight: there is no such field"),
    ("max_mhz: 1200\n", "max_mhz: 0\n", "line 10: field processor.max_mhz: .*'0'"),
    ("watts: 10", "watts: -10", r"line 12: field power_modes\[0\].watts: .*'-10'"),
    ("id: 1", "id: one", r"line 13: field power_modes\[1\].id: .*'one'"),
    ("throttles_c: 80", "throttles_c: .nan", "line 15: field thermal.throttles_c: .*'.nan'"),
    ("rtc: none", "rtc: coin", "line 17: field rtc: .*coin"),
    ("rtc: none", "rtc: no", "line 17: field rtc: .*'no'"),
    ("cores: 1", "cores: 3", r"line 13: field power_modes\[1\].cores: 3 cores are more than the board's 2"),
    ("max_mhz: 600", "max_mhz: 1200.5", r"line 13: .*power_modes\[1\].max_mhz: 1200.5 MHz .* processor's 1200 MHz"),
    ("id: 1", "id: 0", r"line 13: field power_modes\[1\].id: 0 is there twice"),
    ("name: half", "name: all", r"line 13: field power_modes\[1\].name: 'all' is there twice"),
    ("throttles_c: 80", "throttles_c: 91", "line 15: field thermal.throttles_c: 91 °C are not below .* 90 °C"),
    ("throttles_c: 80", "throttles_c: 90", "line 15: field thermal.throttles_c: 90 °C are not below .* 90 °C"),
    ("  memory: Bench Ltd, data sheet of the board\n", "", "line 5: field memory: the value has no source"),
    ("  processor: Bench", "  processor.cores: Bench", "line 8: field processor.core: the value has no source"),
    ("  power_modes: Bench Ltd, handbook\n", "", "line 12: field power_modes: the value has no source"),
    ("  thermal: B", "  thermal.throttles_c: B", "line 16: field thermal.shuts_down_c: the value has no source"),
    ("  rtc: Bench Ltd, handbook\n", "", "line 17: field rtc: the value has no source"),
    ("rtc: none\n", "", "line 22: field sources.rtc: the profile has no value 'rtc' that needs a source"),
    ("  rtc: B", "  processor.gpu: B", "line 23: field sources.processor.gpu: .* no value 'processor.gpu'"),
    ("  rtc: B", "  gpu: x\n  rtc: B", "line 23: field sources.gpu: the profile has no value 'gpu'"),
    ("  shuts_down_c: 90\nrtc: none\nsources:\n", "rtc: none\nsources:\n  thermal.shuts_down_c: Bench Ltd, handbook\n",
     "line 18: field sources.thermal.shuts_down_c: the profile has no value"),
    ("  rtc: Bench Ltd, handbook", "  rtc: ' '", "line 23: field sources.rtc: ' ' is no source"),
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


def test_a_budget_is_held_against_no_board_where_the_profile_is_not_of_one(write: Callable[..., Path]) -> None:
    own = write(NOT_A_BOARD, "bench.yaml")
    fleet = read_fleet(write(FLEET, "fleet.yaml", ("raspberry-pi-5", str(own)), ("1.5 GiB", "900GiB")))
    assert fleet.device("pi-1").budget.memory_mib == 900 * 1024
    assert fleet.device("pi-1").profile.memory is None


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
    ("      memory: 900MiB\n", "", r"line [67]: field devices\[0\]\.budget: .*memory"),
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
    b"a: &a {b: {c: *a}}\n",
    b"[" * 5_000,
    b"schema: 1\nfleet: 2001-99-99\ndevices: []\n",
    b"schema: !!int ''\n",
    b"schema: !!bool perhaps\n",
    b"schema: " + b"1" * 5_000,
    b"\x00",
])  # fmt: skip
def test_what_is_no_fleet_file_is_refused_by_name(text: bytes, write: Callable[..., Path]) -> None:
    refusal(write(text))


def test_a_few_lines_that_stand_for_more_than_memory_holds_are_refused_at_once(write: Callable[..., Path]) -> None:
    lists = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    merged = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
    for first, more in (("a0: &a0 [x]", lists), ("a0: &a0 {k: v}", merged)):
        error = refusal(write("\n".join([first, *more]).encode()))
        assert re.search(r"line \d+: more than 262144 values", error.what)


def test_devices_may_share_a_budget_by_an_alias(write: Callable[..., Path]) -> None:
    text = FLEET.replace("budget:", "budget: &one", 1)
    assert len(read_fleet(write(text)).devices) == len(read_fleet(write(FLEET)).devices)


def test_where_the_yaml_breaks_is_said(write: Callable[..., Path]) -> None:
    assert "line 5" in refusal(write(FLEET, "fleet.yaml", ("    profile:", "   profile:"))).what


def test_a_key_that_is_there_twice_is_refused(write: Callable[..., Path]) -> None:
    error = refusal(write(FLEET, "fleet.yaml", ("memory: 900MiB", "memory: 900MiB\n      memory: 100MiB")))
    assert "memory" in error.what


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "fleet.yaml").what


def test_a_file_that_is_too_large_is_refused(write: Callable[..., Path]) -> None:
    assert "larger than" in refusal(write(b"#" * ((1 << 20) + 1))).what


def test_limits_that_are_left_out_do_not_limit(write: Callable[..., Path]) -> None:
    path = write(FLEET, "fleet.yaml", ("      cpu_seconds: 30\n", "      seconds: 60\n      joules: 90.5\n"))
    first, second = (device.budget for device in read_fleet(path).devices)
    assert (first.memory_mib, first.cpu_s, first.deadline_s, first.joules) == (900, math.inf, 60, 90.5)
    assert (second.cpu_s, second.deadline_s, second.joules, second.disk_mib) == (12.5, math.inf, math.inf, math.inf)


@pytest.mark.parametrize("field", ["seconds", "joules", "cpu_seconds"])
def test_a_limit_of_nothing_is_refused(field: str, write: Callable[..., Path]) -> None:
    error = refusal(write(FLEET, "fleet.yaml", ("      cpu_seconds: 30\n", f"      {field}: 0\n")))
    assert f"line 8: field devices[0].budget.{field}" in error.what
    assert "found '0'" in error.what
