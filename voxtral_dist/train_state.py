"""Where a run is: counts and scores that every checkpoint holds, beside model, optimizer and plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from voxtral_dist.health import SPIKE_WINDOW
from voxtral_dist.step_sums import StepResult


@dataclass
class TrainState:
    """JSON-able progress of a run.

    Attributes:
        step: steps of the plan that are done, skipped or left out.
        draws_consumed: draws of the plan used up; the whole state of the data side.
        samples_seen, tokens_seen, audio_seconds_seen, bad_samples: totals over all ranks.
        task_tokens_seen: target tokens per task.
        skipped_in_a_row: steps without an update up to this one.
        recent_losses: of the last steps, for the spike guard.
        left_out: first and last step (exclusive) of every stretch that the spike guard passed over.
        scores: step and score of every evaluation so far, more is better.
        best_metric: what the scores are of.
        stage: name of the stage that the last step belonged to.
        totals: sums that the metrics "so far" are made of.
    """

    step: int = 0
    draws_consumed: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    audio_seconds_seen: float = 0.0
    bad_samples: int = 0
    task_tokens_seen: dict[str, float] = field(default_factory=dict)
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    left_out: list[list[int]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    best_metric: str = ""
    stage: str = ""
    totals: dict[str, float] = field(default_factory=dict)

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> TrainState:
        """The state in a checkpoint's trainer_state.json."""
        return cls(**{name: saved[name] for name in cls.__dataclass_fields__ if name in saved})

    def count(self, result: StepResult, draws_consumed: int, names: Sequence[str]) -> None:
        """Count a step.

        Args:
            result: of the step.
            draws_consumed: draws of the plan used up with it.
            names: of the tasks, in the order of the result.
        """
        self.step += 1
        self.draws_consumed = draws_consumed
        self.samples_seen += result.samples
        self.tokens_seen += result.tokens
        self.audio_seconds_seen += result.audio_seconds
        self.bad_samples += result.bad_samples
        for name, tokens in zip(names, result.task_tokens, strict=True):
            self.task_tokens_seen[name] = self.task_tokens_seen.get(name, 0.0) + tokens
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        if result.applied:
            self.recent_losses = [*self.recent_losses, result.loss][-SPIKE_WINDOW:]

    def record_score(self, step: int, score: float) -> None:
        """Keep the score of an evaluation, once."""
        self.scores = [[s, value] for s, value in self.scores if s != step] + [[step, score]]
