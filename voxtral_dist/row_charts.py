"""Charts with a row of text for each value: bars, forest plots, tables in colour. Titles and labels may be any text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from voxtral_dist.figures import COLOURS, INK, empty, figure, label_axes, plain, text_inches
from voxtral_dist.report import number

BLUE = next(iter(COLOURS))


def interval_chart(
    title: str,
    labels: Sequence[str],
    centers: Sequence[float | None],
    lows: Sequence[float | None],
    highs: Sequence[float | None],
    *,
    x_label: str,
    zero: bool = True,
) -> Markup:
    """A forest plot: a point and its interval for each label.

    Args:
        title: caption.
        labels: the first one at the top.
        centers: the estimates; an undefined one is written n/a.
        lows: lower ends of the intervals.
        highs: upper ends.
        x_label: of the horizontal axis.
        zero: draw the line at 0; a point whose interval holds 0 is then hollow.
    """
    rows = [tuple(map(_finite, row)) for row in zip(centers, lows, highs, strict=True)]
    if not any(center is not None for center, _, _ in rows):
        return empty(title)

    def draw(axes: Any) -> None:
        if zero:
            axes.axvline(0.0, color=INK, linewidth=0.8, linestyle="--")
        for place, (center, low, high) in enumerate(rows):
            if center is None:
                axes.annotate("n/a", (0.02, place), xycoords=("axes fraction", "data"), va="center")
                continue
            excludes_zero = low is None or high is None or not low <= 0.0 <= high
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=BLUE, linewidth=1.6)
            axes.plot(
                center,
                place,
                "o",
                color=BLUE,
                markersize=5.5,
                fillstyle="full" if excludes_zero or not zero else "none",
            )
        label_axes(axes, x_label)
        _rows(axes, labels)

    return figure(title, draw, **_room(labels))


def heatmap(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    digits: int = 3,
) -> Markup:
    """A table with coloured cells; with negative values the colours part at 0. An undefined cell is written n/a."""
    cells = np.array([[np.nan if _finite(v) is None else v for v in row] for row in values], dtype=np.float64)
    if not np.isfinite(cells).any():
        return empty(title)
    signed = bool(np.nanmin(cells) < 0)
    top = float(np.nanmax(np.abs(cells)))
    limits = (-top, top) if signed else (float(np.nanmin(cells)), float(np.nanmax(cells)))

    widest = text_inches([plain(name, 24) for name in columns])
    long = widest * len(columns) > 3.0

    def draw(axes: Any) -> None:
        import matplotlib

        colours = matplotlib.colormaps["PuOr" if signed else "cividis"]
        mesh = axes.pcolormesh(np.ma.masked_invalid(cells), cmap=colours, vmin=limits[0], vmax=limits[1])
        mesh.set_edgecolor("none")
        for (row, column), value in np.ndenumerate(cells):
            red, green, blue, _ = mesh.to_rgba(value) if np.isfinite(value) else (1, 1, 1, 0)
            dark = np.isfinite(value) and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            ink = INK if not np.isfinite(value) else "white" if dark else "black"
            text = f"{value:{'+' if signed else ''}.{digits}f}" if np.isfinite(value) else "n/a"
            axes.text(column + 0.5, row + 0.5, text, color=ink, ha="center", va="center")
        names = [plain(name, 24) for name in columns]
        turned = {"rotation": 30, "ha": "left"} if long else {}
        axes.set_xticks(np.arange(len(columns)) + 0.5, names, **turned)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [plain(name, 36) for name in rows])
        axes.invert_yaxis()
        axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    room = {"top": 0.25 + widest / 2 * long, "right": 0.1 + 0.8 * widest * long, "bottom": 0.05}
    return figure(title, draw, **_room(rows) | room)


def bar_chart(
    title: str,
    labels: Sequence[str],
    values: Sequence[float | None],
    *,
    x_label: str = "",
    intervals: Sequence[tuple[float, float] | None] | None = None,
) -> Markup:
    """Horizontal bars from 0, the first label at the top; an undefined value is written n/a."""
    if not len(labels):
        return empty(title)
    spans = list(intervals) if intervals is not None else [None] * len(labels)
    ends = [_finite(value) or 0.0 for value in values]

    def draw(axes: Any) -> None:
        axes.barh(range(len(labels)), ends, height=0.62, color=BLUE)
        for place, (value, end, span) in enumerate(zip(values, ends, spans, strict=True)):
            if span is not None:
                axes.plot(span, [place, place], color=INK, linewidth=1.0, marker="|", markersize=6)
            right = max(end, 0.0, *(span or ()))
            axes.annotate(
                number(_finite(value)), (right, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.margins(x=0.16)
        _rows(axes, labels)
        label_axes(axes, x_label)
        _rows(axes, labels)

    return figure(title, draw, **_room(labels))


def _rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [plain(label, 36) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _room(labels: Sequence[str]) -> dict[str, Any]:
    """Size of the axes and of the margin for the labels, in inches."""
    return {
        "height": 0.12 + 0.21 * len(labels),
        "left": 0.15 + text_inches([plain(label, 36) for label in labels]),
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
