"""Did the tasks help one another? Transfer between arms, forgetting against the base model, leave-one-domain-out.

All of it is read from evaluations of the same samples. Transfer is

    T = (-1)^l (M_mixture - M_single) / M_single        l = 1 where lower is better; below 0: negative transfer

per task and their mean is delta_m (Maninis et al. 2019). "Interference" needs T < 0 and a paired test that is
significant after Holm's correction.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from voxtral_dist.comparison import aligned
from voxtral_dist.differences import (
    WORSE,
    Row,
    counts,
    gain,
    judge,
    lead_metric,
    tested,
)
from voxtral_dist.errors import UserError
from voxtral_dist.predictions import EvalResult
from voxtral_dist.record_scores import Record, by_task
from voxtral_dist.scoring import ERROR_RATES

TRIALS = 10_000


def transfer_matrix(
    base: EvalResult | None,
    singles: Mapping[str, EvalResult],
    mixtures: Mapping[str, EvalResult],
    *,
    trials: int = TRIALS,
    seed: int = 0,
) -> dict[str, Any]:
    """What training on each mixture does to each task.

    Args:
        base: the model before training, where it was evaluated.
        singles: by task, the arm that was trained on that task alone.
        mixtures: by name, the arms that were trained on several tasks.
        trials: of each test.
        seed: of each test.

    Returns:
        ``tasks``, and ``rows`` in the order above: ``name``, ``kind`` (base, single, mixture), ``delta_m`` of a mixture
        (None while a task lacks its T) and ``cells`` by task: the ``value`` of its deciding metric, ``transfer`` T
        against the task's single arm, ``over_base`` the same against the base model, ``test`` of a mixture against the
        single arm (:func:`~voxtral_dist.differences.tested`, else None) and whether it is ``interference``.

    Raises:
        UserError: the evaluations are not of the same samples and settings.
    """
    arms = _arms(base, singles, mixtures)
    sides = [by_task(side) for side in aligned([result for _, _, result in arms])]
    base_side = sides[0] if base else {}
    single_sides = dict(zip(singles, sides[1 if base else 0 :], strict=False))
    rows = []
    for (name, kind, _), side in zip(arms, sides, strict=True):
        cells = {}
        for task, own in side.items():
            single = single_sides.get(task, {}).get(task)
            cells[task] = _cell(own, single, base_side.get(task))
            if single and kind == "mixture":
                cells[task]["test"] = _test(single, own, trials, seed)
        rows.append({"name": name, "kind": kind, "cells": cells, "delta_m": None})
    _judge_mixtures([row for row in rows if row["kind"] == "mixture"])
    return {"tasks": list(sides[0]), "rows": rows}


def relative_change(value: float | None, reference: float | None, lower_is_better: bool) -> float | None:
    """T of the module's docstring: above 0 is better; None where it is undefined, as over a reference of 0."""
    if value is None or not reference:
        return None
    change = (value - reference) / reference
    return 0.0 - change if lower_is_better else change


def _arms(
    base: EvalResult | None, singles: Mapping[str, EvalResult], mixtures: Mapping[str, EvalResult]
) -> list[tuple[str, str, EvalResult]]:
    return [
        *([("base model", "base", base)] if base else []),
        *((f"{task} only", "single", result) for task, result in singles.items()),
        *((name, "mixture", result) for name, result in mixtures.items()),
    ]


def _value(records: Sequence[Record]) -> float | None:
    num, den = counts(records, lead_metric(records[0]["task"])).sum(axis=1)
    return float(num / den) if den else None


def _cell(
    own: Sequence[Record], single: Sequence[Record] | None, base: Sequence[Record] | None
) -> dict[str, Any]:
    value, lower = _value(own), lead_metric(own[0]["task"]) in ERROR_RATES
    return {
        "value": value,
        "transfer": relative_change(value, _value(single) if single else None, lower),
        "over_base": relative_change(value, _value(base) if base else None, lower),
        "test": None,
        "interference": False,
    }


def _test(a: Sequence[Record], b: Sequence[Record], trials: int, seed: int) -> Row:
    return tested(a, b, lead_metric(a[0]["task"]), trials=trials, seed=seed)


def _judge_mixtures(mixtures: Sequence[dict[str, Any]]) -> None:
    """Correct all their tests together, then say what is interference, and average T."""
    cells = [cell for row in mixtures for cell in row["cells"].values()]
    judge([cell["test"] for cell in cells if cell["test"]])
    for cell in cells:
        negative = cell["transfer"] is not None and cell["transfer"] < 0
        cell["interference"] = negative and cell["test"]["verdict"] == WORSE
    for row in mixtures:
        changes = [cell["transfer"] for cell in row["cells"].values()]
        row["delta_m"] = None if None in changes else statistics.fmean(changes)


def forgetting(base: EvalResult, tuned: EvalResult, *, trials: int = TRIALS, seed: int = 0) -> dict[str, Any]:
    """What the tuned model lost on a guard set, data of a kind that it was not trained on.

    Returns:
        ``base``, ``tuned`` (names) and ``rows``, one per task: its deciding metric as
        :func:`~voxtral_dist.differences.tested`, with the base model as ``a``, judged together; and ``forgetting``, the
        loss in that metric, above 0 where the tuned model is worse, with ``forgetting_low`` and ``forgetting_high``.

    Raises:
        UserError: the evaluations are not of the same samples and settings.
    """
    before, after = (by_task(side) for side in aligned([base, tuned]))
    rows = [_test(before[task], after[task], trials, seed) for task in before]
    judge(rows)
    for row in rows:
        center, low, high = (None if end is None else 0.0 - end for end in gain(row))
        row |= {"forgetting": center, "forgetting_low": high, "forgetting_high": low}
    return {"base": base.name, "tuned": tuned.name, "rows": rows}


def leave_one_out(
    full: EvalResult,
    without: Mapping[str, EvalResult],
    field: str = "domain",
    *,
    trials: int = TRIALS,
    seed: int = 0,
) -> dict[str, Any]:
    """What it is worth to have trained on each domain, or language: scores on its samples with and without.

    Args:
        full: the arm that was trained on everything.
        without: by value of the field, the arm whose training data lacked it.
        field: ``domain``, ``language`` or another field of the records.
        trials: of each test.
        seed: of each test.

    Returns:
        ``field``, ``full`` (its name) and ``rows`` by value and task: ``value`` and
        :func:`~voxtral_dist.differences.tested`, with the arm that lacked it as ``a``, judged together: "better" says
        that having trained on the value helps.

    Raises:
        UserError: no sample has the value, or the evaluations are not of the same samples and settings.
    """
    rows = []
    for value, arm in without.items():
        sides = [replace(r, records=[x for x in r.records if x.get(field) == value]) for r in (arm, full)]
        if not sides[1].records:
            raise UserError(
                f"no sample of {full.name} has the {field} {value!r}; name one that the dev data holds"
            )
        unseen, seen = (by_task(side) for side in aligned(sides))
        rows += [{"value": value, **_test(unseen[task], seen[task], trials, seed)} for task in unseen]
    judge(rows)
    return {"field": field, "full": full.name, "rows": rows}
