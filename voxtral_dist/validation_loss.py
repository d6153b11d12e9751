"""Loss per task on a small fixed part of the dev data: a cheap curve between the decoded evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from voxtral_dist import activity, distributed
from voxtral_dist.engine import TrainEngine
from voxtral_dist.eval_data import EvalData

ROWS_PER_TASK = 64


def validation_loss(engine: TrainEngine, data: EvalData, names: Sequence[str], rows: int) -> dict[str, float]:
    """Mean loss of a target token per task, in nats, with label smoothing as in training. Collective.

    Args:
        engine: of the run; parameters and gradients stay as they are.
        data: dev data.
        names: the tasks that are trained, in the order of the loss sums.
        rows: examples per micro-batch.
    """
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    batches = data.loss_batches(names, distributed.rank(), distributed.world_size(), rows, ROWS_PER_TASK)
    for number, batch in enumerate(batches, 1):
        activity.now(f"validation micro-batch {number}")
        result = engine.losses(batch)
        sums += torch.stack([result.task_nll, result.task_tokens]).double().cpu()
    activity.now("the sum of the validation losses", waiting=True)
    nll, tokens = distributed.all_reduce_sum(sums.to(engine.device)).tolist()
    return {name: a / b for name, a, b in zip(names, nll, tokens, strict=True) if b}
