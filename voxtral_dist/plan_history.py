"""How a run's plan came about, and how it goes on: with the same settings, or with a change that was allowed.

The history lies in every checkpoint: a list of segments (stretches of constant weights and N) and, per task, a list of
generations (the shards that were there). Both only grow, so the draws that are consumed stay what they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from voxtral_dist.errors import UserError
from voxtral_dist.plan import GlobalPlan, Population, Segment, TaskStream

CHANGES = ("weights", "global_batch", "data")
"""What ``--allow_change`` may name."""


def shards_digest(sha256: Sequence[str], count: int) -> str:
    """Identity of the first ``count`` shards of a task, 16 hex digits."""
    return hashlib.sha256("\n".join(sha256[:count]).encode()).hexdigest()[:16]


def describe(plan: GlobalPlan, generations: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The history as JSON-able values, for the checkpoint."""
    return {"segments": [asdict(segment) for segment in plan.segments], "generations": dict(generations)}


class TaskSource:
    """What the plan must know of a task's data.

    Args:
        name: the task.
        tag: its stable number.
        shard_sizes: examples per shard.
        shard_sha256: hash of each shard.
        accepted: bool [examples], which may be drawn.
    """

    def __init__(
        self, name: str, tag: int, shard_sizes: Sequence[int], shard_sha256: Sequence[str], accepted: Any
    ) -> None:
        self.name, self.tag = name, tag
        self.shard_sizes, self.shard_sha256, self.accepted = list(shard_sizes), list(shard_sha256), accepted

    def population(self, shards: int) -> Population:
        """The examples of the first ``shards`` shards."""
        examples = sum(self.shard_sizes[:shards])
        return Population(self.tag, self.shard_sizes[:shards], self.accepted[:examples])

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
    weights: tuple[int, ...],
    global_batch_size: int,
    allow: Collection[str],
) -> tuple[list[Segment], dict[str, list[dict[str, Any]]]]:
    """Segments and generations of a run that goes on at ``step``.

    Args:
        saved: from :func:`describe`.
        step: optimizer steps done.
        sources: the data as it is now, one per task.
        weights: as set now.
        global_batch_size: as set now.
        allow: the changes that may be made.

    Raises:
        UserError: something changed that is not allowed, or shards are gone or reordered; names old and new.
    """
    segments = [
        Segment(**{**s, "weights": tuple(s["weights"]), "offsets": tuple(s["offsets"])})
        for s in saved["segments"]
    ]
    segments = [s for s in segments if s.start_step <= step]
    last = segments[-1]
    _check("weights", last.weights, weights, "weights", allow)
    _check("global_batch_size", last.global_batch_size, global_batch_size, "global_batch", allow)
    draws = last.start_draw + (step - last.start_step) * last.global_batch_size
    own = last.own_draws(draws)
    if (last.weights, last.global_batch_size) != (weights, global_batch_size):
        kept = [s for s in segments if s.start_step < step]
        segments = [*kept, Segment(draws, step, weights, global_batch_size, own)]
    generations = {
        source.name: _grown(source, list(saved["generations"][source.name]), consumed, allow)
        for source, consumed in zip(sources, own, strict=True)
    }
    return segments, generations


def _check(name: str, old: Any, new: Any, change: str, allow: Collection[str]) -> None:
    if old != new and change not in allow:
        raise UserError(
            f"this run was made with {name} {old}, now it is {new}; give the old value, a new --output_dir, or "
            f"--allow_change {change} to go on with the new one from here"
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
    sources: Sequence[TaskSource], weights: tuple[int, ...], global_batch_size: int
) -> tuple[list[Segment], dict[str, list[dict[str, Any]]]]:
    """Segments and generations of a run that begins."""
    segment = Segment(0, 0, weights, global_batch_size, (0,) * len(sources))
    return [segment], {source.name: [source.generation(0, 0)] for source in sources}
