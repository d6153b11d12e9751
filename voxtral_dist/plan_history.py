"""How a run's plan came about, and how it goes on: with the same settings, or with a change that was allowed.

The history lies in every checkpoint: a list of segments (stretches of constant weights and N) and, per task, a list of
generations (the shards that were there). Both only grow, so the draws that are consumed stay what they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from voxtral_dist.errors import UserError
from voxtral_dist.plan import GlobalPlan, Int64, Population, Segment, TaskStream
from voxtral_dist.stages import Stage

CHANGES = ("weights", "global_batch", "data")
"""What ``--allow_change`` may name."""


def shards_digest(sha256: Sequence[str], count: int) -> str:
    """Identity of the first ``count`` shards of a task, 16 hex digits."""
    return hashlib.sha256("\n".join(sha256[:count]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PlanSettings:
    """What the flags ask of the plan.

    Attributes:
        stages: of the run, at least one.
        global_batch_size: N, draws per step.
        draws: length of the run; used where ``max_steps`` is 0.
        max_steps: length of the run in steps.
    """

    stages: tuple[Stage, ...]
    global_batch_size: int
    draws: int
    max_steps: int = 0

    def total_draws(self, draws: int, step: int) -> int:
        """Where a run ends that is at ``step`` after so many draws."""
        return draws + (self.max_steps - step) * self.global_batch_size if self.max_steps else self.draws

    def stages_record(self) -> list[dict[str, Any]]:
        """The stages as JSON-able values."""
        return [stage.record() for stage in self.stages]


def describe(
    plan: GlobalPlan, settings: PlanSettings, generations: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """The history as JSON-able values, for the checkpoint."""
    return {
        "segments": [asdict(segment) for segment in plan.segments],
        "stages": settings.stages_record(),
        "global_batch_size": settings.global_batch_size,
        "total_draws": plan.total_draws,
        "generations": dict(generations),
    }


class TaskSource:
    """What the plan must know of a task's data.

    Args:
        name: the task.
        tag: its stable number.
        shard_sizes: examples per shard.
        shard_sha256: hash of each shard.
        left_out: numbers of the examples that may not be drawn, ascending.
    """

    def __init__(
        self, name: str, tag: int, shard_sizes: Sequence[int], shard_sha256: Sequence[str], left_out: Int64
    ) -> None:
        self.name, self.tag = name, tag
        self.shard_sizes, self.shard_sha256, self.left_out = list(shard_sizes), list(shard_sha256), left_out

    def population(self, shards: int) -> Population:
        """The examples of the first ``shards`` shards."""
        examples = sum(self.shard_sizes[:shards])
        return Population(self.tag, self.shard_sizes[:shards], self.left_out[self.left_out < examples])

    def generation(self, first_draw: int, first_epoch: int) -> dict[str, Any]:
        """The record of all shards that are there now, drawn from ``first_draw`` on."""
        count = len(self.shard_sizes)
        digest = shards_digest(self.shard_sha256, count)
        return {"shards": count, "digest": digest, "first_draw": first_draw, "first_epoch": first_epoch}

    def stream(self, generations: Sequence[Mapping[str, Any]]) -> TaskStream:
        """The task's draws under its recorded generations."""
        return TaskStream(
            [(g["first_draw"], g["first_epoch"], self.population(g["shards"])) for g in generations]
        )


def continue_history(
    saved: Mapping[str, Any],
    step: int,
    sources: Sequence[TaskSource],
    settings: PlanSettings,
    allow: Collection[str],
) -> tuple[list[Segment], dict[str, list[dict[str, Any]]], int]:
    """Segments, generations and total draws of a run that goes on at ``step``.

    Args:
        saved: from :func:`describe`.
        step: optimizer steps done.
        sources: the data as it is now, one per task.
        settings: as the flags are now.
        allow: the changes that may be made.

    Raises:
        UserError: something changed that is not allowed, or shards are gone or reordered; names old and new.
    """
    segments = [
        Segment(**{**s, "weights": tuple(s["weights"]), "offsets": tuple(s["offsets"])})
        for s in saved["segments"]
    ]
    stages, n = settings.stages_record(), settings.global_batch_size
    _check(_weights_name(saved["stages"]), saved["stages"], stages, "weights", allow, _in_words)
    _check("global_batch_size", saved["global_batch_size"], n, "global_batch", allow)
    last = [s for s in segments if s.start_step <= step][-1]
    draws = last.start_draw + (step - last.start_step) * last.global_batch_size
    draws = min(draws, saved["total_draws"])  # the last step was short
    own, total = last.own_draws(draws), settings.total_draws(draws, step)
    if (saved["stages"], saved["global_batch_size"], saved["total_draws"]) != (stages, n, total):
        begun = [s for s in segments if s.start_step < step]
        segments = [*begun, *_from_here(settings, total, draws, step, own)]
    generations = {
        source.name: _grown(source, list(saved["generations"][source.name]), consumed, allow)
        for source, consumed in zip(sources, own, strict=True)
    }
    return segments, generations, total


def _from_here(
    settings: PlanSettings, total: int, draws: int, step: int, own: tuple[int, ...]
) -> list[Segment]:
    """A segment for each stage that is not over at ``step``, the edges rounded to steps."""
    out: list[Segment] = []
    n, done = settings.global_batch_size, 0
    for number, stage in enumerate(settings.stages):
        end = round((stage.end * total - draws) / n)
        if end > done or stage.end == 1:
            segment = Segment(draws + done * n, step + done, stage.weights, n, own, number)
            out.append(segment)
            done = max(done, end)
            own = segment.own_draws(draws + done * n)
    return out


def _weights_name(stages: Sequence[Mapping[str, Any]]) -> str:
    return "weights" if len(stages) == 1 else "stages"


def _in_words(stages: Sequence[Mapping[str, Any]]) -> str:
    weights = [str(tuple(stage["weights"])) for stage in stages]
    if len(stages) == 1:
        return weights[0]
    return "; ".join(f"{s['name']} until {s['end']} {w}" for s, w in zip(stages, weights, strict=True))


def _check(
    name: str, old: Any, new: Any, change: str, allow: Collection[str], words: Callable[[Any], str] = str
) -> None:
    if old != new and change not in allow:
        raise UserError(
            f"this run was made with {name} {words(old)}, now it is {words(new)}; give the old value, a new "
            f"--output_dir, or --allow_change {change} to go on with the new one from here"
        )


def _grown(
    source: TaskSource, generations: list[dict[str, Any]], consumed: int, allow: Collection[str]
) -> list[dict[str, Any]]:
    """A task's generations, with a new one from its next own epoch on where shards were added."""
    last = generations[-1]
    if shards_digest(source.shard_sha256, last["shards"]) != last["digest"] or last["shards"] > len(
        source.shard_sizes
    ):
        raise UserError(
            f"the first {last['shards']} {source.name} shards are not those this run was made with; data can be added "
            "behind them, not taken away or reordered: give the old data sets first, or a new --output_dir"
        )
    if last["shards"] == len(source.shard_sizes):
        return generations
    _check(f"{source.name} shards", last["shards"], len(source.shard_sizes), "data", allow)
    begun = [g for g in generations if g["first_draw"] < consumed] or generations[:1]
    first_draw, first_epoch = source.stream(begun).next_epoch(consumed)
    if first_draw == begun[-1]["first_draw"]:
        begun = begun[:-1]
    return [*begun, source.generation(first_draw, first_epoch)]


def first_history(
    sources: Sequence[TaskSource], settings: PlanSettings
) -> tuple[list[Segment], dict[str, list[dict[str, Any]]], int]:
    """Segments, generations and total draws of a run that begins.

    Raises:
        UserError: a stage is shorter than a step.
    """
    total = settings.total_draws(0, 0)
    segments = _from_here(settings, total, 0, 0, (0,) * len(sources))
    present = {segment.stage for segment in segments if segment.start_draw < total}
    for number, stage in enumerate(settings.stages):
        if number not in present:
            raise UserError(
                f"--stages: stage {stage.name} is shorter than a step of this run; give it a larger share, or train "
                "longer"
            )
    return segments, {source.name: [source.generation(0, 0)] for source in sources}, total
