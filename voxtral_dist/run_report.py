"""The page about a run: how it ended, what it scored, how it learned, what it took, what went wrong.

tools/report_run.py makes it of any run directory; training makes it at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from voxtral_dist import page, run_charts, run_facts, run_record
from voxtral_dist.report import AVERAGES, headline_scores, headlines
from voxtral_dist.run_charts import METRIC_NAMES
from voxtral_dist.run_record import RunRecord, eval_folder, read_predictions
from voxtral_dist.scoring import ERROR_RATES
from voxtral_dist.significance import FEW_CLUSTERS
from voxtral_dist.tasks import TASKS

REPORT_FILE = "report.html"

PREVIEWS_PER_TASK, PREVIEW_CHARACTERS = 4, 400


def write_report(run: Path, out: Path | None = None, status: Mapping[str, Any] | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: the run directory.
        out: the page; default: report.html in the run. Only a page in the run links to the run's files.
        status: how the run ended, for a run that is about to write its exit_status.json.

    Returns:
        Where the page is.

    Raises:
        UserError: ``run`` is not a run directory.
    """
    record = run_record.read_run(run)
    if status is not None:
        record.status.update(status)
    target = out or run / REPORT_FILE
    page.write(target, build(record, linked=target.parent.resolve() == run.resolve()))
    return target


def build(record: RunRecord, linked: bool = True) -> str:
    """The page as HTML; ``linked``: it will lie in the run directory, so that links to its files work."""
    shown = _shown_evaluations(record)
    decided = next((step for label, step in shown.items() if label != "before"), None)
    return page.render(
        "run.html",
        name=record.folder.resolve().name,
        status=record.status,
        facts=run_facts.facts(record),
        troubles=run_facts.troubles(record),
        score_columns=[(label, step) for label, step in shown.items()],
        score_rows=_score_rows(record, list(shown.values())),
        groups=_groups(record, decided),
        decided=decided,
        behaviour=_behaviour(record, decided),
        intervals=any("intervals" in record.evaluations[step] for step in shown.values()),
        few_clusters=_few_clusters(record, decided),
        others=_others(record),
        previews=_previews(record, decided),
        private=bool(record.config.get("private_text")),
        mixture=run_facts.mixture(record),
        charts={
            "scores": run_charts.score_charts(record),
            "learning": run_charts.charts(record, run_charts.LEARNING),
            "mixture": run_charts.charts(record, run_charts.MIXTURE),
            "speed": run_charts.charts(record, run_charts.SPEED),
            "machine": run_charts.charts(record, run_charts.MACHINE),
            "interference": run_charts.charts(record, run_charts.INTERFERENCE),
        },
        changed=run_facts.settings(record, changed=True),
        unchanged=run_facts.settings(record, changed=False),
        data=run_facts.data(record),
        environment=record.environment,
        files=_files(record.folder, decided, linked),
    )


def _shown_evaluations(record: RunRecord) -> dict[str, int]:
    """Step of the evaluations before training, at the best checkpoint and at the end, each step once."""
    steps = list(record.evaluations)
    if not steps:
        return {}
    candidates = {"before": 0, "best": record.best, "last": steps[-1]}
    found = {
        label: step for label, step in candidates.items() if step is not None and step in record.evaluations
    }
    if found.get("best") == found.get("last"):
        found.pop("last", None)
    return found


def metric_name(name: str) -> str:
    """How a metric is shown, with an arrow to its better side."""
    return f"{METRIC_NAMES.get(name, name)} {'↓' if name in ERROR_RATES else '↑'}"


def _shown_keys(scores: Sequence[Mapping[tuple[str, str], float | None]]) -> list[tuple[str, str]]:
    """Task and metric of the rows of a table: what decides, the averages, and of the rest what is defined anywhere."""
    keys = dict.fromkeys(key for one in scores for key in one)
    deciding = {(name, task.metric) for name, task in TASKS.items()} | {("all", name) for name in AVERAGES}
    return [key for key in keys if key in deciding or any(one.get(key) is not None for one in scores)]


def _score_rows(record: RunRecord, steps: Sequence[int]) -> list[dict[str, Any]]:
    """A row per task and metric: its value and 95 % interval at each of the steps."""
    scores = [headline_scores(record.evaluations[step]) for step in steps]
    intervals = [record.evaluations[step].get("intervals", {}) for step in steps]
    rows = []
    for task, metric in _shown_keys(scores):
        places = [
            known.get(metric) if task == "all" else known.get(task, {}).get(metric) for known in intervals
        ]
        cells = [
            {"value": one.get((task, metric)), "interval": span}
            for one, span in zip(scores, places, strict=True)
        ]
        rows.append({"task": task, "metric": metric_name(metric), "cells": cells})
    return rows


def _groups(record: RunRecord, step: int | None) -> list[dict[str, Any]]:
    """A row per value of language, domain ... and task, with the metrics of that task."""
    fields = record.evaluations[step].get("groups", {}) if step is not None else {}
    return [
        {
            "field": field,
            "value": value,
            "task": task,
            "n": scores.get("n"),
            "scores": [
                (metric_name(name), scores.get(name))
                for name in headlines(task)
                if scores.get(name) is not None
            ],
        }
        for field, values in fields.items()
        for value, tasks in values.items()
        for task, scores in tasks.items()
        if task in TASKS
    ]


def _behaviour(record: RunRecord, step: int | None) -> list[dict[str, Any]]:
    """Per task of an evaluation: predictions that are missing, stopped by the limit, loop, are too long or empty."""
    if step is None:
        return []
    rates = ("hit_max_rate", "loop_rate", "too_long_rate", "empty_rate")
    return [
        {
            "task": task,
            "n": values["n"],
            "missing": values.get("missing", 0),
            "rates": [values.get(name) for name in rates],
        }
        for task, values in record.evaluations[step]["tasks"].items()
    ]


def _few_clusters(record: RunRecord, step: int | None) -> list[str]:
    """The tasks whose intervals are too narrow, because there is little to resample."""
    found = record.evaluations[step].get("intervals", {}) if step is not None else {}
    return [f"{task} ({count})" for task, count in found.get("clusters", {}).items() if count < FEW_CLUSTERS]


def _others(record: RunRecord) -> dict[str, Any]:
    """The evaluations made after training side by side, also under another audio where the audio was probed."""
    columns: dict[str, dict[tuple[str, str], float | None]] = {}
    verdicts = {}
    for name, (metrics, probe) in record.others.items():
        columns[name] = headline_scores(metrics)
        scored = {
            kind: value for kind, value in probe.items() if isinstance(value, dict) and "tasks" in value
        }
        columns |= {f"{name}: {kind}": headline_scores(value) for kind, value in scored.items()}
        if "verdict" in probe:
            verdicts[name] = str(probe["verdict"])
    keys = _shown_keys(list(columns.values()))
    rows = [
        {
            "task": task,
            "metric": metric_name(metric),
            "values": [s.get((task, metric)) for s in columns.values()],
        }
        for task, metric in keys
    ]
    return {"columns": list(columns), "rows": rows, "verdicts": verdicts}


def _previews(record: RunRecord, step: int | None) -> list[dict[str, Any]]:
    """The first examples of each task: reference, prediction before training and now. None of a private run."""
    if step is None or record.config.get("private_text"):
        return []
    shown: dict[tuple[str, str], dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for row in read_predictions(eval_folder(record.folder, step)):
        task = row["task"]
        counts[task] = counts.get(task, 0) + 1
        if counts[task] <= PREVIEWS_PER_TASK:
            shown[task, row["id"]] = {
                "task": task,
                "prompt": _short(row.get("prompt")),
                "reference": _short(" / ".join(row.get("references") or [])),
                "before": "",
                "prediction": _short(row.get("prediction")),
            }
    if step > 0:
        for row in read_predictions(eval_folder(record.folder, 0)):
            if (row["task"], row.get("id")) in shown:
                shown[row["task"], row["id"]]["before"] = _short(row.get("prediction"))
    return list(shown.values())


def _short(text: str | None) -> str:
    flat = "(missing)" if text is None else " ".join(text.split())
    return flat if len(flat) <= PREVIEW_CHARACTERS else f"{flat[: PREVIEW_CHARACTERS - 1]}…"


def _files(run: Path, step: int | None, linked: bool) -> list[dict[str, str]]:
    """What else to open in the run directory; the address is empty where a link would not work."""
    patterns: tuple[str, ...] = (
        *(
            "metrics.jsonl",
            "config.yaml",
            "identity.json",
            "environment.json",
            "exit_status.json",
            "tensorboard",
        ),
        *("eval/step-*/*.html", "evaluations/*/*.html", "evaluations/*/metrics.json"),
        *("evaluations/*/predictions.jsonl", "checkpoints/step-*/adapter"),
    )
    if step is not None:
        folder = eval_folder(Path(), step)
        patterns += tuple(str(folder / name) for name in ("metrics.json", "predictions.jsonl"))
    names = [str(path.relative_to(run)) for pattern in patterns for path in sorted(run.glob(pattern))]
    return [{"name": name, "address": quote(name) if linked else ""} for name in names]
