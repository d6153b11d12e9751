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

HEADLINES = {"asr": ("cer", "wer"), "sqa": ("rouge_l_f1", "em", "bleu"), "tqa": ("rouge_l_f1", "em", "bleu")}
"""Metrics shown per task; the first one decides."""

AVERAGES = ("macro", "weighted", "balance")


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
        for name in HEADLINES.get(task, tuple(k for k in values if k != "n")[:3]):
            scores[task, name] = values.get(name)
    return scores | {("all", name): metrics[name] for name in AVERAGES}


def score_table(metrics: Mapping[str, Any]) -> str:
    """``task | metric | score`` of one evaluation."""
    rows = [[task, metric, number(value)] for (task, metric), value in headline_scores(metrics).items()]
    return table(["task", "metric", "score"], rows)


def comparison_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """``task | metric | before | after`` of two evaluations of the same data."""
    old, new = headline_scores(before), headline_scores(after)
    rows = [
        [task, metric, number(old.get((task, metric))), number(value)]
        for (task, metric), value in new.items()
    ]
    return table(["task", "metric", "before", "after"], rows)


def probe_table(plain: Mapping[str, Any], swapped: Mapping[str, Any], audio_tasks: Sequence[str]) -> str:
    """Scores of the audio tasks with the right and with swapped audio, and what it means in a sentence."""
    right, wrong = headline_scores(plain), headline_scores(swapped)
    keys = [key for key in right if key[0] in audio_tasks]
    rows = [[task, metric, number(right[task, metric]), number(wrong[task, metric])] for task, metric in keys]
    return (
        table(["task", "metric", "own audio", "swapped audio"], rows)
        + "\n"
        + probe_verdict(plain, swapped, audio_tasks)
    )


def probe_verdict(plain: Mapping[str, Any], swapped: Mapping[str, Any], audio_tasks: Sequence[str]) -> str:
    """Whether the audio was used: a task that scores as well on another example's audio does not listen."""
    deaf = []
    for task in (name for name in audio_tasks if name in plain["tasks"]):
        metric = HEADLINES[task][0]
        right, wrong = plain["tasks"][task][metric] or 0.0, swapped["tasks"][task][metric] or 0.0
        gap = wrong - right if metric == "cer" else right - wrong
        if gap < 0.1:
            deaf.append(task)
    if deaf:
        return f"audio NOT used: {', '.join(deaf)} scores about as well on the audio of another example"
    return "audio used: the scores fall when every example gets the audio of another one"


def previews(records: Sequence[Mapping[str, Any]], per_task: int) -> str:
    """References beside hypotheses, the first few examples of each task."""
    shown: dict[str, list[list[str]]] = {}
    for record in records:
        rows = shown.setdefault(record["task"], [])
        if len(rows) < per_task:
            hypothesis = "(missing)" if record["prediction"] is None else record["prediction"]
            rows.append(
                [record["task"], *map(_cell, (record["prompt"], record["references"][0], hypothesis))]
            )
    return table(
        ["task", "question", "reference", "hypothesis"], [row for rows in shown.values() for row in rows]
    )


def _cell(text: str) -> str:
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
