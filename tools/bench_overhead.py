"""What a micro-batch costs besides its positions, measured: part of ``python tools/bench_data.py balance``

A forward and backward pass takes a fixed time (Python, kernel starts, small tensors) and a time per position.
Both are measured with the quickstart's tiny model on one core of this machine, and the fixed time is given in
positions, the unit that the balance of the ranks is counted in. Another model on another device has another
ratio; the figure only shows in what order of magnitude the number of micro-batches matters.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from voxtral_dist.adapter import LoraSettings, attach
from voxtral_dist.batch import MicroBatch
from voxtral_dist.model import TrainingModel, load

SMALL, LARGE, LENGTH, LABELS = 1, 16, 128, 16
"""Rows of the two micro-batches that are timed, positions and label positions of a row."""

LORA = LoraSettings(r=16, alpha=32.0, dropout=0.0, targets="both", freeze_whisper=True, seed=0)


def overheads(trials: int = 5, passes: int = 6) -> list[float]:
    """Fixed cost of a micro-batch in positions, ascending, one figure per trial.

    A line through the best times of the small and the large micro-batch: where it meets zero positions is the
    fixed time, its slope the time of a position.
    """
    training = tiny_model()
    small, large = (text_batch(rows) for rows in (SMALL, LARGE))
    best_time(training, large, 1)
    figures = []
    for _ in range(trials):
        short, long = (best_time(training, batch, passes) for batch in (small, large))
        slope = (long - short) / (large.positions - small.positions)
        figures.append(short / slope - small.positions)
    return sorted(figures)


def tiny_model() -> TrainingModel:
    """The quickstart's model with an adapter, in training mode."""
    from build_tiny_voxtral import build

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        build(folder)
        return TrainingModel(attach(load(str(folder), torch.float32), LORA), 1).train()


def text_batch(rows: int) -> MicroBatch:
    """Rows of random tokens without audio; each predicts its last tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 4096, (rows, LENGTH), generator=generator)
    predictors = torch.arange(rows * LENGTH).view(rows, LENGTH)[:, -LABELS - 1 : -1].flatten()
    return MicroBatch(
        input_ids=ids,
        position_ids=None,
        audio=None,
        audio_index=torch.empty(0, dtype=torch.int64),
        label_index=predictors,
        labels=ids[:, -LABELS:].flatten(),
        label_task=torch.zeros(len(predictors), dtype=torch.int64),
        label_weight=torch.ones(len(predictors)),
        first_draw=0,
        keys=[],
        samples=rows,
        tokens=rows * LENGTH,
        audio_seconds=0.0,
    )


def best_time(training: TrainingModel, batch: MicroBatch, passes: int) -> float:
    """Shortest wall time of a forward and backward pass, in seconds."""
    times = []
    for _ in range(passes):
        started = time.perf_counter()
        training(batch).loss.backward()
        times.append(time.perf_counter() - started)
    return min(times)
