"""Emoji-8: vendors' names become one, pictures are what was drawn, and what npm brings is the pinned bytes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import shutil
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fleetune.edge.protocol.errors import AssetError, ConfigError, DataError
from fleetune.tools.assets import ASSETS, fetch, fetch_carrier
from fleetune.tools.assets.emoji import draw, read_emoji
from fleetune.tools.assets.emoji_sets import GROUPS, EmojiSet, catalogue, read_set
from fleetune.tools.assets.registry import Asset, Member, NpmCarrier
from support.lacking import lacking

PEOPLE, NATURE, ACTIVITIES, OBJECTS = map(GROUPS.index, ("People & Body", "Animals & Nature", "Activities", "Objects"))
VERSION = "1.0.0"


def colour(name: str) -> dict[str, object]:
    return {"body": f'<path fill="{name}" d="M0 0h8v8h-8z"/>'}


def tarball(folder: Path, vendor: str, files: Mapping[str, object]) -> Path:
    path = folder / f"iconify-json-{vendor}-{VERSION}.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def package(vendor: str, icons: object, **files: object) -> dict[str, object]:
    return {
        "package.json": {"name": f"@iconify-json/{vendor}", "version": VERSION},
        "icons.json": {"prefix": vendor, "width": 8, "height": 8, "icons": icons, "aliases": files.pop("aliases", {})},
        "info.json": {
            "name": vendor.title(),
            "author": {"name": f"{vendor}'s painters", "url": f"https://{vendor}.example"},
            "license": {"title": "MIT", "spdx": "MIT", "url": "https://mit.example"},
        },
        "metadata.json": files.pop("metadata", {}),
        "chars.json": files.pop("chars", {}),
    }


def categories(**own: list[str]) -> dict[str, object]:
    """Unicode's groups, of which some have emoji; OpenMoji writes them without the ``&``."""
    names = {group.replace(" & ", " "): list[str]() for group in GROUPS}
    return {"categories": {**names, **{key.replace("_", " "): value for key, value in own.items()}}}


NEW = package(
    "new",
    {
        "cricket": colour("green"),
        "cricket-game": colour("red"),
        "man-dancing": colour("blue"),
        "man-dancing-dark-skin-tone": colour("brown"),
        "woman-dancing": colour("navy"),
        "police-car-light": colour("maroon"),
        "rocket": {**colour("silver"), "hidden": True},
        "flag-norway": colour("purple"),
    },
    chars={"1f997": "cricket", "1f3cf": "cricket-game", "1f57a-fe0f": "man-dancing"},
    metadata=categories(
        Animals_Nature=["cricket"],
        Activities=["cricket-game"],
        Objects=["police-car-light", "rocket"],
        People_Body=["man-dancing", "man-dancing-dark-skin-tone", "woman-dancing", "dancer-dark"],
        Flags=["flag-norway"],
    ),
)
OLD = package(
    "old",
    {
        "cricket-game": colour("red"),
        "dancer": colour("teal"),
        "dancer-dark": colour("black"),
        "revolving-light": colour("maroon"),
        "unheard-of": colour("gold"),
    },
    chars={"1f57a": "dancer"},
    aliases={"cricket": {"parent": "cricket-game"}, "police-car-light": {"parent": "revolving-light"}},
    metadata={"categories": {"People": ["dancer"], "Objects": ["unheard-of"]}},
)
"""A vendor who sorts emoji by groups of its own, and calls them what they were called once."""


@pytest.fixture
def sets(tmp_path: Path) -> list[EmojiSet]:
    return [read_set(tarball(tmp_path, name, files)) for name, files in (("new", NEW), ("old", OLD))]


def pinned(folder: Path, *packages: tuple[str, Mapping[str, object]]) -> Asset:
    """An Emoji-8 of packages that lie in a folder."""
    paths = [(tarball(folder, vendor, files), f"@iconify-json/{vendor}@{VERSION}") for vendor, files in packages]
    members = tuple(
        Member(path.name, name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path, name in paths
    )
    carrier = NpmCarrier(tuple(name for _, name in paths))
    return dataclasses.replace(ASSETS["emoji-8"], members=members, carrier=carrier)


# --- names


def test_one_emoji_has_one_name_and_one_group_whatever_a_vendor_calls_it(sets: list[EmojiSet]) -> None:
    assert [(emoji.vendor, emoji.name, emoji.group) for emoji in catalogue(sets)] == [
        (0, "cricket", NATURE),  # no game, though one vendor has that as another name of the game
        (0, "cricket-game", ACTIVITIES),
        (0, "man-dancing", PEOPLE),
        (0, "woman-dancing", PEOPLE),
        (0, "police-car-light", OBJECTS),  # that is no skin
        (1, "cricket-game", ACTIVITIES),
        (1, "man-dancing", PEOPLE),
        (1, "police-car-light", OBJECTS),
    ]


def test_where_vendors_disagree_the_first_ones_group_counts_for_all(tmp_path: Path) -> None:
    made = []
    for vendor, own in (("new", {"Animals_Nature": ["crab"]}), ("old", {"Food_Drink": ["crab"]})):
        files = package(vendor, {"crab": colour("red")}, metadata=categories(**own))
        made.append(read_set(tarball(tmp_path, vendor, files)))
    assert [emoji.group for emoji in catalogue(made)] == [NATURE, NATURE]


def test_who_does_it_is_no_other_subject_but_what_is_done_is(sets: list[EmojiSet]) -> None:
    subjects = {emoji.name: emoji.subject for emoji in catalogue(sets)}
    assert subjects["man-dancing"] == subjects["woman-dancing"]
    assert len(set(subjects.values())) == 4


@pytest.mark.parametrize("lost", ["icons.json", "package.json"])
def test_a_package_without_a_file_is_named(lost: str, tmp_path: Path) -> None:
    path = tarball(tmp_path, "new", {name: content for name, content in NEW.items() if name != lost})
    with pytest.raises(AssetError, match=f"{path} is no set of emoji .*{lost}"):
        read_set(path)


def test_a_damaged_package_is_named(tmp_path: Path) -> None:
    path = tarball(tmp_path, "new", {**NEW, "icons.json": {"icons": [1]}})
    with pytest.raises(AssetError, match=f"{path} is no set of emoji"):
        read_set(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(AssetError, match=f"{path} is no set of emoji"):
        read_set(path)


# --- pictures


def drawn(tmp_path: Path, *vendors: Mapping[str, object]) -> tuple[list[tuple[int, str]], np.ndarray]:
    """Vendor and name of each picture that stays, and the pictures."""
    made = []
    for place, icons in enumerate(vendors):
        files = package(f"v{place}", icons, metadata=categories(Objects=list(icons)))
        made.append(read_set(tarball(tmp_path, f"v{place}", files)))
    pictures, names = draw(made, catalogue(made), lambda _: None)
    kept = [(int(v), names.names[n]) for v, n in zip(pictures.vendors, pictures.names, strict=True)]
    return kept, pictures.images


def test_pictures_have_their_colours_on_white(tmp_path: Path) -> None:
    corner = {"body": '<path fill="#ff8000" d="M0 0h4v4h-4z"/><path fill="#000" fill-opacity=".5" d="M4 4h4v4h-4z"/>'}
    _, images = drawn(tmp_path, {"corner": corner})
    assert images.shape == (1, 3, 32, 32)
    assert images.dtype == np.uint8
    assert images[0, :, 0, 0].tolist() == [255, 128, 0]
    assert images[0, :, 0, 31].tolist() == [255, 255, 255]
    assert images[0, :, 31, 31] == pytest.approx(128, abs=1)


def test_what_is_not_square_stays_in_proportion(tmp_path: Path) -> None:
    _, images = drawn(tmp_path, {"tall": {"body": '<path d="M0 0h4v8h-4z"/>', "width": 4}})
    assert (images[0, 0] == 0).sum(axis=0).tolist() == [0] * 8 + [32] * 16 + [0] * 8


def test_pictures_of_which_nothing_is_seen_and_those_that_a_vendor_has_twice_are_left_out(tmp_path: Path) -> None:
    icons = {"man": colour("red"), "person": colour("red"), "white": colour("#fff"), "blue": colour("blue")}
    kept, images = drawn(tmp_path, icons, {"person": colour("red")})
    assert kept == [(0, "man"), (0, "blue"), (1, "person")]
    assert len(images) == 3


# --- fetching


@pytest.fixture
def emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with packages that are the pinned ones."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setitem(ASSETS, "emoji-8", pinned(folder, ("new", NEW), ("old", OLD)))
    return folder


def test_pictures_are_drawn_once_and_say_who_drew_them(
    emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetch("emoji-8", local=emoji, cache=tmp_path)
    assert "draws new" in capsys.readouterr().err
    pictures, names = read_emoji(folder)
    assert names.groups == GROUPS
    assert names.vendors == ("new", "old")
    rows = zip(pictures.vendors, pictures.names, pictures.labels, strict=True)
    assert [(int(v), names.names[n], int(g)) for v, n, g in rows][5:] == [
        (1, "cricket-game", ACTIVITIES),
        (1, "man-dancing", PEOPLE),
        (1, "police-car-light", OBJECTS),
    ]
    attribution = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for word in (
        "3 pictures, from the npm package @iconify-json/old@1.0.0",
        "old's painters",
        "https://old.example",
        "MIT",
    ):
        assert word in attribution
    assert fetch("emoji-8", local=emoji, cache=tmp_path) == folder
    assert capsys.readouterr().err == ""


def test_altered_pictures_are_refused_and_lost_ones_drawn_again(emoji: Path, tmp_path: Path) -> None:
    folder = fetch("emoji-8", local=emoji, cache=tmp_path)
    file = folder / "emoji-8.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AssetError, match=f"{file} has SHA-256"):
        fetch("emoji-8", local=emoji, cache=tmp_path)
    file.unlink()
    assert fetch("emoji-8", local=emoji, cache=tmp_path) == folder
    assert file.read_bytes() == whole


def test_without_what_draws_the_error_says_what_to_install(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError, match=r"resvg_py.*\.\[experiment\]"):
        fetch("emoji-8", local=emoji, cache=tmp_path)


@pytest.mark.parametrize("case", ["label", "shape", "column", "missing"])
def test_pictures_that_do_not_fit_their_names_are_refused(case: str, emoji: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(fetch("emoji-8", local=emoji, cache=tmp_path), folder)
    file = folder / "emoji-8.safetensors"
    tensors = load_file(file)
    if case == "label":
        tensors["labels"][0] = len(GROUPS)
    elif case == "shape":
        tensors["images"] = tensors["images"][:, :, :16].copy()
    elif case == "column":
        del tensors["subjects"]
    save_file(tensors, file)
    if case == "missing":
        file.unlink()
    with pytest.raises(DataError, match=str(folder)):
        read_emoji(folder)


# --- npm


@contextmanager
def registry(packages: Mapping[str, bytes]) -> Iterator[str]:
    """A registry of npm packages on this machine: name with scope → tarball."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/").lower().replace("%2f", "/")
            body = packages.get(name.removesuffix(".tgz"), b"")
            if body and not name.endswith(".tgz"):
                integrity = "sha512-" + base64.b64encode(hashlib.sha512(body).digest()).decode()
                dist = {"tarball": f"{url}/{name}.tgz", "integrity": integrity}
                version = {"name": name, "version": VERSION, "dist": dist}
                body = json.dumps(
                    {"name": name, "dist-tags": {"latest": VERSION}, "versions": {VERSION: version}}
                ).encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """npm, which has nothing in its cache and no patience."""
    if shutil.which("npm") is None:
        lacking("needs npm: apt-get install npm")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm-cache"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    return monkeypatch


def test_npm_brings_the_pinned_packages_and_no_others(emoji: Path, tmp_path: Path, npm: pytest.MonkeyPatch) -> None:
    tarballs = {path.name: path.read_bytes() for path in emoji.iterdir()}
    served = {f"@iconify-json/{name.split('-')[2]}": content for name, content in tarballs.items()}
    with registry(served) as url:
        npm.setenv("npm_config_registry", url)
        folder = fetch_carrier("emoji-8", cache=tmp_path / "good")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == tarballs
    other = tarball(tmp_path, "old", {**OLD, "chars.json": {}}).read_bytes()
    with registry({**served, "@iconify-json/old": other}) as url:
        npm.setenv("npm_config_registry", url)
        with pytest.raises(AssetError, match=f"@iconify-json/old@{VERSION}") as caught:
            fetch_carrier("emoji-8", cache=tmp_path / "bad")
    assert ASSETS["emoji-8"].members[1].sha256 in caught.value.what
    assert [path.name for path in (tmp_path / "bad" / "assets").iterdir()] == [".lock"]


def test_without_a_registry_the_error_says_why_and_what_to_copy(tmp_path: Path, npm: pytest.MonkeyPatch) -> None:
    with registry({}) as url:
        npm.setenv("npm_config_registry", url)
        with pytest.raises(AssetError, match="cannot be had: Not Found - GET") as caught:
            fetch("emoji-8", cache=tmp_path)
    assert "iconify-json-noto-1.2.9.tgz" in caught.value.what
    assert "copy iconify-json-noto-1.2.9.tgz" in caught.value.remedy


def test_without_npm_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match="this system has no npm"):
        fetch("emoji-8", cache=tmp_path)


def test_the_published_packages_hold_emoji_of_eight_groups_by_eight_vendors() -> None:
    """The npm registry is needed once, for 27 MB; a few dozen pictures are drawn."""
    try:
        folder = fetch_carrier("emoji-8")
    except AssetError as error:
        lacking(f"needs the npm registry: {error.what}")
    sets = [read_set(folder / member.file) for member in ASSETS["emoji-8"].members]
    found = list(catalogue(sets))
    assert len(found) == 11_548
    assert min(Counter(emoji.vendor for emoji in found).values()) > 900
    groups = Counter(emoji.group for emoji in found)
    assert sorted(groups) == list(range(8))
    assert min(groups.values()) > 600
    assert max(Counter((emoji.vendor, emoji.name) for emoji in found).values()) == 1
    few = [emoji for emoji in found if emoji.name in ("cricket-game", "lemon", "rocket", "man-running", "skull")]
    pictures, names = draw(sets, few, lambda _: None)
    labels = {names.names[n]: GROUPS[g] for n, g in zip(pictures.names, pictures.labels, strict=True)}
    assert labels["lemon"] == "Food & Drink"
    assert labels["rocket"] == "Travel & Places"
    assert labels["skull"] == "Smileys & Emotion"
    lemons = pictures.images[pictures.names == names.names.index("lemon")].astype(float)
    assert len(lemons) == 8
    red, _, blue = lemons.mean(axis=(0, 2, 3))
    assert red - blue > 40  # they are yellow
    assert len({lemon.tobytes() for lemon in lemons}) == 8
