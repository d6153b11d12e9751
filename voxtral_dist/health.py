"""Is the training well? Counts what cannot be read or is not finite, and notices a loss that jumps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from voxtral_dist import distributed
from voxtral_dist.errors import BadSamplesError, NonFiniteError
from voxtral_dist.logger import get_logger
from voxtral_dist.step_sums import StepResult

MAX_BAD_SAMPLE_RATE = 0.01
"""Share of unreadable examples above which a run ends, once BAD_SAMPLES_GRACE of them were seen."""

BAD_SAMPLES_GRACE = 10

SPIKE_WINDOW, SPIKE_LEAST = 50, 10
"""Losses that a new one is compared with, and how many of them there must be."""

STRAGGLING_STEPS = 10

KEYS_SHOWN = 8

log = get_logger(__name__)


def check_finite(result: StepResult, step: int, in_a_row: int, most: int) -> None:
    """Say which rank and samples made a step be skipped.

    Args:
        result: of the step.
        step: its number, from 1.
        in_a_row: skipped steps up to this one.
        most: how many of them end the run.

    Raises:
        NonFiniteError: too many in a row.
    """
    if result.applied:
        return
    if distributed.rank() == 0:
        log.warning("step %d skipped on all ranks: a loss or gradient is not finite%s", step, _where(result))
    if in_a_row >= most:
        raise NonFiniteError(
            f"{in_a_row} steps in a row had a non-finite loss or gradient, the last is step {step}; lower "
            "--learning_rate or look at the data of these steps, the log names it"
        )


def _where(result: StepResult) -> str:
    parts = []
    for rank, keys in result.suspects:
        more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
        parts.append(f"rank {rank}, samples {', '.join(keys[:KEYS_SHOWN])}{more}")
    return f" ({'; '.join(parts)})" if parts else ""


class Stragglers:
    """Names a rank that makes the others wait, step after step."""

    def __init__(self) -> None:
        self._slowest, self._in_a_row = -1, 0

    def look(self, seconds_by_rank: Sequence[float], step: int) -> None:
        """Warn once when a rank has needed twice the median time in STRAGGLING_STEPS steps in a row."""
        slowest = max(range(len(seconds_by_rank)), key=lambda rank: seconds_by_rank[rank])
        late = seconds_by_rank[slowest] > 2 * statistics.median_low(seconds_by_rank)
        self._in_a_row = self._in_a_row + 1 if late and slowest == self._slowest else int(late)
        self._slowest = slowest
        if self._in_a_row == STRAGGLING_STEPS and distributed.rank() == 0:
            log.warning(
                "step %d: rank %d takes %.2f s where others take %.2f s, for %d steps now; look at its machine",
                step,
                slowest,
                seconds_by_rank[slowest],
                statistics.median_low(seconds_by_rank),
                STRAGGLING_STEPS,
            )


def check_samples(bad: int, seen: int) -> None:
    """Raise :class:`BadSamplesError` when too many examples could not be read."""
    if bad > max(BAD_SAMPLES_GRACE, MAX_BAD_SAMPLE_RATE * seen):
        raise BadSamplesError(
            f"{bad} of {seen} examples could not be read, more than {MAX_BAD_SAMPLE_RATE:.0%}; the log names them, "
            "check the shards with tools/verify_shards.py --deep"
        )


def is_spike(loss: float, recent: Sequence[float], factor: float) -> bool:
    """Whether a loss exceeds ``factor`` times the median of the recent ones; never for factor 0."""
    return factor > 0 and len(recent) >= SPIKE_LEAST and loss > factor * statistics.median(recent)


def rollback_message(step: int, loss: float, checkpoint: Path) -> str:
    """What is said when the spike guard goes back."""
    return (
        f"step {step}: loss {loss:.3f} is a spike; going back to {checkpoint.name} and past the steps since then, "
        "which are left out"
    )
