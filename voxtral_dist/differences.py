"""Two lists of records of the same samples, metric by metric: difference, interval, p-value, and a verdict in words.

Everything is paired: both sides answered the same samples, and what is resampled together (a speaker, a document)
stays together on both. A verdict rests on the p-value alone, after Holm's correction over all tests that are judged
together, and never says that two results are equal: no test can show that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxtral_dist import significance
from voxtral_dist.predictions import cluster
from voxtral_dist.record_scores import RATIOS, Record, by_task, ratio_of
from voxtral_dist.scoring import ERROR_RATES, goodness
from voxtral_dist.tasks import get_task

Row = dict[str, Any]
"""One metric of one task, for JSON; what is undefined is None."""

ALPHA = 0.05
"""A verdict needs a Holm-adjusted p below this."""

BETTER, WORSE, NO_DIFFERENCE, UNDEFINED = "better", "worse", "no difference shown", "undefined"


def lead_metric(task: str) -> str:
    """The metric that decides the task's score, or ROUGE-L where that one is no sum over samples (BLEU, chrF)."""
    decides = get_task(task).metric
    return decides if decides in RATIOS else "rouge_l_f1"


def metrics_of(task: str, records: Iterable[Record]) -> tuple[str, ...]:
    """The metrics that are compared, :func:`lead_metric` first; sWER only where there is Korean."""
    lead = lead_metric(task)
    others = ("cer", "wer", "swer") if lead in ERROR_RATES else ("rouge_l_f1", "em", "korquad_f1")
    korean = any(record["language"] == "ko" for record in records)
    return tuple(name for name in dict.fromkeys((lead, *others)) if korean or name != "swer")


def counts(records: Sequence[Record], metric: str) -> np.ndarray:
    """Numerators and denominators of a corpus metric, float64 [2, n].

    Raises:
        ValueError: the metric is not one of these records.
    """
    pairs = [ratio_of(record, metric) for record in records]
    if None in pairs:
        raise ValueError(f"{metric} is not a metric of {records[pairs.index(None)]['id']}")
    return np.array(pairs, dtype=np.float64).reshape(-1, 2).T


@dataclass(frozen=True)
class Pair:
    """One metric of two lists of records, of one task and aligned sample by sample.

    Attributes:
        num_a, num_b: numerators of the baseline and of what is compared with it, float64 [n].
        den: denominators, float64 [n].
        labels: the cluster of each sample.
        row: ``task``, ``metric``, ``lower_is_better``, ``n`` samples in ``clusters``, the values ``a`` and ``b`` and
            the ``difference`` b - a, ``warning`` of few clusters.
    """

    num_a: np.ndarray
    num_b: np.ndarray
    den: np.ndarray
    labels: list[str]
    row: Row

    @classmethod
    def of(cls, a: Sequence[Record], b: Sequence[Record], metric: str) -> Pair:
        """Collect it. Raises :class:`ValueError` where the metric is not one of these records."""
        (num_a, den), (num_b, _) = counts(a, metric), counts(b, metric)
        labels = [cluster(record) for record in a]
        clusters, units = len(set(labels)), den.sum()
        row: Row = {"task": a[0]["task"], "metric": metric, "lower_is_better": metric in ERROR_RATES}
        row |= {"n": len(a), "clusters": clusters, "warning": significance.few_clusters(clusters)}
        for name, sums in (("a", num_a), ("b", num_b), ("difference", num_b - num_a)):
            row[name] = float(sums.sum() / units) if units else None
        return cls(num_a, num_b, den, labels, row)


def described(a: Sequence[Record], b: Sequence[Record], metric: str, *, trials: int, seed: int) -> Row:
    """:attr:`Pair.row` and the 95 % bootstrap interval ``low``, ``high`` of the difference; no test.

    Args:
        a: the baseline's records.
        b: those of what is compared with it.
        metric: a corpus metric of their task.
        trials: resamples.
        seed: of their draw.
    """
    pair = Pair.of(a, b, metric)
    change = pair.num_b - pair.num_a
    interval = significance.bootstrap_interval(change, pair.den, pair.labels, trials=trials, seed=seed)
    return pair.row | dict(zip(("low", "high"), interval or (None, None), strict=True))


def tested(a: Sequence[Record], b: Sequence[Record], metric: str, *, trials: int, seed: int) -> Row:
    """As :func:`described`, and with the tests.

    Returns:
        Besides: ``probability_of_improvement`` of b over a, ``p`` of the permutation test and whether it is ``exact``,
        None where no reference has a unit; ``mcnemar`` (p) for exact match, ``mapsswe`` (z, p) for edits, else None.
        :func:`judge` adds the verdict.
    """
    pair = Pair.of(a, b, metric)
    row = pair.row | {"mapsswe": None, "mcnemar": None}
    if row["difference"] is None:
        return row | dict.fromkeys(("low", "high", "probability_of_improvement", "p", "exact"))
    lower = row["lower_is_better"]
    result = significance.paired(
        pair.num_a, pair.num_b, pair.den, pair.labels, lower_is_better=lower, trials=trials, seed=seed
    )
    if lower:
        row["mapsswe"] = _finite(significance.mapsswe(pair.num_a, pair.num_b))
    elif metric == "em":
        change = pair.num_b - pair.num_a
        row["mcnemar"] = significance.mcnemar_exact(int((change < 0).sum()), int((change > 0).sum()))
    return row | {
        "low": 0.0 - result.high,
        "high": 0.0 - result.low,
        "probability_of_improvement": result.probability_of_improvement,
        "p": result.p_value,
        "exact": result.exact,
    }


def _finite(statistic: tuple[float, float]) -> list[float | None]:
    """For JSON: a z without bound, where all segments differ alike, is None."""
    return [value if np.isfinite(value) else None for value in statistic]


def judge(rows: Sequence[Row]) -> None:
    """Complete tested rows.

    Each gets ``p_holm``, adjusted over all of them; the ``verdict`` that follows from it; and ``undecidable``, whether
    its clusters are too few for any p below ALPHA, however large the difference.
    """
    known = [row for row in rows if row["p"] is not None]
    for row in rows:
        row |= {"p_holm": None, "verdict": UNDEFINED, "undecidable": 2.0 ** (1 - row["clusters"]) >= ALPHA}
    for row, p_holm in zip(known, significance.holm([row["p"] for row in known]), strict=True):
        row |= {"p_holm": p_holm, "verdict": NO_DIFFERENCE}
        if p_holm < ALPHA:
            row["verdict"] = BETTER if (row["difference"] < 0) == row["lower_is_better"] else WORSE


def gain(row: Row) -> tuple[float | None, float | None, float | None]:
    """The difference of a row and its interval, turned so that above 0 is better, whatever the metric."""
    ends = row["difference"], row["low"], row["high"]
    if not row["lower_is_better"]:
        return ends
    center, high, low = (None if end is None else 0.0 - end for end in ends)
    return center, low, high


def macro(a: Sequence[Record], b: Sequence[Record], *, trials: int, seed: int) -> Row:
    """The plain mean of the task scores (1 - min(1, CER) or the deciding metric) of two aligned lists of records.

    Returns:
        ``a``, ``b``, ``difference`` = b - a with the 95 % interval ``low``, ``high`` of a bootstrap that draws a
        cluster with its samples of all tasks, ``probability_of_improvement``, ``clusters``, ``warning``. Where a task
        is undefined, or is not decided by its :func:`lead_metric`, all numbers are None.
    """
    tasks = sorted(by_task(a))
    parts = [_task_columns(records, tasks) for records in (a, b)]
    num, den = np.concatenate([part[0] for part in parts], 1), np.concatenate([part[1] for part in parts], 1)
    labels = [cluster(record) for record in a]
    clusters = len(set(labels))
    row: Row = {"clusters": clusters, "warning": significance.few_clusters(clusters)}
    names = ("a", "b", "difference", "low", "high", "probability_of_improvement")
    if not den.sum(axis=0).all() or any(lead_metric(task) != get_task(task).metric for task in tasks):
        return row | dict.fromkeys(names)
    value_a, value_b = _macro_of((num.sum(0) / den.sum(0))[None], tasks)[:, 0]
    drawn = _macro_of(significance.bootstrap_rates(num, den, labels, trials=trials, seed=seed), tasks)
    change = drawn[1] - drawn[0]
    interval = significance.percentile_interval(change) if clusters > 1 else None
    improved = float(np.mean(change[~np.isnan(change)] > 0))
    values = (value_a, value_b, value_b - value_a, *(interval or (None, None)), improved)
    return row | dict(zip(names, map(_plain, values), strict=True))


def _plain(value: Any) -> float | None:
    return None if value is None else float(value)


def _task_columns(records: Sequence[Record], tasks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators of the deciding metrics, float64 [n, T]: a sample counts in its task's column."""
    columns = np.zeros((2, len(records), len(tasks)))
    for place, task in enumerate(tasks):
        chosen = [n for n, record in enumerate(records) if record["task"] == task]
        columns[:, chosen, place] = counts([records[n] for n in chosen], lead_metric(task))
    return columns[0], columns[1]


def _macro_of(rates: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """float64 [2, B]: the mean task score of both sides from their rates [B, 2T]."""
    sides = rates.reshape(len(rates), 2, len(tasks))
    scores = [goodness(lead_metric(task), sides[:, :, place]) for place, task in enumerate(tasks)]
    return np.mean(scores, axis=0).T
