"""The arms of an experiment side by side: paired tests, transfer between tasks, forgetting, leave-one-out, seeds.

Tests are of one seed, the first; what another seed gives is shown as a spread beside the arm's settings.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist import report
from voxtral_dist.comparison import compare, write_page
from voxtral_dist.comparison_page import Audio
from voxtral_dist.errors import UserError
from voxtral_dist.predictions import EvalResult
from voxtral_dist.tasks import get_task
from voxtral_dist.transfer import forgetting, leave_one_out, transfer_matrix


@dataclass(frozen=True)
class Arms:
    """What an experiment has brought so far.

    Attributes:
        settings: by arm, the flags that it changes; the first arm is the baseline.
        results: by arm and seed, the evaluation on the dev sets.
        base: that of the model before training.
        guards: the evaluations of the first seed on the guard set, by arm.
        base_guard: that of the model before training.
        single_task: by task, the arm that was trained on it alone.
        without: by value, the arm whose training rows lacked it.
        field: what the values are of.
        full: the arm that lacked none.
    """

    settings: Mapping[str, Mapping[str, Any]]
    results: Mapping[str, Mapping[int, EvalResult]]
    base: EvalResult | None
    guards: Mapping[str, EvalResult]
    base_guard: EvalResult | None
    single_task: Mapping[str, str]
    without: Mapping[str, str]
    field: str
    full: str


def write_comparison(arms: Arms, seed: int, path: Path, audio: Audio | None = None) -> None:
    """Write ``comparison.html`` and its JSON.

    Args:
        arms: what is compared.
        seed: the seed whose results are tested.
        path: the page.
        audio: makes samples on it audible, see :func:`~voxtral_dist.comparison_page.write_page`.

    Raises:
        UserError: fewer than two results, or they are not of the same samples and settings.
    """
    there = {arm: arms.results[arm][seed] for arm in arms.settings if seed in arms.results.get(arm, {})}
    results = list(there.values())
    if len(results) == 1 and arms.base:
        results.insert(0, arms.base)
    if len(results) < 2:
        raise UserError(f"{len(results)} arms have a result under seed {seed}; a comparison takes two")
    extra: dict[str, Any] = {"arms": table(arms), "seeds": spread(arms)}
    singles = {task: there[arm] for task, arm in arms.single_task.items() if arm in there}
    if singles:
        mixtures = {arm: one for arm, one in there.items() if arm not in arms.single_task.values()}
        extra["transfer"] = transfer_matrix(arms.base, singles, mixtures)
    if arms.base_guard:
        extra["forgetting"] = {arm: forgetting(arms.base_guard, one) for arm, one in arms.guards.items()}
    if without := _without(arms, there):
        extra["leave_one_out"] = leave_one_out(there[arms.full], without, arms.field)
    write_page(compare(results), path, extra=extra, audio=audio)


def _without(arms: Arms, there: Mapping[str, EvalResult]) -> dict[str, EvalResult]:
    """By value the arm that lacked it, of the values that the dev data has; none while the full arm has no result."""
    if not arms.field or arms.full not in there:
        return {}
    tried = {record[arms.field] for record in there[arms.full].records}
    return {value: there[arm] for value, arm in arms.without.items() if value in tried and arm in there}


def scores(result: EvalResult) -> dict[str, float | None]:
    """The deciding score of each task, and their mean."""
    found = {}
    for task, values in result.metrics["tasks"].items():
        metric = get_task(task).metric
        found[f"{task} {metric}"] = values.get(metric)
    return {**found, "macro": result.metrics["macro"]}


def spread(arms: Arms) -> dict[str, dict[str, dict[str, float | None]]]:
    """By arm and metric the score under each seed."""
    out: dict[str, dict[str, dict[str, float | None]]] = {}
    for arm, by_seed in arms.results.items():
        for seed, result in by_seed.items():
            for metric, value in scores(result).items():
                out.setdefault(arm, {}).setdefault(metric, {})[str(seed)] = value
    return out


def table(arms: Arms) -> dict[str, dict[str, str]]:
    """By arm what it changes, and what it scored: the mean over the seeds, with the least and the most."""
    spreads = spread(arms)
    return {
        arm: {name: str(value) for name, value in changes.items()}
        | {metric: _over_seeds(list(values.values())) for metric, values in spreads.get(arm, {}).items()}
        for arm, changes in arms.settings.items()
    }


def score_table(arms: Arms) -> str:
    """Plain text: an arm a line, its scores over the seeds."""
    shown = {arm: by_metric for arm, by_metric in spread(arms).items() if by_metric}
    columns = list(dict.fromkeys(metric for by_metric in shown.values() for metric in by_metric))
    rows = [
        [arm, *(_over_seeds(list(by_metric.get(metric, {}).values())) for metric in columns)]
        for arm, by_metric in shown.items()
    ]
    return report.table(["arm", *columns], rows)


def _over_seeds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return f"{known[0]:.4f}" if known else "n/a"
    return f"{statistics.fmean(known):.4f} ({min(known):.4f} to {max(known):.4f}, {len(known)} seeds)"
