"""The evaluations of a training run: decode the dev data at a step, record scores, previews and some of the sound."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from voxtral_dist import activity, checkpoint, distributed, evaluator, prediction_parts, prepare, report
from voxtral_dist.audio import SAMPLE_RATE
from voxtral_dist.audio_file import Samples
from voxtral_dist.config import TrainConfig
from voxtral_dist.eval_data import EvalData
from voxtral_dist.logger import get_logger
from voxtral_dist.monitor import NullMonitor
from voxtral_dist.tasks import TASKS

log = get_logger(__name__)

CLIPS_PER_TASK, CLIP_SECONDS = 2, 30
"""Previews that can also be heard, and how much of each."""


def evaluate_step(
    config: TrainConfig, voxtral: Any, dev: EvalData, monitor: NullMonitor, step: int
) -> dict[str, Any] | None:
    """Decode the dev data at a step, unless that was done before the last stop; the metrics on rank 0."""
    name = checkpoint.step_dir(Path(), step).name
    folder = Path(config.output_dir) / "eval" / name
    if is_evaluated(Path(config.output_dir), name, dev):
        known = folder / "metrics.json"
        return json.loads(known.read_text("utf-8")) if distributed.rank() == 0 and known.is_file() else None
    activity.within(f"the evaluation at step {step}")
    how = prepare.decode_settings(config, config.eval_max_new_tokens)
    about = prepare.provenance(config, voxtral) | {"step": step}
    result = evaluator.evaluate(voxtral, dev, how, about, folder)
    if result is None:
        return None
    evaluator.write(folder, result)
    prediction_parts.remove(folder)
    monitor.scalars(step, evaluation_scalars(result.metrics))
    show_previews(monitor, dev, result, step, config.private_text)
    previews = report.previews(result.predictions, evaluator.PREVIEWS_PER_TASK)
    scores = report.score_table(result.metrics)
    log.info("evaluation at step %d\n%s", step, scores if config.private_text else f"{scores}\n\n{previews}")
    return result.metrics


def show_previews(
    monitor: NullMonitor, dev: EvalData, result: evaluator.Evaluation, step: int, private: bool
) -> None:
    """References beside hypotheses per task; at the run's first evaluation also how some of them sound."""
    for task in result.metrics["tasks"]:
        records = [record for record in result.predictions if record["task"] == task]
        monitor.texts(step, f"previews/{task}", report.previews(records, evaluator.PREVIEWS_PER_TASK))
    if step == 0 and not private:
        for name, samples in clips(dev, result):
            monitor.audio(step, f"previews/{name}", torch.from_numpy(samples), SAMPLE_RATE)


def clips(dev: EvalData, result: evaluator.Evaluation) -> Iterator[tuple[str, Samples]]:
    """The sound of the first previews of each task that has any; what cannot be read is left out.

    Yields:
        ``task/number`` and float32 [n] at 16 kHz, at most CLIP_SECONDS of it.
    """
    shown: Counter[str] = Counter()
    for record, place in zip(result.predictions, result.places, strict=True):
        name = record["task"]
        if TASKS[name].has_audio and shown[name] < CLIPS_PER_TASK:
            shown[name] += 1
            samples = dev.sound(place)
            if samples is not None:
                yield f"{name}/{shown[name]}", samples[: CLIP_SECONDS * SAMPLE_RATE]


def evaluation_scalars(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of an evaluation by TensorBoard tag."""
    names = ("macro", "weighted", "balance", "rtfx")
    values: dict[str, float | None] = {f"eval/{name}": metrics[name] for name in names}
    for task, scores in metrics["tasks"].items():
        numbers = {name: value for name, value in scores.items() if isinstance(value, (int, float))}
        values |= {f"eval_{task}/{name}": value for name, value in numbers.items()}
    return values


def is_evaluated(out: Path, name: str, dev: EvalData) -> bool:
    """Whether the evaluation of a step is on disk, or there is no dev data to do it on. Collective."""
    return not len(dev) or bool(distributed.broadcast_json((out / "eval" / name / "metrics.json").exists()))
