"""A first boot with a real broker and a real authority: what it leaves, and that a power cut changes nothing."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ConfigError, RunFailedError
from fleetune.edge.protocol.identity.folder import read_identity
from fleetune.edge.protocol.identity.signature import sign_file
from fleetune.profiles.fleet import read_fleet
from fleetune.tools.firstboot import steps as steps_module
from fleetune.tools.firstboot.board import Board, as_user
from fleetune.tools.firstboot.seed import write_seed
from fleetune.tools.firstboot.steps import Step, all_steps, first_boot, run_fleetune
from fleetune.tools.flash.seed import Order, Seeded, make_seeds
from support.guarded import GuardedBroker, GuardedFleet

pytestmark = pytest.mark.slow

FLEET = """\
schema: 1
fleet: lab
devices:
  - {id: nano-1, serial: "1400", profile: x86-64, budget: {memory: 1GiB, cpu_seconds: 100}}
  - {id: nano-2, profile: x86-64, budget: {memory: 1GiB}}
"""


class PowerCutError(Exception):
    """Nothing that was begun goes on."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedFleet]:
    guarded = GuardedFleet(tmp_path_factory.mktemp("fleet"))
    yield guarded
    guarded.close()


@pytest.fixture(scope="module")
def broker(fleet: GuardedFleet) -> Iterator[GuardedBroker]:
    with fleet.broker() as broker, fleet.desk():
        yield broker


@pytest.fixture(scope="module")
def signed(fleet: GuardedFleet, tiny_bert_pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """A copy: other tests have the same pack, unsigned."""
    folder = tmp_path_factory.mktemp("signed") / "pack"
    shutil.copytree(tiny_bert_pack.path, folder)
    sign_file(folder, fleet.identity("publisher"), fleet.clock())
    return Pack.open(folder)


def flashed(fleet: GuardedFleet, folder: Path, pack: Pack, device: str = "nano-1", serial: str = "1400") -> Board:
    """A board that has its seed in its own file system, as if its image had been made for it alone."""
    file = folder / "fleet.yaml"
    file.write_text(FLEET, encoding="utf-8")
    root, inventory = folder / "root", read_fleet(file)
    order = Order(inventory, str(pack.path), "/var/lib/fleetune/samples.jsonl", 1.0, "rootfs", renew=True)
    seeds = folder / "seeds"
    made = list[Seeded]()
    make_seeds(order, [inventory.device(device)], fleet.authority, seeds, made.append)
    made[0].path.rename(root)
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "proc/device-tree/serial-number").write_text(f"{serial}\0")
    return Board(root)


def steps(board: Board, *, without: str = "grow") -> tuple[Step, ...]:
    """All but one: the file system of this machine does not grow."""
    return tuple(step for step in all_steps(partial(run_fleetune, board)) if step.name != without)


def left(board: Board) -> dict[str, object]:
    """What a first boot leaves, less what differs each time: keys, and how long things took."""
    device = board.fleet.device(board.seed.device)
    return {
        "names": sorted(str(path.relative_to(board.root)) for path in board.root.rglob("*") if path.name != "lock"),
        "unit": (board.root / "etc/systemd/system/fleetune-agent.service").read_text().replace(str(board.root), ""),
        "limit": (board.root / "etc/systemd/system/fleetune-agent.service.d/50-budget.conf").read_text(),
        "who": read_identity(board.state / "identity").credential.name,
        "measured": [len(table.costs.trials) for table in device.profile.measured],
        "done": sorted(board.done()),
    }


def test_a_flashed_board_becomes_a_member(
    fleet: GuardedFleet, broker: GuardedBroker, signed: Pack, tmp_path: Path
) -> None:
    board = flashed(fleet, tmp_path, signed)
    token = (board.state / "seed/token").read_text()
    first_boot(board, steps(board))
    after = left(board)
    assert after["who"] == "nano-1"
    assert after["measured"] != [0]
    assert "--id nano-1" in str(after["unit"])
    assert "MemoryMax=1280M" in str(after["limit"])
    assert (board.state / "provisioned").read_text() == "nano-1\n"
    for file in board.root.rglob("*"):
        assert not file.is_file() or token.strip() not in file.read_text(errors="replace"), file
    with fleet.peer("aggregator") as peer:
        (word,) = peer.subscribe(fleet.topics.presence("nano-1")).receive(1)
        assert b"provisioned" in word.payload


CUTS = ("seed", "enrol", "look", "measure", "unit", "report", "provisioned")


def test_a_power_cut_after_any_step_ends_in_the_same_state(
    fleet: GuardedFleet, broker: GuardedBroker, signed: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = flashed(fleet, tmp_path / "whole", signed)
    first_boot(whole, steps(whole))
    (tmp_path / "cut").mkdir()
    board = flashed(fleet, tmp_path / "cut", signed)
    finish, cut = Board.finish, list[str]()

    def fails_once(self: Board, step: str, came: str) -> None:
        """The step is done, and the power is cut before that is written down."""
        if step not in cut:
            cut.append(step)
            raise PowerCutError(step)
        finish(self, step, came)

    monkeypatch.setattr(Board, "finish", fails_once)
    for name in CUTS:
        with pytest.raises(PowerCutError, match=name):
            first_boot(board, steps(board))
    first_boot(board, steps(board))
    assert cut == list(CUTS)
    there, expected = left(board), left(whole)
    assert there == expected


@pytest.mark.parametrize("written", range(1, 12))
def test_a_power_cut_between_two_files_ends_in_the_same_state(
    fleet: GuardedFleet,
    broker: GuardedBroker,
    signed: Pack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: int,
) -> None:
    """Cut off after so many files; looking and measuring, which write theirs in one go, are left out here."""
    board = flashed(fleet, tmp_path, signed)
    quick = tuple(step for step in steps(board) if step.name not in ("look", "measure"))
    keep, write, count = Board.keep, steps_module.write_atomic, [0]

    def counted(do: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object, **options: object) -> None:
            count[0] += 1
            if count[0] == written:
                raise PowerCutError
            do(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(Board, "keep", counted(keep))
        patch.setattr(steps_module, "write_atomic", counted(write))
        try:
            first_boot(board, quick)
        except PowerCutError:
            assert not (board.state / "provisioned").exists()
    first_boot(board, quick)
    assert left(board)["done"] == sorted(step.name for step in quick)
    assert read_identity(board.state / "identity").credential.name == "nano-1"
    assert not (board.state / "seed/token").exists()


def test_a_seed_of_another_board_is_not_taken(fleet: GuardedFleet, signed: Pack, tmp_path: Path) -> None:
    board = flashed(fleet, tmp_path, signed, serial="9999")
    with pytest.raises(ConfigError, match="nano-1 is for the board 1400, and this is 9999"):
        first_boot(board, steps(board))
    assert not board.own.exists()
    assert board.done() == {}


def test_a_seed_without_a_serial_number_is_any_boards(fleet: GuardedFleet, signed: Pack, tmp_path: Path) -> None:
    board = flashed(fleet, tmp_path, signed, "nano-2", serial="9999")
    first_boot(board, tuple(step for step in steps(board) if step.name == "seed"))
    assert board.done() == {"seed": "nano-2"}


def test_a_board_without_a_seed_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no seed"):
        first_boot(Board(tmp_path), steps(Board(tmp_path)))


def test_what_a_step_says_reaches_the_log_and_the_next_run_goes_on_there(
    fleet: GuardedFleet, signed: Pack, tmp_path: Path
) -> None:
    """The broker is not there: the seed stays taken, the token stays whole."""
    board = flashed(fleet, tmp_path, signed)
    seed = board.state / "seed/seed.json"
    gone = "mqtts://localhost:1"
    token = (board.state / "seed/token").read_text()

    def enroll(*_: str) -> str:
        raise RunFailedError(f"enroll ended with 15: nobody answers at {gone}", "start it")

    with pytest.raises(RunFailedError, match="nobody answers"):
        first_boot(board, tuple(step for step in all_steps(enroll) if step.name != "grow"))
    assert board.done() == {"seed": "nano-1"}
    assert seed.is_file()
    assert board.token.read_text() == token


def test_a_doctor_who_finds_something_is_quoted(
    fleet: GuardedFleet, broker: GuardedBroker, signed: Pack, tmp_path: Path
) -> None:
    board = flashed(fleet, tmp_path, signed)
    first_boot(board, tuple(step for step in steps(board) if step.name in ("seed", "enrol")))
    board.keep("seed.json", write_seed(msgspec.structs.replace(board.seed, pack="/no/such/pack")))
    with pytest.raises(RunFailedError, match="/no/such/pack") as caught:
        first_boot(board, steps(board))
    assert caught.value.remedy
    assert "look" not in board.done()


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.state.mkdir(parents=True)
    (board.state / "firstboot.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"firstboot\.json"):
        first_boot(board, ())


def test_only_what_belongs_to_a_seed_is_taken_from_a_stick(fleet: GuardedFleet, signed: Pack, tmp_path: Path) -> None:
    board = flashed(fleet, tmp_path, signed)
    (board.state / "seed/holiday.mp4").write_bytes(bytes(1 << 20))
    (board.state / "seed/._fleet.yaml").write_bytes(b"what a desktop leaves")
    first_boot(board, tuple(step for step in steps(board) if step.name == "seed"))
    assert {file.name for file in board.own.iterdir()} == {"seed.json", "fleet.yaml", "token"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_what_is_run_for_the_agent_has_no_right_of_roots(tmp_path: Path) -> None:
    board = Board(tmp_path, "nobody")
    board.state.mkdir(parents=True)
    said = steps_module._run(["/bin/sh", "-c", "id -u; id -G; echo $HOME"], **as_user(board))
    who = pwd.getpwnam("nobody")
    assert said.split() == [str(who.pw_uid), str(who.pw_gid), str(board.state)]
