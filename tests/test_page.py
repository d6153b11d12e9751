"""Pages: any text is inert and legible, charts hold the numbers they were given, nothing is loaded from anywhere."""

from __future__ import annotations

import base64
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from harness import ROOT
from markupsafe import Markup

from voxtral_dist import figures, page
from voxtral_dist.page import Series

SHORT = '<script>alert(1)</script> $x^2$ "한국어"'
HOSTILE = (
    f"{SHORT}'><img src=http://evil.example/x onerror=alert(1)>"
    "</svg></style></title><!-- ]]> --> \\frac{$ \x00\x1b\ud800 &lt;"
)

CHARTS: dict[str, Callable[[str], Markup]] = {
    "line": lambda t: page.line_chart(
        t, [Series(t, [1, 2], [3, 4]), Series(t, [1], [2])], x_label=t, y_label=t, marks=[(1, t), (2, t)]
    ),
    "bar": lambda t: page.bar_chart(t, [t, "b"], [0.5, None], x_label=t, intervals=[(0.4, 0.6), None]),
    "histogram": lambda t: page.histogram(t, {t: [1, 2, 2], "b": [3]}, x_label=t),
    "interval": lambda t: page.interval_chart(t, [t], [0.1], [0.0], [0.2], x_label=t),
    "heatmap": lambda t: page.heatmap(t, [t], [t, "b"], [[0.5, None]]),
    "scatter": lambda t: page.scatter(
        t, [Series(t, [1, 2], [3, 4]), Series("b", [1], [1])], x_label=t, y_label=t
    ),
    "empty": lambda t: page.line_chart(t, [], x_label=t),
}


class Seen(HTMLParser):
    """Elements, attributes and text of a page as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def words(self) -> str:
        """The text with one blank between any two words, also where an element ends."""
        return " ".join(" ".join(self.pieces).split())

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def check_inert(html: str) -> Seen:
    """No script, no handler, no address but anchors, data and relative links; the prolog of no XML file."""
    seen = Seen(html)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "image"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    for name in ("href", "src", "xlink:href", "action", "data"):
        assert all(re.match(r"#|data:audio/flac;base64,|[\w.-]+(/|$)", value) for value in seen.values(name))
    assert not any("url(" in value and "url(#" not in value for _, value in seen.attributes)
    assert "<!DOCTYPE svg" not in html and "<?xml" not in html and "\x00" not in html
    return seen


@pytest.mark.parametrize("name", CHARTS)
def test_hostile_text_is_shown_and_does_nothing(name: str) -> None:
    chart = CHARTS[name](HOSTILE)
    seen = check_inert(str(chart))
    assert SHORT in seen.text and "img" not in seen.tags
    assert seen.tags[:2] == ["figure", "figcaption"] and seen.tags.count("style") == 0
    str(chart).encode()


@pytest.mark.parametrize("name", [name for name in CHARTS if name != "empty"])
def test_labels_stay_text_without_mathematics_and_bytes_stay_equal(name: str) -> None:
    chart = CHARTS[name]("a $x^2$ 라벨")
    assert "$x^2$ 라벨" in "".join(re.findall(r"<text[^>]*>([^<]*)</text>", chart))
    assert "http" not in chart
    CHARTS["heatmap"]("another in between")
    assert CHARTS[name]("a $x^2$ 라벨") == chart


def test_ids_of_all_charts_of_a_page_differ_and_references_hit() -> None:
    charts = [chart(title) for title in ("first", "second") for chart in CHARTS.values()]
    seen = Seen("".join(map(str, charts)))
    ids = seen.values("id")
    used = re.findall(r'(?:href="|url\()#([^")]+)', "".join(map(str, charts)))
    assert len(ids) > 10 and len(set(ids)) == len(ids) and set(used) == set(ids)


def vertices(chart: Markup, variable: str = "blue") -> int:
    """Points of the one curve in this colour."""
    style = rf'style="fill: none; stroke: var\(--{variable}\)'
    (path,) = re.findall(rf'd="([^"]*)"[^>]*{style}', str(chart))
    assert path.count("M") == 1, "in one piece"
    return len(re.findall("[ML]", path))


def test_a_curve_has_the_points_it_was_given() -> None:
    zigzag = [float(n % 2) + n / 100 for n in range(57)]
    assert vertices(page.line_chart("t", [Series("a", range(57), zigzag)], x_label="step")) == 57
    holes = [None if n == 3 else float("inf") if n == 4 else value for n, value in enumerate(zigzag)]
    assert vertices(page.line_chart("t", [Series("a", range(57), holes)], x_label="step")) == 55  # type: ignore[arg-type]
    signs = [value - 1 if n % 2 == 0 else value for n, value in enumerate(zigzag)]
    positive = sum(value > 0 for value in signs)
    assert 0 < positive < 57
    assert (
        vertices(page.line_chart("t", [Series("a", range(57), signs)], x_label="step", log_y=True))
        == positive
    )


def test_curves_differ_in_colour_and_marker_and_are_named() -> None:
    series = [Series(name, [1, 2, 3], [1, n, 2]) for n, name in enumerate(("asr", "sqa", "tqa"))]
    chart = str(page.line_chart("t", series, x_label="step", y_label="nats", marks=[(2, "listen")]))
    legend = re.findall(r"<li>(.*?)</li>", chart)
    assert [Seen(entry).text for entry in legend] == ["asr", "sqa", "tqa"]
    assert len({re.sub("var.*?;", "", entry.rsplit("</svg>")[0]) for entry in legend}) == 3, "markers"
    assert len({figures.style(index) for index in range(12)}) == 12
    for word in ("step", "nats", "listen"):
        assert f">{word}</text>" in chart


def test_a_band_lies_behind_a_curve() -> None:
    plain = page.line_chart("t", [Series("a", [1, 2], [1, 2], [1, 2], [1, 2])], x_label="step")
    band = page.line_chart("t", [Series("a", [1, 2], [1, 2], [0, 1], [2, 3])], x_label="step")
    assert "fill-opacity: 0.16" in band and "fill-opacity" not in plain


def test_numbers_are_written_at_bars_and_cells() -> None:
    bars = Seen(str(page.bar_chart("t", ["asr", "sqa"], [0.98765, None], intervals=[(0.9, 1.0), None]))).text
    assert "0.9877" in bars and "n/a" in bars
    cells = Seen(str(page.heatmap("t", ["base", "all"], ["asr", "sqa"], [[0.5, None], [0.25, 1.0]]))).text
    assert all(word in cells for word in ("base", "sqa", "0.500", "0.250", "n/a")) and "+" not in cells
    signed = Seen(str(page.heatmap("t", ["all"], ["asr", "sqa"], [[-0.5, 0.25]], digits=1))).text
    assert "-0.5" in signed and "+0.2" in signed


def test_an_interval_that_holds_zero_is_hollow() -> None:
    arguments = (["a"], [0.1], [-0.1], [0.3])
    hollow = "fill-opacity: 0; stroke: var(--blue)"
    assert hollow in page.interval_chart("t", *arguments, x_label="d")
    assert hollow not in page.interval_chart("t", ["a"], [0.2], [0.1], [0.3], x_label="d")
    assert hollow not in page.interval_chart("t", *arguments, x_label="d", zero=False)
    assert "n/a" in page.interval_chart("t", ["a", "b"], [0.1, None], [0, None], [1, None], x_label="d")


def test_a_histogram_counts_every_value() -> None:
    chart = page.histogram(
        "t", {"right": [0.0] * 40 + [1.0], "wrong": [0.5, float("nan")]}, x_label="s", bins=10
    )
    text = Seen(str(chart)).text
    assert ">40</text>" in chart and all(word in text for word in ("right", "wrong", "rows"))


def test_a_cloud_too_large_is_thinned_out_and_says_so() -> None:
    few = page.scatter("t", [Series("few", range(50), range(50))], x_label="x", y_label="y")
    assert few.count("<use") - few.count('class="legend"') >= 50 and "1 of" not in few
    many = page.scatter("t", [Series("many", range(7000), range(7000))], x_label="x", y_label="y")
    assert "many (1 of 3)" in many and 2333 < many.count("<use") < 2400


@pytest.mark.parametrize(
    "chart",
    [
        page.line_chart("t", [Series("a", [1], [float("nan")])], x_label="x"),
        page.line_chart("t", [Series("a", [1, 2], [0.0, -1.0])], x_label="x", log_y=True),
        page.bar_chart("t", [], []),
        page.histogram("t", {"a": []}, x_label="x"),
        page.interval_chart("t", ["a"], [None], [None], [None], x_label="x"),
        page.heatmap("t", ["a"], ["b"], [[None]]),
        page.heatmap("t", [], [], []),
        page.scatter("t", [Series("a", [], [])], x_label="x", y_label="y"),
    ],
)
def test_nothing_to_draw_is_said(chart: Markup) -> None:
    assert "no data" in chart and "<svg" not in chart


def test_sound_lies_in_the_page() -> None:
    data = bytes(range(256))
    seen = check_inert(str(page.player(data)))
    (source,) = seen.values("src")
    assert base64.b64decode(source.split(",")[1]) == data and ("preload", "none") in seen.attributes


def test_numbers_of_templates() -> None:
    assert (page.number(0.25), page.number(None)) == ("0.2500", "n/a")
    assert (page.percent(0.1234), page.percent(None)) == ("12.3 %", "n/a")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--output_dir /home/alice/runs/a: full", "--output_dir a: full"),
        ("'/home/alice/x y' and ~/secret/b.", "'x y' and b."),
        (
            "at 3/4 of mistralai/Voxtral-Mini-3B and data/asr",
            "at 3/4 of mistralai/Voxtral-Mini-3B and data/asr",
        ),
        ("/data", "/data"),
    ],
)
def test_messages_lose_their_folders(text: str, shown: str) -> None:
    assert page.without_folders(text) == shown


def test_pages_are_private_and_written_whole(tmp_path: Path) -> None:
    page.write(tmp_path / "a.html", "half of a pair: \ud800 한")
    assert (tmp_path / "a.html").read_text("utf-8") == "half of a pair: ? 한"
    assert stat.S_IMODE((tmp_path / "a.html").stat().st_mode) == 0o600 and len(list(tmp_path.iterdir())) == 1


def test_the_base_page_lets_nothing_in() -> None:
    base = (Path(page.__file__).parent / "templates" / "base.html").read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', base)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'" and "script-src" not in rules
    assert rules["img-src"] == rules["media-src"] == "data:" and rules["style-src"] == "'unsafe-inline'"
    assert "http" not in base.replace("http-equiv", "") and "@import" not in base and "<html lang=" in base


def test_the_import_is_cheap() -> None:
    code = "import sys, voxtral_dist.run_report; print({'matplotlib', 'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
