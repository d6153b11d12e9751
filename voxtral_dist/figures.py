"""One matplotlib figure as an inline SVG, for charts.py and row_charts.py.

Text stays text, so that the reader's fonts show Hangul. Colours become the CSS variables of base.html, so that a chart
follows the reader's light or dark mode. The SVG holds no script, no address and no id that another chart has.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

COLOURS = {
    "#0072b2": "blue",
    "#d55e00": "vermillion",
    "#009e73": "green",
    "#cc79a7": "purple",
    "#e69f00": "orange",
    "#56b4e9": "sky",
}
"""Colours that the colour-blind tell apart (Okabe & Ito 2008) and the CSS variables that stand for them."""

MARKERS = "os^Dv"
"""A curve has a marker besides its colour."""

INK = "#010203"
"""Stands for the colour of the page's text."""

WIDTH_INCHES = 4.6

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
_EM = {False: 0.062, True: 0.112}
"""Inches that a narrow and a wide character take."""

_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"


def style(index: int) -> tuple[str, str]:
    """Colour and marker of the ``index``-th group of a chart."""
    return list(COLOURS)[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def plain(text: str, limit: int = 60) -> str:
    """A label on one line: no control character, no half of a surrogate pair, cut after ``limit`` characters."""
    flat = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return flat if len(flat) <= limit else f"{flat[: limit - 1]}…"


def tick(value: float, position: int | None = None) -> str:
    """A number at an axis: 0.25, 1500, 20k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.4g}{unit}".replace("-", "−")
    return re.sub(r"e(-?)\+?0*", r"e\1", f"{value:.6g}").replace("-", "−")


def label_axes(axes: Any, x_label: str, y_label: str = "") -> None:
    """Name the axes and write the numbers at them."""
    axes.set_xlabel(plain(x_label))
    axes.set_ylabel(plain(y_label))
    axes.xaxis.set_major_formatter(tick)
    axes.yaxis.set_major_formatter(tick)


def text_inches(labels: Sequence[str]) -> float:
    """Width of the longest label, by a rule: matplotlib has no font for Hangul and would take it for narrow."""
    return max(
        (sum(_EM[unicodedata.east_asian_width(char) in "WF"] for char in text) for text in labels), default=0
    )


def figure(
    title: str,
    draw: Callable[[Any], None],
    *,
    height: float = 2.1,
    legend: Sequence[str] = (),
    left: float = 0.5,
    right: float = 0.12,
    top: float = 0.08,
    bottom: float = 0.42,
) -> Markup:
    """A ``<figure>`` with caption, legend and chart.

    Args:
        title: the caption.
        draw: puts a chart on the matplotlib axes it is given.
        height: of the axes, in inches.
        legend: names of the groups, in the order of :func:`style`.
        left, right, top, bottom: room around the axes for what is written there, in inches.
    """
    svg = _svg(draw, height, (left, right, top, bottom))
    entries = Markup("").join(map(_legend_entry, range(len(legend)), legend))
    lines = Markup('<ul class="legend">{}</ul>').format(entries) if legend else ""
    caption = plain(title, 200)
    return Markup("<figure><figcaption>{}</figcaption>{}{}</figure>").format(
        caption, lines, _inline(svg, caption)
    )


def empty(title: str, reason: str = "no data") -> Markup:
    """What stands where there is nothing to draw."""
    caption = Markup("<figure><figcaption>{}</figcaption>").format(plain(title, 200))
    return caption + Markup('<p class="note">{}</p></figure>').format(reason)


def _svg(draw: Callable[[Any], None], height: float, room: tuple[float, float, float, float]) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    left, right, top, bottom = room
    whole = height + top + bottom
    place = (left / WIDTH_INCHES, bottom / whole, 1 - (left + right) / WIDTH_INCHES, height / whole)
    out = io.BytesIO()
    with matplotlib.rc_context(_RC | {"svg.hashsalt": "voxtral-dist"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        chart = Figure(figsize=(WIDTH_INCHES, whole))
        draw(chart.add_axes(place))
        chart.savefig(out, format="svg", transparent=True, metadata=_NO_METADATA)
    return out.getvalue()


def _inline(svg: bytes, title: str) -> Markup:
    """The SVG as part of an HTML page: no prolog, own ids, colours by CSS, coordinates to 1/100 point."""
    prefix = f"c{hashlib.sha256(svg + title.encode()).hexdigest()[:10]}-"
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"#([\w.]+)", svg.decode()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = {
            name.removeprefix(_XLINK): _attribute(name, value, prefix)
            for name, value in element.attrib.items()
            if name != "id" or value in used
        }
        if element.tag != "text":
            element.text = None
        element.tail = None
    root.attrib = {"class": "chart", "role": "img", "aria-label": title, "viewBox": root.attrib["viewBox"]}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "d":
        return re.sub(r"(\.\d\d)\d+", r"\1", " ".join(value.split()))
    if name == "id":
        return prefix + value
    if name.endswith("href"):
        return value.replace("#", f"#{prefix}", 1)
    if name == "style":
        value = re.sub(r"font-family: [^;]*;? ?|font: (?=\d)", "", value)
        for colour, variable in (*COLOURS.items(), (INK, "")):
            value = value.replace(colour, f"var(--{variable})" if variable else "currentColor")
    return value.replace("url(#", f"url(#{prefix}")


_SHAPES = {
    "o": '<circle cx="11" cy="5" r="3"/>',
    "s": '<path d="M8 2h6v6H8z"/>',
    "^": '<path d="M11 1.5 14.5 8h-7z"/>',
    "D": '<path d="M11 1 15 5 11 9 7 5z"/>',
    "v": '<path d="M11 8.5 14.5 2h-7z"/>',
}


def _legend_entry(index: int, label: str) -> Markup:
    colour, marker = style(index)
    swatch = f'<path d="M0 5H22" stroke-width="2"/>{_SHAPES[marker]}'
    variable = f"var(--{COLOURS[colour]})"
    drawing = f'<svg viewBox="0 0 22 10" style="fill:{variable};stroke:{variable}">{swatch}</svg>'
    return Markup("<li>{}{}</li>").format(Markup(drawing), plain(label))
