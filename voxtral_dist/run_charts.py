"""Which curves of a run are drawn, and how; a chart whose numbers were never recorded is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from markupsafe import Markup

from voxtral_dist.page import Series, bar_chart, line_chart
from voxtral_dist.report import number
from voxtral_dist.run_record import RunRecord
from voxtral_dist.scoring import ERROR_RATES

LOG_RATIO = 30.0
"""Values that span more than this are drawn on a logarithmic axis, where that is allowed."""

MOST_MARKS = 20

METRIC_NAMES = {
    **{
        "cer": "CER",
        "wer": "WER",
        "swer": "sWER",
        "cer_spaced": "CER with blanks",
        "bleu": "BLEU",
        "chrf": "chrF2",
    },
    **{
        "rouge_l_f1": "ROUGE-L F1",
        "em": "exact match",
        "korquad_em": "KorQuAD EM",
        "korquad_f1": "KorQuAD F1",
    },
}

LEARNING = (
    (r"train/(loss)|loss/(\w+)", "Loss per target token", "nats", True),
    (r"val_loss/(\w+)", "Loss on dev rows", "nats", True),
    (r"train/(learning_rate)", "Learning rate", "", False),
    (r"train/(grad_norm)", "Gradient norm", "", True),
    (r"train/(clip_share)", "Share of the steps so far that were clipped", "", False),
)
MIXTURE = (
    (r"mix/(\w+)", "Share of the examples so far", "", False),
    (r"target_token_share/(\w+)", "Share of a step's target tokens", "", False),
)
SPEED = (
    (r"speed/(tokens)_per_second", "Tokens per second", "", False),
    (r"speed/(audio_seconds)_per_second", "Seconds of audio per second", "", False),
    (r"speed/(padding|data_wait)_share", "Share lost to padding and to waiting for data", "", False),
    (r"speed/(rank_spread)", "Slowest rank over the mean of the ranks", "", False),
    (r"speed/(mfu)", "MFU: share of the peak FLOP/s", "", False),
)
MACHINE = (
    (r"(gpu\d+)/memory_peak_gib", "GPU memory, highest so far", "GiB", False),
    (r"(gpu\d+)/utilisation_percent", "GPU utilisation", "%", False),
    (r"(gpu\d+)/power_w", "GPU power", "W", False),
    (r"(gpu\d+)/energy_wh", "GPU energy since the last start", "Wh", False),
)
INTERFERENCE = (
    (r"interference/cosine_(\w+)", "Cosine of two tasks' gradients, below 0: conflict", "", False),
    (r"interference/magnitude_(\w+)", "Likeness of their lengths, 1: equal", "", False),
    (r"interference/(?!cosine_|magnitude_)(\w+)", "Other measures between tasks", "", False),
)


def charts(record: RunRecord, specs: tuple[tuple[str, str, str, bool], ...]) -> list[Markup]:
    """Curves of metrics.jsonl with the edges of the stages.

    Args:
        record: of the run.
        specs: tags as a pattern whose group is the name in the legend, title, unit, whether a logarithmic axis may be.
    """
    return [chart for spec in specs if (chart := _chart(record, *spec))]


def _chart(record: RunRecord, pattern: str, title: str, unit: str, may_be_log: bool) -> Markup:
    series = []
    for tag, curve in record.curves.items():
        match = re.fullmatch(pattern, tag)
        if match:
            label = next(group for group in match.groups() if group)
            series.append(
                Series("all tasks" if label == "loss" else label.replace("_", " "), *curve.points())
            )
    if not series:
        return Markup()
    log_y = may_be_log and _spans([y for one in series for y in one.y])
    return line_chart(title, series, x_label="step", y_label=unit, log_y=log_y, marks=stage_marks(record))


def _spans(values: list[float]) -> bool:
    positive = [value for value in values if value > 0]
    return len(positive) > len(values) / 2 and max(positive) > LOG_RATIO * min(positive)


def stage_marks(record: RunRecord) -> list[tuple[float, str]]:
    """Where each stage begins; nothing for a run of one stage, or of more than can be told apart."""
    starts = record.log.stage_starts
    readable = 1 < len(starts) <= MOST_MARKS
    return [(step, stage_name(record, stage)) for step, stage in starts] if readable else []


def stage_name(record: RunRecord, stage: int) -> str:
    """What the user called a stage, numbered from 0."""
    stages = record.state.get("plan", {}).get("stages", [])
    name = stages[stage].get("name") if 0 <= stage < len(stages) else ""
    return str(name or f"stage {stage + 1}")


def score_charts(record: RunRecord) -> list[Markup]:
    """Scores, error rates and balance over the evaluations, and the tasks side by side at the best one."""
    if not record.evaluations:
        return []
    marks = [] if record.best is None else [(float(record.best), "best")]
    tasks = [
        {**metrics.get("scores", {}), "macro": metrics.get("macro")}
        for metrics in record.evaluations.values()
    ]
    spread = [
        {"lowest / highest": m.get("balance"), "highest − lowest": m.get("gap")}
        for m in record.evaluations.values()
    ]
    rates = [dict(_error_rates(metrics)) for metrics in record.evaluations.values()]
    steps = list(record.evaluations)
    curves = []
    for title, rows in (("Scores of the tasks, 1 is perfect", tasks), ("Balance of the tasks", spread)):
        curves.append(line_chart(title, _over(steps, rows), x_label="step", marks=marks))
    if any(rates):
        series = _over(steps, rates)
        log_y = _spans([y for one in series for y in one.y])
        title = "Error rates of transcripts, 0 is perfect"
        curves.insert(1, line_chart(title, series, x_label="step", log_y=log_y, marks=marks))
    return [*curves, _balance(record)]


def _error_rates(metrics: dict) -> Iterator[tuple[str, float | None]]:
    for task, values in metrics["tasks"].items():
        yield from (
            (f"{task} {METRIC_NAMES[name]}", values[name]) for name in ERROR_RATES[::2] if name in values
        )


def _over(steps: list[int], rows: list[dict[str, float | None]]) -> list[Series]:
    """A curve for each key; a step without a value is left out of it."""
    series = []
    for key in dict.fromkeys(key for row in rows for key in row):
        known = [(step, row[key]) for step, row in zip(steps, rows, strict=True) if row.get(key) is not None]
        series.append(
            Series(key, [float(step) for step, _ in known], [float(y) for _, y in known if y is not None])
        )
    return series


def _balance(record: RunRecord) -> Markup:
    step = record.best if record.best in record.evaluations else list(record.evaluations)[-1]
    metrics = record.evaluations[step]
    scores = metrics.get("scores", {})
    spread = f"balance {number(metrics.get('balance'))}, gap {number(metrics.get('gap'))}"
    return bar_chart(f"Tasks at step {step}: {spread}", list(scores), list(scores.values()), x_label="score")
