"""Which evaluation is the best, and when to stop because no later one is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from voxtral_dist.errors import UserError
from voxtral_dist.scoring import ERROR_RATES, scores_beside


def check_metric(name: str, headlines: Mapping[str, str]) -> None:
    """Refuse a ``--best_metric`` that no evaluation will have.

    Args:
        name: see :func:`score_of`.
        headlines: headline metric of each task with dev data.

    Raises:
        UserError: there is no such score.
    """
    known = [
        "macro",
        "weighted",
        *(f"{t}.{s}" for t, metric in headlines.items() for s in scores_beside(metric)),
    ]
    if name not in known:
        raise UserError(f"--best_metric {name}: no such score of this dev data; there are {', '.join(known)}")


def score_of(metrics: Mapping[str, Any], name: str) -> float | None:
    """A score of an evaluation, so that more is better; None where it is not defined.

    Args:
        metrics: ``metrics.json``.
        name: ``macro``, ``weighted``, or ``TASK.SCORE`` such as ``asr.cer``; error rates come back negative.

    Raises:
        KeyError: there is no such score.
    """
    task, _, score = name.rpartition(".")
    value = (metrics["tasks"][task] if task else metrics)[score]
    return None if value is None else -float(value) if score in ERROR_RATES else float(value)


@dataclass(frozen=True)
class EarlyStopping:
    """Stops after ``patience`` evaluations in a row without a gain of ``min_delta``.

    Attributes:
        patience: evaluations; 0: never stop.
        min_delta: gain over the best one so far that counts.
    """

    patience: int = 0
    min_delta: float = 0.0

    def stale(self, scores: Mapping[int, float], first_step: int) -> int:
        """Evaluations since the last gain.

        Args:
            scores: of the evaluations so far, by step.
            first_step: those before it do not count: with stages, the last stage's first step.
        """
        best, stale = None, 0
        for step in sorted(scores):
            if step < first_step:
                continue
            gained = best is None or scores[step] > best + self.min_delta
            best, stale = (scores[step], 0) if gained else (best, stale + 1)
        return stale

    def is_over(self, scores: Mapping[int, float], first_step: int) -> bool:
        """Whether to stop now."""
        return 0 < self.patience <= self.stale(scores, first_step)
