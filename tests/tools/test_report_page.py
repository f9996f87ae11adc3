"""The report's page: what it shows, that it shows nothing else's markup, and that it stands alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("jinja2", reason="the page needs fleetune[server]")
pytest.importorskip("matplotlib", reason="the page needs fleetune[server]")

from fleetune.tools.demo import plots
from fleetune.tools.demo.page import write_page

Report = dict[str, Any]
VOID = {"meta", "br", "link", "img", "input", "hr"}
GLOBAL_ROUNDS, PERSONAL_ROUNDS = 3, 2


def device(name: str, board: str, profile: str, scores: dict[str, float], *, baselines: bool) -> Report:
    """A device whose score rises by a point a round, up to its final ``scores``."""
    depths = [2, 2, 3, 3, 3]

    def entry(job: str, stage: str, number: int, depth: int, **metrics: float) -> Report:
        common = {"seconds": 2.0, "stopped_early": False, "bytes_up": 100 * number, "bytes_down": 90 * number}
        return (
            {"job": job, "stage": stage, "round": number, "depth": depth, "cpu_s": 3.1, "peak_mib": 88.5}
            | common
            | metrics
        )

    history = []
    if baselines:
        history += [
            entry("frozen-head", "prepare", 0, 0),
            entry("frozen-head", "train", 1, 0, test=scores["frozen_head"]),
        ]
        history.append(entry("standalone", "prepare", 0, 0))
        for number, depth in enumerate(depths, start=1):
            test = scores["standalone"] - 0.01 * (len(depths) - number)
            history.append(entry("standalone", "train", number, depth, test=test))
    history.append(entry("fedms", "prepare", 0, 0))
    for number in range(1, GLOBAL_ROUNDS + 1):
        test = scores["global_expert"] - 0.01 * (GLOBAL_ROUNDS + 1 - number)
        history.append(entry("fedms", "global", number, depths[number - 1], test=test, cpu_s=3.0 + number))
    for number in range(GLOBAL_ROUNDS + 1, GLOBAL_ROUNDS + PERSONAL_ROUNDS + 2):
        training = number <= GLOBAL_ROUNDS + PERSONAL_ROUNDS
        behind = 0.02 if training else 0.0
        history.append(
            entry(
                "fedms",
                "personal" if training else "evaluate",
                number,
                3,
                cpu_s=7.4 if training else 0.4,
                test_global=scores["global_expert"],
                test_local=scores["local_expert"] - behind,
                test_mixture=scores["mixture"] - behind,
            )
        )
    return {
        "id": name,
        "profile": profile,
        "board": board,
        "budget_mib": 120.0,
        "peak_mib": 112.4,
        "budget_cpu_s": 9.5,
        "cpu_s": [4.0, 5.0, 6.0, 7.4, 7.4],
        "blocks_total": 6,
        "blocks_active": depths,
        "plan": {
            "bound_by": "memory",
            "cache": "f16",
            "cache_mib": 15.12,
            "cpu_s": 8.1,
            "depth": 3,
            "micro_batch": 4,
            "peak_mib": 110.3,
            "recompute": True,
        },
        "stopped_early": 0,
        "bytes_up": 422_079,
        "bytes_down": 1_485_030,
        "samples": 300,
        "accuracy": {
            key: value for key, value in scores.items() if baselines or key not in ("frozen_head", "standalone")
        },
        "gate_local": 0.625,
        "history": history,
    }


def make_report(*, baselines: bool = True) -> Report:
    """A finished run of two devices that broke nothing."""
    names = ("frozen_head", "standalone", "global_expert", "local_expert", "mixture")
    cam = dict(zip(names, (0.6, 0.7, 0.73, 0.78, 0.82), strict=True))
    arm = dict(zip(names, (0.8, 0.74, 0.75, 0.79, 0.78), strict=True))
    devices = [
        device("cam-1", "NVIDIA Jetson Nano 2GB", "jetson-nano-2gb", cam, baselines=baselines),
        device("arm-2", "Raspberry Pi 5", "raspberry-pi-5", arm, baselines=baselines),
    ]
    devices[1]["plan"] |= {"cache": "none", "cache_mib": 0.0}
    devices[1] |= {"budget_mib": 300.5, "peak_mib": 147.6, "budget_cpu_s": 60.0}
    return {
        "schema": 1,
        "kit": "0.1.0",
        "fleet": "warehouse",
        "seed": 17,
        "seconds": 171.0,
        "transport": {"broker": "rumqttd", "protocol": 5, "url": "mqtt://127.0.0.1:18830"},
        "method": "fedms",
        "backbones": [
            {
                "id": "minilm",
                "architecture": "bert",
                "blocks": 6,
                "source_sha256": "5" * 64,
                "sha256_before": "e" * 64,
                "sha256_after": "e" * 64,
            }
        ],
        "data": {"name": "reviews", "train": 300, "val": 60, "test": 100, "classes": 2},
        "settings": {"global_rounds": GLOBAL_ROUNDS, "learning_rate": 0.002},
        "devices": devices,
        "summary": {
            "accuracy": {key: (cam[key] + arm[key]) / 2 for key in devices[0]["accuracy"]},
            "inside_memory_budget": True,
            "inside_cpu_budget": True,
            "bytes_up": 844_158,
            "bytes_down": 2_970_060,
        },
    }


def drawing(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 (it is the page's own)


class Page(HTMLParser):
    """The page as a browser's tree would have it, flattened to what the tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.badges: dict[str, str] = {}
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        self.svgs = [drawing(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        words = " ".join(data.split())
        if not words or "style" in self._open:
            return
        self.text += words + "\n"
        if "td" in self._open or "th" in self._open:
            row = self.tables[-1][-1]
            row[-1] = f"{row[-1]} {words}".strip()
        kinds = [attributes.get("class", "") for tag, attributes in self.elements if tag == "li"]
        if "li" in self._open and kinds[-1] in ("held", "broken") and words not in "✓✗":
            self.badges[words] = kinds[-1]

    def plot(self, name: str) -> list[str]:
        """What a plot's title, description and labels say."""
        svg = next(svg for svg in self.svgs if svg.get("aria-labelledby") == f"{name}-title")
        return ["".join(e.itertext()) for e in svg.iter() if e.tag.split("}")[-1] in ("title", "desc", "text")]


@pytest.fixture(scope="module")
def render(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Report], Page]:
    path = tmp_path_factory.mktemp("run") / "report.html"

    def write(report: Report) -> Page:
        write_page(report, path)
        return Page(path.read_text(encoding="utf-8"))

    return write


@pytest.fixture(scope="module")
def page(render: Callable[[Report], Page]) -> Page:
    return render(make_report())


def test_the_headline_says_what_ran(page: Page) -> None:
    for fact in (
        "Fleet warehouse",
        "minilm (bert, 6 blocks)",
        "reviews: 300 training, 100 test samples a device",
        "2.9 minutes",
        "Fleetune 0.1.0",
    ):
        assert fact in page.text
    assert "Seed\n17\n" in page.text
    assert "3 rounds for a global expert, then 2 for local experts" in page.text.replace("\n", " ")


def test_everything_that_held_is_badged_as_held(page: Page) -> None:
    assert page.badges == dict.fromkeys(("Memory budgets held", "CPU budgets held", "Backbone unchanged"), "held")


def test_five_accuracies_are_compared_and_the_mixtures_gain_is_given(page: Page) -> None:
    rows = [row[:1] + row[2:] for row in page.tables[0][1:]]
    for row, (name, *numbers) in zip(
        rows,
        (
            ("Frozen backbone + head", "70.0 %", "+10.0 points", "1 / 0 / 1"),
            ("Stand-alone adapters", "72.0 %", "+8.0 points", "2 / 0 / 0"),
            ("Global expert", "74.0 %", "+6.0 points", "2 / 0 / 0"),
            ("Local expert", "78.5 %", "+1.5 points", "1 / 0 / 1"),
            ("Mixture", "80.0 %", "", ""),
        ),
        strict=True,
    ):
        assert row[0].startswith(name)
        assert row[1:] == numbers


def test_a_loss_has_a_minus_and_a_draw_no_sign(render: Callable[[Report], Page]) -> None:
    report = make_report()
    for some in report["devices"]:
        some["accuracy"] |= {
            "local_expert": some["accuracy"]["mixture"],
            "standalone": some["accuracy"]["mixture"] + 0.05,
        }
    rows = render(report).tables[0]
    assert rows[2][3:] == ["−5.0 points", "0 / 0 / 2"]
    assert rows[4][3:] == ["0.0 points", "0 / 2 / 0"]


def test_every_device_has_its_five_accuracies_and_its_gate(page: Page) -> None:
    assert page.tables[1][1:] == [
        ["cam-1", "60.0 %", "70.0 %", "73.0 %", "78.0 %", "82.0 %", "62.5 %"],
        ["arm-2", "80.0 %", "74.0 %", "75.0 %", "79.0 %", "78.0 %", "62.5 %"],
        ["Mean", "70.0 %", "72.0 %", "74.0 %", "78.5 %", "80.0 %", ""],
    ]


def test_every_device_has_its_board_budgets_plan_and_use(page: Page) -> None:
    plans = [["3 of 6", "4", "recompute", cache, "memory"] for cache in ("f16, 15.1 MiB", "none")]
    traffic = ["422 kB", "1.49 MB"]
    assert page.tables[2][2:] == [
        ["cam-1 NVIDIA Jetson Nano 2GB (profile jetson-nano-2gb)"],
        ["120.0", "110.3", "112.4", *plans[0], "9.5", "6.0", "7.4", "0", *traffic],
        ["arm-2 Raspberry Pi 5 (profile raspberry-pi-5)"],
        ["300.5", "110.3", "147.6", *plans[1], "60.0", "6.0", "7.4", "0", *traffic],
    ]


@pytest.mark.parametrize(
    ("plot", "says"),
    [
        ("accuracy", ["stage 2", "stand-alone adapters", "FedMS: mixture", "frozen backbone + head"]),
        ("memory", ["112.4 of 120.0 MiB", "147.6 of 300.5 MiB", "budget", "measured peak"]),
        (
            "cpu",
            ["9.5 s", "60 s", "stage 2", "cam-1: at most 7.4 s of 9.5 s. arm-2: at most 7.4 s of 60.0 s"],
        ),
        ("depth", ["stage 2", "cam-1: 2, 2, 3, 3, 3 of 6 blocks. arm-2: 2, 2, 3, 3, 3 of 6 blocks"]),
    ],
)
def test_every_plot_names_every_device_and_says_in_words_what_it_draws(page: Page, plot: str, says: list[str]) -> None:
    for words in ("cam-1", "arm-2", *says):
        assert words in page.plot(plot)


def test_a_score_stands_at_the_rounds_of_training_that_it_follows() -> None:
    lines = plots.accuracy_series(make_report()["devices"][0])
    assert lines["standalone"] == pytest.approx({1: 0.66, 2: 0.67, 3: 0.68, 4: 0.69, 5: 0.7})
    assert lines["global"] == pytest.approx({0: 0.7, 1: 0.71, 2: 0.72, 3: 0.73})
    assert lines["local"] == pytest.approx({3: 0.73, 4: 0.76, 5: 0.78})
    assert lines["mixture"] == pytest.approx({3: 0.73, 4: 0.8, 5: 0.82})


def test_settings_and_hashes_are_there(page: Page) -> None:
    for row in (
        ["settings.learning_rate", "0.002"],
        ["data.test", "100"],
        ["transport.broker", "rumqttd"],
    ):
        assert row in page.tables[3]
    assert page.html.count("e" * 64) == 2
    assert "5" * 64 in page.html


def test_what_few_test_samples_mean_is_said(page: Page) -> None:
    assert "standard error of up to 4.9 points" in page.text.replace("\n", " ")


@pytest.mark.parametrize(
    ("changes", "badge", "cell", "bar"),
    [
        (
            {"peak_mib": 120.1},
            "Memory budget broken: cam-1",
            "120.1 over budget",
            "120.1 of 120.0 MiB, over budget",
        ),
        (
            {"cpu_s": [4.0, 9.6]},
            "CPU budget broken: cam-1",
            "9.6 over budget",
            "cam-1: at most 9.6 s of 9.5 s",
        ),
    ],
)
def test_a_broken_budget_shows_as_broken(
    render: Callable[[Report], Page], changes: Report, badge: str, cell: str, bar: str
) -> None:
    report = make_report()
    report["devices"][0] |= changes
    page = render(report)
    assert page.badges[badge] == "broken"
    assert list(page.badges.values()).count("held") == 2
    assert cell in page.tables[2][3]
    assert "over budget" not in " ".join(page.tables[2][5])
    assert any(bar in words for words in page.plot("memory") + page.plot("cpu"))


@pytest.mark.parametrize("kind", ["memory", "cpu"])
def test_a_budget_that_the_summary_calls_broken_is_not_called_held(render: Callable[[Report], Page], kind: str) -> None:
    report = make_report()
    report["summary"][f"inside_{kind}_budget"] = False
    assert list(render(report).badges.values()).count("broken") == 1


def test_a_changed_backbone_shows_as_changed(render: Callable[[Report], Page]) -> None:
    report = make_report()
    report["backbones"][0]["sha256_after"] = "f" * 64
    assert render(report).badges["Backbone changed"] == "broken"


def test_a_round_over_its_budget_is_drawn_as_such(render: Callable[[Report], Page]) -> None:
    report = make_report()
    next(e for e in report["devices"][0]["history"] if e["stage"] == "personal")["cpu_s"] = 11.0
    page = render(report)
    assert "over budget" in page.plot("cpu")
    assert "over budget" not in page.plot("memory")


def test_text_is_text_and_never_markup(render: Callable[[Report], Page], page: Page) -> None:
    report = make_report()
    name, board = "<script>alert(1)</script>", '"><img src=x onerror="alert(2)"> $\\alpha$ &amp;'
    report["devices"][0] |= {"id": name, "board": board, "profile": "</svg><b> $x^2$"}
    report |= {
        "fleet": "</title><script>",
        "data": {"name": board},
        "settings": {"<i>": "</details><iframe>"},
    }
    hostile = render(report)
    assert {tag for tag, _ in hostile.elements} == {tag for tag, _ in page.elements}
    assert hostile.tables[2][2] == [f"{name} {board} (profile </svg><b> $x^2$)"]
    assert ["settings.<i>", "</details><iframe>"] in hostile.tables[3]
    assert "</svg><b> $x^2$" in hostile.plot("cpu")
    for plot in ("accuracy", "memory", "cpu", "depth"):
        assert any(words.startswith("<script>alert(1)") for words in hostile.plot(plot))


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    fetching = {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "audio",
        "video",
        "source",
        "base",
        "form",
    }
    assert not fetching & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "action", "poster"} & attributes.keys(), tag
        assert attributes.get("href", "#").startswith("#"), tag
    rest = re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', "", page.html)
    assert not re.search(r"https?://|@import|url\((?!#)", rest)
    assert "default-src 'none'" in page.html


def test_ids_are_unique_and_every_reference_meets_one(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', page.html))
    references |= {
        attributes[name]
        for _, attributes in page.elements
        for name in ("aria-labelledby", "aria-describedby")
        if name in attributes
    }
    assert references
    assert references <= set(ids)


def test_tables_and_figures_speak_to_a_screen_reader(page: Page) -> None:
    assert len(page.svgs) == 4
    for svg in page.svgs:
        assert svg.get("role") == "img"
        title, desc = list(svg)[:2]
        assert title.text
        assert desc.text
        assert svg.get("aria-labelledby") == title.get("id")
        assert svg.get("aria-describedby") == desc.get("id")
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")


def test_nothing_is_drawn_in_a_colour_that_the_dark_scheme_cannot_change(page: Page) -> None:
    assert sorted(re.findall(r"--plot-([\w-]+):", page.html)) == sorted([*plots.COLOURS, *plots.COLOURS])
    for tag, attributes in page.elements:
        if "style" in attributes:
            fixed = re.sub(r"var\(--plot-[\w-]+, #\w+\)", "", attributes["style"])
            assert not re.search(r"#[0-9a-f]{3,}", fixed), tag
    texts = [attributes for tag, attributes in page.elements if tag == "text"]
    assert texts
    assert all("fill: var(--plot-" in attributes["style"] for attributes in texts)


def test_a_run_without_baselines_renders(render: Callable[[Report], Page]) -> None:
    page = render(make_report(baselines=False))
    assert [row[0].split(" expert")[0] for row in page.tables[0][1:]][:2] == ["Global", "Local"]
    assert page.tables[1][1] == ["cam-1", "73.0 %", "78.0 %", "82.0 %", "62.5 %"]
    assert not re.search("stand-alone|frozen backbone \\+", page.text, re.IGNORECASE)


def test_one_device_that_is_always_right_renders(render: Callable[[Report], Page]) -> None:
    report = make_report()
    report["devices"] = report["devices"][:1]
    report["devices"][0]["accuracy"] = dict.fromkeys(report["devices"][0]["accuracy"], 1.0)
    assert render(report).tables[1][1][5] == "100.0 %"


def test_a_fleet_that_does_not_fill_its_rows_of_panels_is_drawn() -> None:
    report = make_report()
    report["devices"] = [deepcopy(report["devices"][0]) | {"id": f"device-{number}"} for number in range(6)]
    for plot in (plots.accuracy, plots.memory, plots.cpu, plots.depth):
        elements = list(drawing(plot(report)).iter())
        words = ["".join(element.itertext()) for element in elements]
        assert all(f"device-{number}" in words for number in range(6))
        panels = [element for element in elements if "-axes_" in element.get("id", "")]
        assert len(panels) == (1 if plot is plots.memory else 6)


def test_the_same_report_gives_the_same_bytes(page: Page, tmp_path: Path) -> None:
    write_page(make_report(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page.html
