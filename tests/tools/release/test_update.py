"""Releases over a real web server: what boards take, what they refuse, and when they go back."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Timestamp

from fleetune.edge.protocol.errors import AuthorityError, ConfigError, KeyExposedError, RunFailedError, SignatureError
from fleetune.edge.protocol.files import FolderLock
from fleetune.server.broker import free_ports
from fleetune.tools.release import repository as repository_module
from fleetune.tools.release.repository import METADATA, PUBLIC, TARGETS, Releases
from fleetune.tools.release.rollout import Part, Rollout, read_rollout, write_rollout
from fleetune.tools.release.serve import serve_folder
from fleetune.tools.trees import tree_digest, write_tar_gz
from fleetune.tools.update import update as update_module
from fleetune.tools.update.services import Health
from fleetune.tools.update.state import read_state, where
from fleetune.tools.update.update import Board, update


class Agent:
    """The agent's service, on a board that is a folder: with a bad kit it does not come up."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.restarts, self.says = folder, 0, dict[str, list[Health]]()
        self.running = self._kit()

    def _kit(self) -> str:
        current = self.folder / "current"
        return (current / "word").read_text() if current.exists() else "image"

    def restart(self) -> None:
        self.restarts += 1
        self.running = self._kit()

    def health(self) -> Health:
        said = self.says.get(self.running, [])
        if len(said) > 1:
            return said.pop(0)
        return said[0] if said else "down" if self.running.startswith("bad") else "up"


class Server:
    """The operator's machine and its web server.

    Attributes:
        releases: The repository.
        url: Of what is public.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.releases = Releases.make(folder / "releases", "https://updates.example.org")
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._serving = serve_folder(folder / "releases" / PUBLIC, port)
        self._serving.__enter__()

    def archive(self, word: str) -> tuple[Part, Path]:
        tree, file = self.folder / f"tree-{word}", self.folder / f"{word}.tar.gz"
        if not tree.exists():
            (tree / "bin").mkdir(parents=True)
            (tree / "word").write_text(word)
            (tree / "bin/python3").symlink_to("/usr/bin/python3.11")
            for path in (tree, tree / "bin"):
                path.chmod(0o755)
            (tree / "word").chmod(0o644)
            write_tar_gz(tree, file)
        return Part(f"kit-{word}.tar.gz", tree_digest(tree)), file

    def publish(self, word: str, *, share: float = 1.0, canaries: tuple[str, ...] = (), pack: str = "") -> Rollout:
        part, file = self.archive(word)
        archives, packs = {part.target: file}, {}
        if pack:
            packs["minilm"], archived = self.archive(pack)
            archives[packs["minilm"].target] = archived
        before = self.releases.rollout
        number = before.number + 1 if before else 1
        rollout = Rollout(1, number, {"t1": part}, packs, canaries, share)
        self.releases.publish(rollout, archives)
        return rollout

    def close(self) -> None:
        self._serving.__exit__(None, None, None)
        self.releases.leave()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


@pytest.fixture
def board(server: Server, tmp_path: Path) -> Board:
    return Board(tmp_path / "kits", "nano-1", "t1", server.url, server.releases.root_file)


@pytest.fixture
def agent(board: Board) -> Agent:
    return Agent(board.folder)


def run(board: Board, agent: Agent, within_s: float = 5.0, away_s: float = 0.1) -> str:
    return update(board, agent, within_s=within_s, away_s=away_s, say=lambda _: None, pause_s=0.01)


def word(board: Board) -> str:
    return (board.folder / "current/word").read_text()


# --- what a board takes ----------------------------------------------------------------------------------------------


def test_a_board_takes_the_newest_release_once(server: Server, board: Board, agent: Agent) -> None:
    assert run(board, agent) == "release 0 is the newest"
    server.publish("one")
    assert run(board, agent) == "release 1 is good"
    assert (word(board), agent.running, agent.restarts) == ("one", "one", 1)
    assert run(board, agent) == "release 1 is the newest"
    server.publish("two", pack="weights")
    assert run(board, agent) == "release 2 is good"
    assert word(board) == "two"
    assert (board.folder / "packs/minilm/word").read_text() == "weights"
    assert agent.restarts == 2
    assert where(board.folder, "good") == where(board.folder, "current")
    kits = [path for path in board.folder.iterdir() if (path / "word").is_file() and not path.is_symlink()]
    assert [path.name for path in kits] == [where(board.folder, "current")]
    assert not list((board.folder / "fetched").glob("*tar.gz"))


def test_canaries_come_first_then_a_share_then_all(server: Server, board: Board, agent: Agent) -> None:
    rollout = server.publish("one", share=0.0, canaries=("nano-7",))
    assert run(board, agent) == "release 1 has not reached this board yet"
    canary = Board(board.folder.with_name("canary"), "nano-7", "t1", server.url, board.root)
    assert run(canary, Agent(canary.folder)) == "release 1 is good"
    devices = [f"cam-{number}" for number in range(2000)]
    reached = {share: {name for name in devices if reaches(rollout, name, share)} for share in (0.1, 0.5)}
    assert len(reached[0.1]) == pytest.approx(200, abs=60)
    assert reached[0.1] < reached[0.5]
    assert {name for name in devices if reaches(rollout, name, 1.0)} == set(devices)
    server.publish("one", share=1.0)
    assert run(board, agent) == "release 2 is good"


def reaches(rollout: Rollout, device: str, share: float) -> bool:
    return Rollout(1, rollout.number, rollout.kits, {}, (), share).reaches(device)


# --- what does not come up -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", [["down"], ["starting", "starting", "down"], ["starting"]])
def test_a_board_goes_back_where_the_agent_does_not_come_up(
    server: Server, board: Board, agent: Agent, says: list[Health]
) -> None:
    server.publish("one", pack="weights")
    run(board, agent)
    server.publish("two", pack="others")
    agent.says["two"] = says
    with pytest.raises(RunFailedError, match="release 2 did not come up, and release 1 runs again"):
        run(board, agent, within_s=0.2)
    assert (word(board), agent.running) == ("one", "one")
    assert (board.folder / "packs/minilm/word").read_text() == "weights"
    assert run(board, agent) == "release 2 did not come up here, and is left out"
    server.publish("three")
    assert run(board, agent) == "release 3 is good"


def test_the_image_is_what_a_board_goes_back_to_at_first(server: Server, board: Board, agent: Agent) -> None:
    server.publish("bad")
    with pytest.raises(RunFailedError, match="release 0 runs again"):
        run(board, agent)
    assert not (board.folder / "current").is_symlink()
    assert agent.running == "image"


def test_a_broker_that_is_away_says_nothing_about_a_release(server: Server, board: Board, agent: Agent) -> None:
    server.publish("one")
    agent.says["one"] = ["waits"]
    assert run(board, agent) == "release 1: the agent waits for the broker; it is judged later"
    assert word(board) == "one"
    agent.says["one"] = ["starting", "up"]
    assert run(board, agent) == "release 1 is the newest"
    assert agent.restarts == 1


def test_a_moment_without_the_broker_delays_no_judgement(server: Server, board: Board, agent: Agent) -> None:
    server.publish("one")
    agent.says["one"] = ["starting", "waits", "waits", "up"]
    assert run(board, agent, away_s=60.0) == "release 1 is good"


class PowerCutError(Exception):
    """Nothing that was begun goes on."""


def cut_at(number: int, count: list[int], do: Callable[..., object]) -> Callable[..., object]:
    """The same, but the power is cut before the so-manyth call of all."""

    def run_it(*arguments: object, **options: object) -> object:
        count[0] += 1
        if count[0] == number:
            raise PowerCutError
        return do(*arguments, **options)

    return run_it


@pytest.mark.parametrize("good", [True, False])
def test_a_power_cut_at_any_write_ends_in_the_same_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: bool
) -> None:
    """Before each thing that is written in turn: states, links, folders that get their name."""
    ends = set()
    for cut in range(40):
        folder = tmp_path / str(cut)
        folder.mkdir()
        server = Server(folder)
        board = Board(folder / "kits", "nano-1", "t1", server.url, server.releases.root_file)
        agent = Agent(board.folder)
        server.publish("one", pack="weights")
        run(board, agent)
        server.publish("two" if good else "bad-two", pack="others")
        counted = functools.partial(cut_at, cut + 1, [0])
        with monkeypatch.context() as patch:
            for name in ("write_state", "point", "_unpack"):
                patch.setattr(update_module, name, counted(getattr(update_module, name)))
            patch.setattr(agent, "restart", counted(agent.restart))
            try:
                run(board, agent)
                broken_off = False
            except PowerCutError:
                broken_off = True
            except RunFailedError:
                broken_off = False
        if broken_off:
            agent.running = agent._kit()  # what starts with the next boot
            for _ in range(2):
                try:
                    said = run(board, agent)
                except RunFailedError:
                    said = ""
            assert said in ("release 2 is the newest", "release 2 did not come up here, and is left out")
        state = read_state(board.folder)
        ends.add((word(board), (board.folder / "packs/minilm/word").read_text(), agent.running, state.good, state.bad))
        server.close()
        if not broken_off:
            break
    assert cut > 5
    assert ends == {("two", "others", "two", 2, ()) if good else ("one", "weights", "one", 1, (2,))}


# --- whom a board believes -------------------------------------------------------------------------------------------


def test_an_archive_that_was_altered_is_refused(server: Server, board: Board, agent: Agent) -> None:
    server.publish("one")
    (archive,) = (server.folder / "releases" / TARGETS).glob("*.kit-one.tar.gz")
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    with pytest.raises(SignatureError, match="is refused"):
        run(board, agent)
    assert (agent.restarts, read_state(board.folder).trying) == (0, 0)


def test_a_release_of_another_repository_is_refused(server: Server, board: Board, agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Server(tmp_path / "other")
    try:
        other.publish("one")
        with pytest.raises(SignatureError, match="is refused"):
            run(Board(board.folder, "nano-1", "t1", other.url, board.root), agent)
    finally:
        other.close()


def test_an_older_state_of_the_repository_is_refused(server: Server, board: Board, agent: Agent) -> None:
    """Rollback: whoever holds the server brings back a release with a known hole."""
    server.publish("one")
    old = server.folder / "old"
    shutil.copytree(server.folder / "releases" / PUBLIC, old)
    server.publish("two")
    run(board, agent)
    shutil.rmtree(server.folder / "releases" / PUBLIC)
    old.rename(server.folder / "releases" / PUBLIC)
    with pytest.raises(SignatureError, match="is refused"):
        run(board, agent)
    assert word(board) == "two"


def test_a_repository_that_is_withheld_is_noticed(
    server: Server, board: Board, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freeze: it stands still until its timestamp expires; signed anew it counts again."""
    server.publish("one")
    monkeypatch.setattr(
        repository_module, "_expiry", lambda _: datetime.now(timezone.utc).replace(microsecond=0) - timedelta(days=1)
    )
    server.releases.renew()
    with pytest.raises(SignatureError, match="expired") as caught:
        run(board, agent)
    assert "fleetune release renew" in caught.value.remedy
    monkeypatch.undo()
    server.releases.renew()
    assert run(board, agent) == "release 1 is good"


def test_parts_of_different_releases_are_not_mixed(server: Server, board: Board, agent: Agent) -> None:
    server.publish("one")
    folder = server.folder / "releases" / METADATA
    first = Metadata[Timestamp].from_file(str(folder / "timestamp.json")).signed.snapshot_meta.version
    server.publish("two")
    shutil.copyfile(folder / f"{first}.snapshot.json", folder / f"{first + 1}.snapshot.json")
    with pytest.raises(SignatureError, match="is refused"):
        run(board, agent)


def test_an_archive_that_holds_something_else_than_announced_is_refused(
    server: Server, board: Board, agent: Agent
) -> None:
    part, file = server.archive("one")
    wrong = Part(part.target, "0" * 64)
    server.releases.publish(Rollout(1, 1, {"t1": wrong}, {}, share=1.0), {part.target: file})
    with pytest.raises(SignatureError, match="does not hold what was announced"):
        run(board, agent)
    assert agent.restarts == 0
    assert not (board.folder / ("0" * 12)).exists()


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_server_that_is_away_is_said_so(server: Server, board: Board, agent: Agent) -> None:
    gone = Board(board.folder, "nano-1", "t1", "http://127.0.0.1:1", board.root)
    with pytest.raises(RunFailedError, match="does not answer"):
        run(gone, agent)


def test_a_release_without_a_kit_for_this_tier_is_refused(server: Server, board: Board, agent: Agent) -> None:
    server.publish("one")
    with pytest.raises(ConfigError, match="no kit for tier t4"):
        run(Board(board.folder, "nano-1", "t4", server.url, board.root), agent)


def test_two_updates_at_once_are_refused(server: Server, board: Board, agent: Agent) -> None:
    board.folder.mkdir()
    with closing(FolderLock(board.folder)), pytest.raises(Exception, match="in use"):
        run(board, agent)


def test_a_repository_is_made_once_and_its_keys_are_its_owners(server: Server, tmp_path: Path) -> None:
    with pytest.raises(AuthorityError, match="already"):
        Releases.make(tmp_path / "releases", "https://updates.example.org")
    with pytest.raises(AuthorityError, match="no releases"):
        Releases(tmp_path / "elsewhere")
    server.releases.leave()
    (tmp_path / "releases/keys/root.pem").chmod(0o644)
    with pytest.raises(KeyExposedError, match=r"root\.pem"):
        Releases(tmp_path / "releases")
    (tmp_path / "releases/keys/root.pem").chmod(0o600)
    server.releases = Releases(tmp_path / "releases")


def test_nothing_private_is_public(server: Server) -> None:
    server.publish("one")
    for file in (server.folder / "releases" / PUBLIC).rglob("*"):
        assert not file.is_file() or b"PRIVATE KEY" not in file.read_bytes()


def test_a_damaged_rollout_is_refused_with_its_field() -> None:
    rollout = Rollout(1, 1, {}, {})
    assert read_rollout(write_rollout(rollout), "x") == rollout
    document = json.loads(write_rollout(rollout)) | {"share": 2}
    with pytest.raises(ConfigError, match="field share"):
        read_rollout(json.dumps(document).encode(), "x")
