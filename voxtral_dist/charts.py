"""Charts with two numeric axes: curves, distributions, clouds of points.

Each function returns a ``<figure>`` to put into a template. Titles and labels may be any text, they are shown as they
are. A number that is not finite is left out; a chart without any number says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from voxtral_dist.figures import INK, empty, figure, label_axes, plain, style

MARKERS_PER_CURVE = 8

MOST_DOTS = 3000
"""Points of one group in a scatter plot; of more, every second, third ... is drawn, which the legend says."""


class Series(NamedTuple):
    """A curve or a cloud of points; ``low`` and ``high`` are the edges of a band around a curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str = "",
    log_y: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Curves.

    Args:
        title: caption.
        series: one curve each.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        log_y: logarithmic vertical axis; values up to 0 are left out.
        marks: vertical lines with a word at each, for example where a stage begins.
    """
    curves = [_points(one, log_y) for one in series]
    if not any(len(curve) for curve in curves):
        return empty(title)

    def draw(axes: Any) -> None:
        for index, curve in enumerate(curves):
            _draw_curve(axes, index, curve)
        for x, text in marks:
            _draw_mark(axes, x, text)
        if log_y:
            _log_axis(axes, curves)
        label_axes(axes, x_label, y_label)

    names = [one.label for one in series] if len(series) > 1 else []
    return figure(title, draw, legend=names, left=0.62 if y_label else 0.5)


def _points(series: Series, positive: bool) -> np.ndarray:
    """float64 [n, 4]: x, y, low, high of the points that can be drawn, in the order given."""
    edges = [series.y if edge is None else edge for edge in (series.low, series.high)]
    rows = np.array([series.x, series.y, *edges], dtype=np.float64).T.reshape(-1, 4)
    return rows[np.isfinite(rows).all(axis=1) & ((rows[:, 1] > 0) | (not positive))]


def _draw_curve(axes: Any, index: int, curve: np.ndarray) -> None:
    colour, marker = style(index)
    every = max(1, len(curve) // MARKERS_PER_CURVE) if len(curve) > 30 else 1
    first = index * every // 3 % every
    x, y, low, high = curve.T
    axes.plot(x, y, color=colour, marker=marker, markevery=(first, every))
    if (low != high).any():
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)


def _draw_mark(axes: Any, x: float, text: str) -> None:
    left, right = axes.get_xlim()
    side, gap = ("right", -2) if x > (left + right) / 2 else ("left", 2)
    axes.axvline(x, color=INK, linewidth=0.8, alpha=0.5, linestyle=":")
    place = {"xycoords": axes.get_xaxis_transform(), "xytext": (gap, -1), "textcoords": "offset points"}
    axes.annotate(plain(text, 24), (x, 1.0), **place, fontsize=7, alpha=0.8, ha=side, va="top")


def _log_axis(axes: Any, curves: Sequence[np.ndarray]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    values = np.concatenate([curve[:, 1] for curve in curves])
    decades = np.log10(values.max() / values.min())
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=8))
    axes.yaxis.set_minor_formatter(NullFormatter())


def histogram(title: str, groups: Mapping[str, Sequence[float]], *, x_label: str, bins: int = 30) -> Markup:
    """How many values of each group fall where; all groups share the same bins."""
    values = [np.array(group, dtype=np.float64) for group in groups.values()]
    values = [group[np.isfinite(group)] for group in values]
    pooled = np.concatenate(values) if values else np.zeros(0)
    if not len(pooled):
        return empty(title)
    edges = np.histogram_bin_edges(pooled, bins)

    def draw(axes: Any) -> None:
        for index, group in enumerate(values):
            counts, (colour, marker) = np.histogram(group, edges)[0], style(index)
            axes.stairs(counts, edges, color=colour, linewidth=1.4, fill=False)
            axes.stairs(counts, edges, color=colour, alpha=0.18, fill=True)
            if len(values) > 1:
                axes.plot((edges[1:] + edges[:-1]) / 2, counts, marker, color=colour, markersize=2.5)
        axes.set_ylim(bottom=0)
        label_axes(axes, x_label, "rows")

    return figure(title, draw, legend=list(groups) if len(groups) > 1 else [], left=0.62)


def scatter(title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> Markup:
    """Clouds of points, one marker and colour for each group."""
    clouds = [_points(one, False) for one in series]
    if not any(len(cloud) for cloud in clouds):
        return empty(title)
    steps = [-(-len(cloud) // MOST_DOTS) or 1 for cloud in clouds]

    def draw(axes: Any) -> None:
        for index, (cloud, step) in enumerate(zip(clouds, steps, strict=True)):
            colour, marker = style(index)
            x, y = cloud[::step, 0], cloud[::step, 1]
            axes.plot(x, y, marker, color=colour, markersize=3, alpha=0.55, markeredgewidth=0)
        label_axes(axes, x_label, y_label)

    names = [
        f"{one.label} (1 of {step})" if step > 1 else one.label
        for one, step in zip(series, steps, strict=True)
    ]
    return figure(title, draw, height=2.5, left=0.62, legend=names if len(names) > 1 or steps[0] > 1 else [])
