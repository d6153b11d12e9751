"""What people read of an evaluation: the score table, the previews, the before-and-after table. Plain text.

python -m voxtral_dist.report RUN/eval      prints the scores of a run's first and last evaluation
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist.errors import UserError, run_main
from voxtral_dist.scoring import ERROR_RATES, SCALES
from voxtral_dist.significance import FEW_CLUSTERS
from voxtral_dist.tasks import TASKS

AVERAGES = ("macro", "weighted", "balance")

LEAST_GAP = 0.1
"""A task whose score falls by less without its own audio does not listen."""

PROBED = {"swapped": "the audio of another example", "silence": "silence"}
"""What the audio probe lets every example hear instead of its own audio."""


def headlines(task: str) -> tuple[str, ...]:
    """Metrics shown of a task, without repetition; the first one decides."""
    metric = TASKS[task].metric
    others = ("wer",) if metric in ERROR_RATES else ("rouge_l_f1", "em", "bleu")
    return tuple(dict.fromkeys((metric, *others)))


def number(value: float | None) -> str:
    """Four decimals, ``n/a`` for a metric that is undefined."""
    return "n/a" if value is None else f"{value:.4f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns, readable as Markdown too."""
    widths = [max(map(_width, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [
        [cell + " " * (w - _width(cell)) for cell, w in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join(" | ".join(line).rstrip() for line in padded)


def _width(text: str) -> int:
    """Columns of a terminal that a text takes; Hangul and Han characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def headline_scores(metrics: Mapping[str, Any]) -> dict[tuple[str, str], float | None]:
    """The shown scores of a ``metrics.json`` by (task, metric), averages under the task ``all``."""
    scores: dict[tuple[str, str], float | None] = {}
    for task, values in metrics["tasks"].items():
        names = headlines(task) if task in TASKS else tuple(k for k in values if k != "n")[:3]
        scores.update({(task, name): values.get(name) for name in names})
    return scores | {("all", name): metrics[name] for name in AVERAGES}


def score_cells(metrics: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """The shown scores as text, with their interval where there is one: ``0.0142 [0.006, 0.024]``."""
    found = metrics.get("intervals", {})
    cells = {}
    for (task, name), value in headline_scores(metrics).items():
        ends = found.get(name) if task == "all" else found.get(task, {}).get(name)
        cells[task, name] = number(value) + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
    return cells


def score_table(metrics: Mapping[str, Any]) -> str:
    """``task | metric | score`` of one evaluation, and below it what to make of the intervals, if there are any."""
    rows = [[task, metric, cell] for (task, metric), cell in score_cells(metrics).items()]
    return "\n".join([table(["task", "metric", "score"], rows), *interval_notes(metrics)])


def interval_notes(metrics: Mapping[str, Any]) -> list[str]:
    """What to make of the intervals of a ``metrics.json``, one line each; nothing where it has none."""
    clusters: Mapping[str, int] = metrics.get("intervals", {}).get("clusters", {})
    few = [f"{task} ({count})" for task, count in clusters.items() if count < FEW_CLUSTERS]
    notes = ["[ ]: 95 % interval, bootstrap over speakers, else documents, else examples"] if clusters else []
    return notes + (
        [f"too narrow, fewer than {FEW_CLUSTERS} of them to draw from: {', '.join(few)}"] if few else []
    )


def comparison_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """``task | metric | before | after`` of two evaluations of the same data."""
    old, new = score_cells(before), score_cells(after)
    rows = [[task, metric, old.get((task, metric), "n/a"), cell] for (task, metric), cell in new.items()]
    return table(["task", "metric", "before", "after"], rows)


def probe_table(
    plain: Mapping[str, Any], probes: Mapping[str, Mapping[str, Any]], audio_tasks: Sequence[str]
) -> str:
    """Scores of the audio tasks with their own audio, and a column for each audio of :data:`PROBED`."""
    columns = [headline_scores(plain), *map(headline_scores, probes.values())]
    keys = [key for key in columns[0] if key[0] in audio_tasks]
    rows = [[*key, *(number(scores.get(key)) for scores in columns)] for key in keys]
    return table(["task", "metric", "own audio", *(f"{name} audio" for name in probes)], rows)


def probe_verdict(
    plain: Mapping[str, Any], probes: Mapping[str, Mapping[str, Any]], audio_tasks: Sequence[str]
) -> str:
    """Whether the audio was used: a task that scores as well on something else does not listen.

    Args:
        plain: metrics with every example's own audio.
        probes: metrics with another audio, by a name of :data:`PROBED`.
        audio_tasks: the tasks to judge; those without scores are left out.
    """
    tasks = [task for task in audio_tasks if task in plain["tasks"]]
    deaf = {
        name: [task for task in tasks if _loss(task, plain, scores) < LEAST_GAP]
        for name, scores in probes.items()
    }
    found = [f"{', '.join(names)} on {PROBED[name]}" for name, names in deaf.items() if names]
    if found:
        return f"audio NOT used: scores are about as good for {' and for '.join(found)}"
    return f"audio used: the scores fall on {' and on '.join(PROBED[name] for name in probes)}"


def _loss(task: str, plain: Mapping[str, Any], probe: Mapping[str, Any]) -> float:
    """How much worse the deciding metric is under the probe, in [0, 1] for one that is no error rate."""
    metric = TASKS[task].metric
    right, wrong = (scores["tasks"][task][metric] or 0.0 for scores in (plain, probe))
    return float(wrong - right if metric in ERROR_RATES else (right - wrong) / SCALES[metric])


def previews(records: Sequence[Mapping[str, Any]], per_task: int) -> str:
    """References beside hypotheses, the first few examples of each task."""
    shown: dict[str, list[list[str]]] = {}
    for record in records:
        rows = shown.setdefault(record["task"], [])
        if len(rows) < per_task:
            hypothesis = "(missing)" if record["prediction"] is None else record["prediction"]
            rows.append([record["task"], *map(cell, (record["prompt"], record["references"][0], hypothesis))])
    return table(
        ["task", "question", "reference", "hypothesis"], [row for rows in shown.values() for row in rows]
    )


def cell(text: str) -> str:
    """A text on one line of a table, cut to 48 characters."""
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) <= 48 else flat[:47] + "…"


def first_and_last(eval_dir: Path) -> str:
    """The before-and-after table of a run.

    Args:
        eval_dir: the run's ``eval`` directory.

    Raises:
        UserError: the run has fewer than two finished evaluations.
    """
    files = sorted(eval_dir.glob("step-*/metrics.json"))
    if len(files) < 2:
        raise UserError(
            f"{eval_dir} holds {len(files)} evaluations; a comparison needs two, was --val_shards given?"
        )
    before, after = (json.loads(path.read_text("utf-8")) for path in (files[0], files[-1]))
    return comparison_table(before, after)


def main() -> None:
    """Command line."""
    if len(sys.argv) != 2:
        raise UserError("name one folder of evaluations: python -m voxtral_dist.report RUN/eval")
    print(first_and_last(Path(sys.argv[1])))


if __name__ == "__main__":
    run_main(main)
