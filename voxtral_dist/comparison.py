"""Evaluations of the same samples against a baseline: what is better, what is worse, and what is not known.

    comparison = compare([baseline, candidate])
    write_page(comparison, Path("comparison.html"))

The p-values speak of these models on other samples of this kind. What another training run with another seed would
give they do not say: for that, compare arms with several seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from voxtral_dist.comparison_page import write_page
from voxtral_dist.differences import (
    ALPHA,
    Row,
    counts,
    described,
    judge,
    lead_metric,
    macro,
    metrics_of,
    tested,
)
from voxtral_dist.errors import UserError
from voxtral_dist.predictions import EvalResult
from voxtral_dist.record_scores import Record, by_task
from voxtral_dist.scoring import ERROR_RATES

__all__ = ["compare", "write_page"]

SAME_FIELDS = ("references", "prompt", "language")
"""What makes a sample the same question in two evaluations."""

DECODE_SETTINGS = ("max_new_tokens", "max_len", "sqa_question")
"""Entries of ``provenance`` that must not differ where both evaluations name them."""

GROUP_FIELDS = ("language", "domain")

MOST_CHANGED = 8
"""Samples shown per task and direction."""


def compare(results: Sequence[EvalResult], *, trials: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Compare every result with the first.

    Args:
        results: the baseline, then what is compared with it; the same twice is allowed.
        trials: bootstrap resamples and sign vectors of each test.
        seed: of both.

    Returns:
        For JSON, without any path: ``results`` (names, the baseline first), ``normalizer``, ``settings``, ``samples``
        by task, ``trials``, ``seed``, ``tests`` (as many as Holm's correction is for), and ``against``: for each other
        result its ``name``, ``rows`` (:func:`~voxtral_dist.differences.tested` and judged), ``macro``, ``groups`` by
        field (rows with a ``value``, intervals only), ``outcomes`` by task (samples better, same, worse) and
        ``changed`` by task and direction.

    Raises:
        UserError: fewer than two results; results that are not comparable, see :func:`aligned`; too few trials for any
            verdict.
    """
    if len(results) < 2:
        raise UserError(f"a comparison needs two evaluations, {len(results)} given; name the baseline first")
    sides, names = aligned(results), unique_names(results)
    pairs = [(sides[0], side) for side in sides[1:]]
    against = [
        {"name": name, **_against(a, b, trials, seed)} for name, (a, b) in zip(names[1:], pairs, strict=True)
    ]
    rows = [row for other in against for row in other["rows"]]
    judge(rows)
    _check_trials(rows, trials)
    provenance = results[0].metrics.get("provenance", {})
    return {
        "results": names,
        "normalizer": results[0].metrics.get("normalizer"),
        "settings": {name: provenance[name] for name in DECODE_SETTINGS if name in provenance},
        "samples": {task: len(records) for task, records in by_task(sides[0]).items()},
        "trials": trials,
        "seed": seed,
        "tests": sum(row["p"] is not None for row in rows),
        "against": against,
    }


def _check_trials(rows: Sequence[Row], trials: int) -> None:
    drawn = sum(row["exact"] is False for row in rows)
    tests = sum(row["p"] is not None for row in rows)
    if drawn and tests / (trials + 1) >= ALPHA:
        raise UserError(
            f"{trials} trials cannot show a difference among {tests} tests, the smallest p would be too large after "
            f"Holm's correction; give at least {math.ceil(2 * tests / ALPHA)}"
        )


def unique_names(results: Sequence[EvalResult]) -> list[str]:
    """The results' names; of equal ones the later are numbered."""
    names: list[str] = []
    for result in results:
        name, number = result.name, 1
        while name in names:
            number += 1
            name = f"{result.name} ({number})"
        names.append(name)
    return names


def aligned(results: Sequence[EvalResult]) -> list[Sequence[Record]]:
    """The records of each result in the order of the first.

    Raises:
        UserError: samples are missing or added, a reference, prompt or language differs, the normaliser or a decode
            setting differs; names the first offender and how many there are.
    """
    base, name = results[0], results[0].name
    keys = {_key(record): record for record in base.records}
    sides: list[Sequence[Record]] = [base.records]
    for other in results[1:]:
        _check_settings(base, other)
        theirs = {_key(record): record for record in other.records}
        _refuse([key for key in keys if key not in theirs], f"{other.name} lacks", f" of {name}")
        _refuse([key for key in theirs if key not in keys], f"{name} lacks", f" of {other.name}")
        for field in SAME_FIELDS:
            changed = [key for key, record in keys.items() if theirs[key][field] != record[field]]
            _refuse(changed, f"{other.name} has another {field} than {name} in")
        sides.append([theirs[key] for key in keys])
    return sides


def _key(record: Record) -> tuple[str, str]:
    return record["task"], record["id"]


def _refuse(keys: Sequence[tuple[str, str]], before: str, after: str = "") -> None:
    if keys:
        samples = (
            f"{len(keys)} sample{'s' * (len(keys) > 1)} ({'/'.join(keys[0])}{' first' * (len(keys) > 1)})"
        )
        raise UserError(f"{before} {samples}{after}; compare evaluations of the same dev data")


def _check_settings(base: EvalResult, other: EvalResult) -> None:
    ours, theirs = base.metrics.get("normalizer"), other.metrics.get("normalizer")
    if ours != theirs:
        raise UserError(
            f"{other.name} was scored under {theirs}, {base.name} under {ours}; their numbers do not compare, "
            "score both alike with tools/rescore.py"
        )
    settings, others = base.metrics.get("provenance", {}), other.metrics.get("provenance", {})
    for name in DECODE_SETTINGS:
        if name in settings and name in others and settings[name] != others[name]:
            raise UserError(
                f"{other.name} was decoded with {name} {others[name]!r}, {base.name} with {settings[name]!r}; "
                "the difference would not be the model's, evaluate both alike"
            )


def _against(a: Sequence[Record], b: Sequence[Record], trials: int, seed: int) -> dict[str, Any]:
    ours, theirs = by_task(a), by_task(b)
    return {
        "rows": [
            tested(ours[task], theirs[task], metric, trials=trials, seed=seed)
            for task in ours
            for metric in metrics_of(task, ours[task])
        ],
        "macro": macro(a, b, trials=trials, seed=seed),
        "groups": {field: list(_groups(a, b, field, trials, seed)) for field in GROUP_FIELDS},
        "outcomes": {task: outcomes(ours[task], theirs[task]) for task in ours},
        "changed": {task: _changed(ours[task], theirs[task]) for task in ours},
    }


def _groups(a: Sequence[Record], b: Sequence[Record], field: str, trials: int, seed: int) -> Iterator[Row]:
    """Rows without a test for each value of a field, where it has more than one."""
    values = sorted({record[field] for record in a})
    for value in values if len(values) > 1 else ():
        ours, theirs = (by_task([r for r in side if r[field] == value]) for side in (a, b))
        for task in ours:
            for metric in metrics_of(task, ours[task]):
                row = described(ours[task], theirs[task], metric, trials=trials, seed=seed)
                yield {"value": value or "(none)", **row}


def _sides(a: Sequence[Record], b: Sequence[Record]) -> tuple[list[float], list[float], list[float]]:
    """Of each sample of a task: what a and b count in the deciding metric, and by how much b is better."""
    metric = lead_metric(a[0]["task"])
    num_a, num_b = counts(a, metric)[0], counts(b, metric)[0]
    gains = num_a - num_b if metric in ERROR_RATES else num_b - num_a
    return num_a.tolist(), num_b.tolist(), gains.tolist()


def outcomes(a: Sequence[Record], b: Sequence[Record]) -> dict[str, int]:
    """How many samples of a task b answers better, the same, worse, by its deciding metric."""
    gains = _sides(a, b)[2]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return {"better": better, "same": len(gains) - better - worse, "worse": worse}


def _changed(a: Sequence[Record], b: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """The samples of a task that changed most in each direction, with what both said and scored."""
    of_a, of_b, gains = _sides(a, b)

    def sample(n: int) -> dict[str, Any]:
        about = {name: a[n][name] for name in ("task", "id", "language", "domain", "prompt", "references")}
        return about | {"predictions": [a[n]["prediction"], b[n]["prediction"]], "counts": [of_a[n], of_b[n]]}

    order = sorted(range(len(a)), key=lambda n: (-abs(gains[n]), a[n]["id"]))
    better, worse = ([n for n in order if sign * gains[n] > 0][:MOST_CHANGED] for sign in (1, -1))
    return {"better": list(map(sample, better)), "worse": list(map(sample, worse))}
