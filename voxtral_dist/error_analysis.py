"""What an evaluation gets wrong, as the JSON value that ``errors.json`` holds and :mod:`voxtral_dist.error_page` shows.

    name, normalizer, samples, seed     of what, under which text rules, how many rows a list holds at most, which draw
    warnings                            sentences: what makes the numbers doubtful, to be read first
    headline                            list of task, metric, value, interval ([low, high] of 95 %, or null)
    tasks.TASK
      metric, n, errors                 the deciding metric, rows, edits (transcripts) or what lacks to full scores
      half_of_errors                    rows and share of all rows: so few, the worst ones, make half of the errors
      worst, worst_by_rate, random      samples by their errors, by errors per reference unit (transcripts), by lot
      edits.characters, edits.words     transcripts: substitutions, deletions, insertions
                                        as of :func:`error_rows.frequent_edits`
      groups.DIMENSION                  :func:`error_groups.dimensions`
      failures.NAME, checks.NAME        n, share of the rows, domains (rows of each), rows: id, domain, reference,
                                        prediction, detail; NAME as in :mod:`error_checks`

A sample is its record without ``audio_path`` and ``error``, and ``reference`` (of several the closest), ``value``,
``errors``, ``share`` of all errors of the task, ``alignment`` (:func:`error_rows.align`). A missing prediction counts
as an empty one everywhere except in ``edits``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from voxtral_dist.error_checks import checks, failures
from voxtral_dist.error_groups import dimensions
from voxtral_dist.error_rows import Row, align, frequent_edits, rows_of
from voxtral_dist.normalizers import get_normalizer
from voxtral_dist.predictions import EvalResult, cluster
from voxtral_dist.record_scores import RATIOS, by_task, intervals
from voxtral_dist.report import headline_scores
from voxtral_dist.significance import FEW_CLUSTERS
from voxtral_dist.tasks import get_task
from voxtral_dist.text_norm import without_spaces

MOST_EDITS = 20
MANY_HIT_MAX = 0.02
"""Share of predictions at the token limit from which it is a warning."""


def analyze(result: EvalResult, samples: int = 30, seed: int = 0) -> dict[str, Any]:
    """The analysis of an evaluation, see above.

    Args:
        result: its records and metrics.
        samples: rows of each list, at least 1.
        seed: decides the random sample, and the order among equally bad rows.

    Raises:
        UserError: the records are not scored as their tasks are, or under a normaliser that there is not.
    """
    rule = get_normalizer(result.metrics["normalizer"])
    tasks = {name: rows_of(records, _metric(name), rule) for name, records in by_task(result.records).items()}
    return {
        "name": result.name,
        "normalizer": result.metrics["normalizer"],
        "samples": samples,
        "seed": seed,
        "warnings": [line for name, rows in tasks.items() for line in _warnings(name, rows)],
        "headline": _headline(result),
        "tasks": {
            name: _task(rows, samples, random.Random(f"{seed}/{name}")) for name, rows in tasks.items()
        },
    }


def _metric(task: str) -> str:
    """The metric that decides a task; ROUGE-L where that one, as BLEU, is no sum over rows."""
    metric = get_task(task).metric
    return metric if metric in RATIOS else "rouge_l_f1"


def _headline(result: EvalResult) -> list[dict[str, Any]]:
    known = result.metrics.get("intervals") or intervals(result.records, result.metrics)
    return [
        {"task": task, "metric": metric, "value": value, "interval": _interval(known, task, metric)}
        for (task, metric), value in headline_scores(result.metrics).items()
    ]


def _interval(known: Mapping[str, Any], task: str, metric: str) -> Any:
    return known.get(metric) if task == "all" else (known.get(task) or {}).get(metric)


def _warnings(task: str, rows: Sequence[Row]) -> list[str]:
    def ids(members: Sequence[Row]) -> str:
        shown = ", ".join(str(row.record["id"]) for row in members[:3])
        return shown + (", …" if len(members) > 3 else "")

    def flagged(name: str) -> list[Row]:
        return [row for row in rows if name in row.record["metrics"]["flags"]]

    lines = []
    if missing := flagged("missing"):
        lines.append(
            f"{task}: {len(missing)} of {len(rows)} predictions are missing and count as empty ({ids(missing)}); "
            "predictions.jsonl says why"
        )
    if vanished := flagged("ref_vanished"):
        lines.append(
            f"{task}: {len(vanished)} references have no character left after normalisation ({ids(vanished)}); "
            "usually a fault of the data"
        )
    cut = [row for row in rows if row.record.get("hit_max")]
    if len(cut) > MANY_HIT_MAX * len(rows):
        lines.append(
            f"{task}: {len(cut)} of {len(rows)} predictions end at the token limit ({ids(cut)}); "
            "where they do not loop, the limit cuts them short"
        )
    clusters = len({cluster(row.record) for row in rows})
    if clusters < FEW_CLUSTERS:
        lines.append(
            f"{task}: only {clusters} independent speakers, documents or rows; below {FEW_CLUSTERS} the intervals are "
            "too narrow"
        )
    return lines


def _task(rows: Sequence[Row], samples: int, lot: random.Random) -> dict[str, Any]:
    total = sum(row.errors for row in rows)
    transcripts = rows[0].transcript
    shuffled = lot.sample(rows, len(rows))
    wrong = [row for row in shuffled if row.errors > 0]

    def shown(chosen: Sequence[Row]) -> list[dict[str, Any]]:
        return [_sample(row, total) for row in chosen[:samples]]

    return {
        "metric": rows[0].metric,
        "n": len(rows),
        "errors": total,
        "half_of_errors": _half(rows, total),
        "worst": shown(sorted(wrong, key=lambda row: -row.errors)),
        **({"worst_by_rate": shown(sorted(wrong, key=lambda row: -row.badness))} if transcripts else {}),
        "random": shown(shuffled),
        **({"edits": _edits(rows)} if transcripts else {}),
        "groups": dimensions(rows),
        "failures": failures(rows, samples),
        "checks": checks(rows, samples),
    }


def _half(rows: Sequence[Row], total: float) -> dict[str, Any]:
    sums = accumulate(sorted((row.errors for row in rows), reverse=True))
    count = next((number for number, value in enumerate(sums, 1) if 2 * value >= total), 0) if total else 0
    return {"rows": count, "share": count / len(rows)}


def _sample(row: Row, total: float) -> dict[str, Any]:
    kept = {key: value for key, value in row.record.items() if key not in ("audio_path", "error")}
    return {
        **kept,
        "reference": row.reference,
        "value": row.value,
        "errors": row.errors,
        "share": row.errors / total if total else 0.0,
        "alignment": align(row.ref_norm, row.hyp_norm),
    }


def _edits(rows: Sequence[Row]) -> dict[str, Any]:
    texts = [
        (str(row.record["id"]), row.ref_norm, row.hyp_norm)
        for row in rows
        if row.record["prediction"] is not None
    ]
    characters = ((name, without_spaces(ref), without_spaces(hyp)) for name, ref, hyp in texts)
    words = ((name, ref.split(), hyp.split()) for name, ref, hyp in texts)
    return {
        "characters": frequent_edits(characters, MOST_EDITS),
        "words": frequent_edits(words, MOST_EDITS),
    }
