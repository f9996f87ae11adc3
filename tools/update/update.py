"""Takes the newest release that reaches this board, and goes back where its agent does not come up with it.

A power cut may come anywhere. On disk are the release that is good, the one that is tried, and where each link led
before and leads with it: whoever finds a release that is being tried goes on with that.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec
from tuf.api.exceptions import DownloadError, RepositoryError
from tuf.ngclient import Updater, UpdaterConfig

from fleetune.edge.protocol.errors import ConfigError, RunFailedError, SignatureError
from fleetune.edge.protocol.files import FolderLock, make_folder, read_bytes, sync_folder
from fleetune.tools.release.rollout import FILE as ROLLOUT
from fleetune.tools.release.rollout import MAX_ROLLOUT, Part, Rollout, read_rollout
from fleetune.tools.staging import staged
from fleetune.tools.trees import SHORT, extract, tree_digest
from fleetune.tools.update.services import Health, Service
from fleetune.tools.update.state import CURRENT, GOOD, PACKS, State, point, read_state, where, write_state

_METADATA, _FETCHED = "metadata", "fetched"


@dataclass(frozen=True)
class Board:
    """What an update needs to know of a board.

    Attributes:
        folder: Where its kits lie.
        device: Its id.
        tier: Its platform tier.
        url: Of the releases, as far as ``metadata`` and ``targets``.
        root: Root metadata that it came with: whom it believes.
    """

    folder: Path
    device: str
    tier: str
    url: str
    root: bytes


def update(
    board: Board,
    agent: Service,
    *,
    within_s: float = 1800.0,
    away_s: float = 60.0,
    say: Callable[[str], None],
    pause_s: float = 5.0,
) -> str:
    """Take what is new, if it reaches this board.

    Args:
        board: This one.
        agent: Its service.
        within_s: Seconds that an agent has to come up; measuring anew what training costs takes minutes.
        away_s: Seconds that it may wait for its broker, as any does for a moment, before it is judged another time.
        say: Called with what is done next.
        pause_s: Between two looks at the agent.

    Returns:
        What came of it, in a line.

    Raises:
        SignatureError: What the server has is not what the fleet's operator signed, or is older than what is known.
        RunFailedError: The server does not answer, or the new release does not come up and the old one runs again.
        RunFolderError: Another update runs.
    """
    make_folder(board.folder)
    with closing(FolderLock(board.folder, remedy="wait until that update is over")):
        state, trial = read_state(board.folder), _Trial(board.folder, agent, within_s, away_s, pause_s, say)
        if state.trying:
            said = trial.go_on(state)
            state = read_state(board.folder)
            if state.trying:
                return said
        rollout, fetch = _newest(board)
        if rollout is None or rollout.number <= state.good:
            return f"release {state.good} is the newest"
        if rollout.number in state.bad:
            return f"release {rollout.number} did not come up here, and is left out"
        if not rollout.reaches(board.device):
            return f"release {rollout.number} has not reached this board yet"
        links = _bring(board, rollout, fetch, say)
        changed = {link: target for link, target in links.items() if where(board.folder, link) != target}
        if not changed:
            write_state(board.folder, msgspec.structs.replace(state, good=rollout.number))
            return f"release {rollout.number}: it is here already"
        before = {link: where(board.folder, link) for link in changed}
        tried = msgspec.structs.replace(state, trying=rollout.number, before=before, after=changed, started=False)
        write_state(board.folder, tried)
        return trial.go_on(tried)


class _Trial:
    """A release that is tried: begun, or found so by whoever comes after a power cut."""

    def __init__(
        self, folder: Path, agent: Service, within_s: float, away_s: float, pause_s: float, say: Callable[[str], None]
    ) -> None:
        self._folder, self._agent, self._say = folder, agent, say
        self._within_s, self._away_s, self._pause_s = within_s, away_s, pause_s

    def go_on(self, state: State) -> str:
        """Keep the release, or go back to the one before; what was done already is done again.

        Raises:
            RunFailedError: It did not come up.
        """
        if state.trying in state.bad:
            self._go_back(state)
        if not state.started:
            self._point(state.after)
            self._say(f"release {state.trying}: the agent starts anew")
            self._agent.restart()
            state = msgspec.structs.replace(state, started=True)
            write_state(self._folder, state)
        health = self._health()
        if health == "waits":
            return f"release {state.trying}: the agent waits for the broker; it is judged later"
        if health != "up":
            self._say(f"release {state.trying} does not come up: back to {state.good}")
            state = msgspec.structs.replace(state, bad=(*state.bad, state.trying))
            write_state(self._folder, state)
            self._go_back(state)
        point(self._folder, GOOD, where(self._folder, CURRENT))
        write_state(self._folder, State(good=state.trying, bad=state.bad))
        _sweep(self._folder)
        return f"release {state.trying} is good"

    def _health(self) -> Health:
        """What becomes of the agent, unless that takes too long."""
        now = time.monotonic()
        ends, back = now + self._within_s, now + self._away_s
        while (health := self._agent.health()) in ("starting", "waits"):
            now = time.monotonic()
            if health == "starting":
                back = now + self._away_s
            if now >= min(ends, back):
                break
            time.sleep(self._pause_s)
        return health

    def _go_back(self, state: State) -> NoReturn:
        self._point(state.before)
        self._agent.restart()
        write_state(self._folder, State(good=state.good, bad=state.bad))
        raise RunFailedError(
            f"release {state.trying} did not come up, and release {state.good} runs again",
            "journalctl -u fleetune-agent says why; publish another: `fleetune release publish`, or `withdraw`",
        )

    def _point(self, links: Mapping[str, str]) -> None:
        for link, target in links.items():
            point(self._folder, link, target)


def _newest(board: Board) -> tuple[Rollout | None, Callable[[Part], Path]]:
    """The newest rollout, and what fetches its parts."""
    metadata, fetched = board.folder / _METADATA, board.folder / _FETCHED
    for folder in (metadata, fetched):
        make_folder(folder)
    url = board.url.rstrip("/")
    config = UpdaterConfig(app_user_agent="fleetune")
    try:
        updater = Updater(
            str(metadata), f"{url}/metadata", str(fetched), f"{url}/targets", config=config, bootstrap=board.root
        )
        updater.refresh()
        info = updater.get_targetinfo(ROLLOUT)
        if info is None:
            return None, lambda _: Path()
        if info.length > MAX_ROLLOUT:
            raise SignatureError(f"{url}: the rollout is larger than {MAX_ROLLOUT >> 20} MiB", "publish it anew")
        file = Path(updater.download_target(info))
        rollout = read_rollout(read_bytes(file, MAX_ROLLOUT), f"{url}, {ROLLOUT}")
    except DownloadError as error:
        raise RunFailedError(
            f"{url} does not answer: {error}", "see that the server runs, and that it is reached"
        ) from error
    except (RepositoryError, ValueError) as error:
        raise _refused(url, error) from error

    def fetch(part: Part) -> Path:
        try:
            found = updater.get_targetinfo(part.target)
            if found is None:
                raise SignatureError(f"{url} has no {part.target}", "publish the release again")
            return Path(updater.find_cached_target(found) or updater.download_target(found))
        except DownloadError as error:
            raise RunFailedError(f"{url}: {part.target}: {error}", "it is tried again") from error
        except (RepositoryError, ValueError) as error:
            raise _refused(url, error) from error

    return rollout, fetch


def _refused(url: str, error: Exception) -> SignatureError:
    return SignatureError(
        f"{url} is refused: {error}",
        "see who serves it; an expired timestamp is signed anew with `fleetune release renew`",
    )


def _bring(board: Board, rollout: Rollout, fetch: Callable[[Part], Path], say: Callable[[str], None]) -> dict[str, str]:
    """Unpack what is not here yet; returns link → where it has to lead."""
    links = dict[str, str]()
    if rollout.kits and board.tier not in rollout.kits:
        raise ConfigError(
            f"release {rollout.number} has no kit for tier {board.tier}", "publish it with a build for that tier"
        )
    parts = [(rollout.kits[board.tier], CURRENT, "")] if rollout.kits else []
    parts += [(part, f"{PACKS}/{name}", f".{name}-") for name, part in rollout.packs.items()]
    for part, link, prefix in parts:
        name = f"{prefix}{part.digest[:SHORT]}"
        place = (board.folder / link).parent / name
        if not place.is_dir():
            say(f"release {rollout.number}: {part.target}")
            archive = fetch(part)
            _unpack(archive, place, part.digest)
            archive.unlink()
        links[link] = name
    return links


def _unpack(archive: Path, target: Path, digest: str) -> None:
    """Unpack an archive, all at once or not at all."""
    make_folder(target.parent)
    with staged(target.parent) as scratch:
        tree = scratch / "tree"
        tree.mkdir()
        extract(archive, tree)
        if tree_digest(tree) != digest:
            raise SignatureError(f"{archive.name} does not hold what was announced", "publish the release anew")
        tree.rename(target)
    sync_folder(target.parent)


def _sweep(folder: Path) -> None:
    """Remove kits and packs that no link leads to."""
    kept = {where(folder, link) for link in (CURRENT, GOOD)}
    for path in folder.iterdir():
        named = len(path.name) == SHORT and all(letter in "0123456789abcdef" for letter in path.name)
        if path.is_dir() and not path.is_symlink() and named and path.name not in kept:
            shutil.rmtree(path)
    packs = folder / PACKS
    if packs.is_dir():
        used = {where(packs, path.name) for path in packs.iterdir() if path.is_symlink()}
        for path in packs.iterdir():
            if path.is_dir() and not path.is_symlink() and path.name.startswith(".") and path.name not in used:
                shutil.rmtree(path)
