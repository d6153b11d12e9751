"""Do the tasks pull the trained weights in the same direction? Their gradients on a few dev examples, pair by pair.

A diagnostic: conflict goes with trouble in optimisation, but does not predict which task gains from the mixture; for
that, compare runs with and without a task (tools/run_experiment.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch

from voxtral_dist import activity, distributed
from voxtral_dist.engine import TrainEngine
from voxtral_dist.eval_data import EvalData

EXAMPLES_PER_TASK = 16


def gradient_conflict(engine: TrainEngine, data: EvalData, names: Sequence[str]) -> dict[str, float | None]:
    """Cosine and magnitude similarity of each pair of tasks (PCGrad, Yu et al. 2020). Collective.

    ``interference/cosine_A_B`` is below 0 where a step for one task undoes some of the other's;
    ``interference/magnitude_A_B`` = 2 |a| |b| / (|a|^2 + |b|^2) is 1 for gradients of equal length, near 0 where one
    task drowns the other. Exact for any number of ranks, to rounding. Takes 4 bytes per trained parameter and task.

    Args:
        engine: of the run; parameters, gradients and random state stay as they are.
        data: dev data; a fixed choice of :data:`EXAMPLES_PER_TASK` of each task is used.
        names: the tasks that are trained.

    Returns:
        By tag, for the pairs of tasks that have dev data; None where a gradient is zero.
    """
    here = {task.name for task in data.tasks}
    gradients = {name: task_gradient(engine, data, name) for name in names if name in here}
    values: dict[str, float | None] = {}
    for (first, a), (second, b) in combinations(gradients.items(), 2):
        cosine, magnitude = similarity(a, b)
        values[f"interference/cosine_{first}_{second}"] = cosine
        values[f"interference/magnitude_{first}_{second}"] = magnitude
    return values


def task_gradient(engine: TrainEngine, data: EvalData, name: str) -> torch.Tensor:
    """Gradient of the mean loss of a target token of one task, float32 [trained elements]. Collective."""
    total = torch.zeros(sum(p.numel() for _, p in engine.named_parameters), device=engine.device)
    tokens = torch.zeros(1, dtype=torch.float64, device=engine.device)
    rank, world_size = distributed.rank(), distributed.world_size()
    for number, batch in enumerate(data.loss_batches([name], rank, world_size, 1, EXAMPLES_PER_TASK), 1):
        activity.now(f"gradient {number} of {name}")
        gradient, result = engine.gradient(batch)
        total += gradient
        tokens += result.task_tokens[0].double()
    activity.now(f"the sum of the gradients of {name}", waiting=True)
    return distributed.all_reduce_sum(total) / distributed.all_reduce_sum(tokens).clamp(min=1).float()


def similarity(a: torch.Tensor, b: torch.Tensor) -> tuple[float | None, float | None]:
    """Cosine and magnitude similarity of two vectors [N], summed in float64; None where they are undefined."""
    dot, aa, bb = (float(torch.sum(x * y, dtype=torch.float64)) for x, y in ((a, b), (a, a), (b, b)))
    length = (aa * bb) ** 0.5
    return dot / length if length else None, 2 * length / (aa + bb) if aa + bb else None
