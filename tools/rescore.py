"""Score the predictions of an evaluation again, under other text normalisers, on a laptop: neither torch nor audio.

    python tools/rescore.py RUN                                      the run's best checkpoint, or its last evaluation
    python tools/rescore.py RUN/evaluations/NAME --bootstrap         with 95 % intervals
    python tools/rescore.py RUN --normalizer ko-std/1,open-asr-en/1

Prints metric by normaliser, and writes rescored.json, with all metrics, beside predictions.jsonl. Where a normaliser is
the one of metrics.json the numbers must be the same; what differs is said, for then the texts or the rules changed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist import report
from voxtral_dist.atomic import write_json
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.normalizers import get_normalizer
from voxtral_dist.predictions import PREDICTIONS, EvalResult, load
from voxtral_dist.record_scores import groups, intervals, score_records

RESCORED = "rescored.json"

NORMALIZERS = "ko-std/1,raw/1,ko-spoken/1"
"""Those that need no further package."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, score, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", metavar="RUN|EVALUATION", type=Path, help="a run or an evaluation folder")
    parser.add_argument(
        "--normalizer", default=NORMALIZERS, help=f"names, by commas (default: {NORMALIZERS})"
    )
    parser.add_argument("--bootstrap", action="store_true", help="intervals too, some seconds each")
    flags = parser.parse_args(argv)
    names = list(dict.fromkeys(filter(None, (name.strip() for name in flags.normalizer.split(",")))))
    if not names:
        raise UserError("--normalizer is empty; name one, such as ko-std/1")
    for name in names:
        get_normalizer(name)
    evaluation = load(flags.path)
    rescored = {name: rescore(evaluation, name, flags.bootstrap) for name in names}
    print(f"{evaluation.name}: {len(evaluation.records)} predictions\n{table(rescored)}")
    for difference in changed(evaluation.metrics, rescored):
        print(f"differs from metrics.json: {difference}")
    out = evaluation.folder / RESCORED
    predictions = (evaluation.folder / PREDICTIONS).read_bytes()
    digest = hashlib.sha256(predictions).hexdigest()
    write_json(out, {"predictions_sha256": digest, "normalizers": rescored}, private=True)
    print(f"written: {out}")


def rescore(evaluation: EvalResult, normalizer: str, bootstrap: bool) -> dict[str, Any]:
    """What :func:`score_records` returns, with the metrics of groups and, if asked for, intervals."""
    records = copy.deepcopy(evaluation.records)
    metrics = score_records(records, normalizer)
    metrics["groups"] = groups(records)
    if bootstrap:
        metrics["intervals"] = intervals(records, metrics)
    return metrics


def table(rescored: Mapping[str, Mapping[str, Any]]) -> str:
    """``task | metric |`` and a column for each normaliser."""
    columns = [report.score_cells(metrics) for metrics in rescored.values()]
    rows = [[task, metric, *(cells[task, metric] for cells in columns)] for task, metric in columns[0]]
    notes = report.interval_notes(next(iter(rescored.values())))
    return "\n".join([report.table(["task", "metric", *rescored], rows), *notes])


def changed(stored: Mapping[str, Any], rescored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The scores of ``metrics.json`` that the same normaliser does not give again: ``asr.cer 0.1000 -> 0.2000``."""
    fresh = rescored.get(stored.get("normalizer", ""))
    if fresh is None:
        return []
    old, new = dict(_numbers(stored)), dict(_numbers(fresh))
    return [
        f"{name} {report.number(value)} -> {report.number(new[name])}"
        for name, value in old.items()
        if name in new and not _same(value, new[name])
    ]


def _numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Averages and corpus metrics by dotted name, those that are undefined too."""
    named = [("", metrics), *((f"{task}.", values) for task, values in metrics["tasks"].items())]
    for prefix, values in named:
        for name, value in values.items():
            if value is None or isinstance(value, (int, float)):
                yield prefix + name, value


def _same(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9))


if __name__ == "__main__":
    run_main(main)
