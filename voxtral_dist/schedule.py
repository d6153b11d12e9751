"""The learning rate of every step: linear warm-up, half a cosine, and a short re-warm-up where the weights change."""

from __future__ import annotations

import math
from dataclasses import dataclass

from voxtral_dist.plan import GlobalPlan


def cosine_with_warmup(progress: float, warmup_ratio: float) -> float:
    """Factor of the peak learning rate: a linear rise over ``warmup_ratio``, then half a cosine to 0.

    Args:
        progress: share of the planned draws that are consumed, in [0, 1].
        warmup_ratio: in [0, 1).
    """
    if progress < warmup_ratio:
        return progress / warmup_ratio
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup_ratio) / (1.0 - warmup_ratio)))


@dataclass(frozen=True)
class Schedule:
    """Learning rates as a function of the plan, so that nothing of them needs saving.

    A parameter whose task slept has a second moment near zero in Adam, and would wake with updates above the learning
    rate; the re-warm-up at the edge of each segment of the plan keeps them below.

    Attributes:
        peak: highest rate.
        warmup_ratio: share of the run, or of each stage, in which the rate rises.
        per_stage: begin anew at every stage instead of one curve over the run.
        rewarmup_steps: steps after an edge over which the rate comes back from 0.
    """

    peak: float
    warmup_ratio: float
    per_stage: bool = False
    rewarmup_steps: int = 0

    def rate(self, plan: GlobalPlan, step: int) -> float:
        """Learning rate of a step, by the middle of its draws."""
        first, last = plan.stage_draws(step) if self.per_stage else (0, plan.total_draws)
        middle = (plan.draws_after(step) + plan.draws_after(step + 1)) / 2
        factor = cosine_with_warmup((middle - first) / (last - first), self.warmup_ratio)
        edge = plan.segment_of(step).start_step
        back = (step - edge + 1) / (self.rewarmup_steps + 1) if edge else 1.0
        return self.peak * factor * min(1.0, back)
