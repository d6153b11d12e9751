"""How the error rate of one task varies: with length, duration, speaking rate, language, domain and speaker."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from voxtral_dist.error_rows import Row
from voxtral_dist.predictions import cluster
from voxtral_dist.significance import bootstrap_interval

LENGTH_EDGES = (0, 5, 10, 20, 40, 80, 160)
"""Upper ends of the bins of the reference length, in characters without blanks."""

SECOND_EDGES = (1, 2, 5, 10, 20, 30)
"""Upper ends of the bins of the audio duration, in seconds."""

RATE_BINS = 5
"""Bins of the speaking rate, with about as many rows in each."""

MIN_SPEAKER_ROWS = 5
"""Rows from which a speaker's rate is shown."""

MOST_GROUPS = 20
TRIALS = 2_000
"""Resamples behind an interval of a group; headline intervals take five times as many."""

NOT_GIVEN = "(not given)"


def dimensions(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """The metric by reference length, audio duration, speaking rate, language, domain and speaker; what no row has is
    left out.

    Returns:
        for each a list of groups: ``group``; ``n`` rows; ``value`` of the metric; ``interval``, 95 % by bootstrap over
        speakers or documents, or None; ``share`` of all errors of the task. Bins are in order, the others are worst
        first; of speakers, those with 5 rows or more, at most the 20 worst.
    """
    tables = {
        "reference_characters": _binned(rows, [row.ref_chars for row in rows], LENGTH_EDGES, step=1),
        "audio_seconds": _binned(rows, [row.seconds or None for row in rows], SECOND_EDGES),
    }
    if rows[0].transcript:
        speed = [row.ref_chars / row.seconds if row.seconds and row.ref_chars else None for row in rows]
        known = [value for value in speed if value is not None]
        edges = (
            np.unique(np.quantile(known, np.arange(1, RATE_BINS) / RATE_BINS).round(1)).tolist()
            if known
            else []
        )
        tables["characters_per_second"] = _binned(rows, speed, edges)
    for field in ("language", "domain", "speaker"):
        tables[field] = _by_field(rows, field)
    return {name: table for name, table in tables.items() if table}


def _binned(
    rows: Sequence[Row], values: Sequence[float | None], edges: Sequence[float], step: int = 0
) -> list[dict[str, Any]]:
    """Groups by bins (low, high]; ``step`` 1 labels whole numbers."""
    bins: defaultdict[int, list[Row]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        if value is not None:
            bins[bisect_left(edges, value)].append(row)
    total = sum(row.errors for row in rows)
    return [_group(_bin_label(edges, place, step), bins[place], total) for place in sorted(bins)]


def _bin_label(edges: Sequence[float], place: int, step: int) -> str:
    if place == len(edges):
        return f"over {edges[-1]:g}" if edges else "all"
    low, high = (edges[place - 1] + step if place else 0), edges[place]
    return f"{high:g}" if low == high else f"{low:g}–{high:g}"


def _by_field(rows: Sequence[Row], field: str) -> list[dict[str, Any]]:
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.record[field] or NOT_GIVEN].append(row)
    if set(found) == {NOT_GIVEN}:
        return []
    if field == "speaker":
        found.pop(NOT_GIVEN, None)
    least = MIN_SPEAKER_ROWS if field == "speaker" else 1
    kept = sorted((item for item in found.items() if len(item[1]) >= least), key=_group_badness)[:MOST_GROUPS]
    total = sum(row.errors for row in rows)
    inside: Callable[[Row], str] = _document if field == "speaker" else _cluster
    return [_group(name, members, total, inside) for name, members in kept]


def _group_badness(item: tuple[str, Sequence[Row]]) -> tuple[float, str]:
    name, rows = item
    units = sum(row.denominator for row in rows)
    return (-sum(row.errors for row in rows) / units if units else -math.inf, name)


def _cluster(row: Row) -> str:
    return cluster(row.record)


def _document(row: Row) -> str:
    """What is resampled among the rows of one speaker."""
    return row.record.get("document") or row.record["id"]


def _group(
    name: str, rows: Sequence[Row], all_errors: float, clusters: Callable[[Row], str] = _cluster
) -> dict[str, Any]:
    top, bottom = [row.numerator for row in rows], [row.denominator for row in rows]
    interval = bootstrap_interval(top, bottom, list(map(clusters, rows)), trials=TRIALS)
    return {
        "group": name,
        "n": len(rows),
        "value": sum(top) / sum(bottom) if sum(bottom) else None,
        "interval": None if interval is None else list(interval),
        "share": sum(row.errors for row in rows) / all_errors if all_errors else 0.0,
    }
