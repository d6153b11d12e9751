"""The training data: plan, shards, audio and collator put together to this rank's micro-batches of each step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from voxtral_dist.batch import MicroBatch
from voxtral_dist.collator import Collator
from voxtral_dist.errors import UserError
from voxtral_dist.micro_batches import OVERHEAD, Caps, cut
from voxtral_dist.mix import parse_task_caps, parse_weights
from voxtral_dist.plan import ALGORITHM, GlobalPlan, Int64, Step, draw_hashes
from voxtral_dist.plan_history import PlanSettings, TaskSource, continue_history, describe, first_history
from voxtral_dist.shares import CostModel, equal_cost_shares, share_balance
from voxtral_dist.stages import parse_stages
from voxtral_dist.task_data import TaskData
from voxtral_dist.tasks import TASKS


@dataclass(frozen=True)
class TrainSettings:
    """What decides the training data: flags of the same names, the model's costs, ``overhead`` of the device."""

    global_batch_size: int
    per_device_bsz: int
    max_len: int
    epochs: float = 1.0
    max_steps: int = 0
    max_overlong_rate: float = 0.01
    max_tokens_per_micro_batch: int = 0
    packed: bool = False
    task_weights: str = ""
    stages: str = ""
    task_batch_sizes: str = ""
    loss_norm: str = "tokens"
    num_workers: int = 2
    seed: int = 0
    cost_model: CostModel = field(default_factory=CostModel)
    overhead: int = OVERHEAD["cpu"]


class TrainData:
    """The training data of a run: its plan, and the micro-batches of any rank at any step.

    Args:
        tasks: from :func:`open_tasks`.
        collator: of the model.
        settings: see :class:`TrainSettings`.
        saved: :attr:`history` of the checkpoint that the run goes on from, None at its beginning.
        step: optimizer steps done.
        allow: changes of the plan that may be made, of :data:`~voxtral_dist.plan_history.CHANGES`.

    Attributes:
        history: how the plan came about, for the checkpoint.

    Raises:
        UserError: no example left, too many examples above ``max_len``, bad weights, a change that is not allowed.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        collator: Collator,
        settings: TrainSettings,
        *,
        saved: Mapping[str, Any] | None = None,
        step: int = 0,
        allow: Collection[str] = (),
    ) -> None:
        self.tasks = list(tasks)
        self.collator = collator
        self.settings = settings
        self.cost_model = settings.cost_model
        self.names = [task.name for task in self.tasks]
        self.left_out = {task.name: task.longer_than(settings.max_len) for task in self.tasks}
        self._check_lengths()
        self.plan, self.history = self._make_plan(saved, step, allow)
        caps = parse_task_caps(settings.task_batch_sizes, self.names)
        self.caps = Caps(
            rows=settings.per_device_bsz,
            tokens=settings.max_tokens_per_micro_batch or settings.per_device_bsz * settings.max_len,
            task_rows={self.names.index(name): cap for name, cap in caps.items()},
            packed=settings.packed,
            overhead=settings.overhead,
        )

    def _check_lengths(self) -> None:
        for task in self.tasks:
            left_out = self.left_out[task.name]
            share = len(left_out) / max(1, len(task))
            if share > self.settings.max_overlong_rate or share == 1.0:
                positions = task.positions(left_out)
                shards, place = task.locate(int(left_out[positions.argmax()]))
                raise UserError(
                    f"--max_len {self.settings.max_len}: {len(left_out)} of {len(task)} {task.name} examples are "
                    f"longer (the longest, {shards.sample(place).source}, has {positions.max()} positions) and would "
                    f"be left out, more than --max_overlong_rate {self.settings.max_overlong_rate} allows; raise one "
                    "of the two"
                )

    def _make_plan(
        self, saved: Mapping[str, Any] | None, step: int, allow: Collection[str]
    ) -> tuple[GlobalPlan, dict[str, Any]]:
        settings = self.settings
        sources = [
            TaskSource(
                task.name,
                list(TASKS).index(task.name),
                task.shard_sizes,
                task.shard_sha256,
                self.left_out[task.name],
            )
            for task in self.tasks
        ]
        counts = [len(task) - len(self.left_out[task.name]) for task in self.tasks]
        weights = parse_weights(settings.task_weights, self.names, counts)
        wanted = PlanSettings(
            parse_stages(settings.stages, self.names, weights),
            settings.global_batch_size,
            max(1, round(settings.epochs * sum(counts))),
            settings.max_steps,
        )
        if saved is None:
            segments, generations, total = first_history(sources, wanted)
        else:
            given = settings.task_weights or settings.stages
            default_weights = () if given or "data" not in allow else ("weights",)
            allowed = {*allow, *default_weights}
            segments, generations, total = continue_history(saved, step, sources, wanted, allowed)
        streams = tuple(source.stream(generations[source.name]) for source in sources)
        plan = GlobalPlan(streams, tuple(segments), settings.seed, total)
        return plan, describe(plan, wanted, generations)

    def identity(self) -> dict[str, Any]:
        """What fixes the content of every step beside the history; a run goes on only with the same."""
        settings = self.settings
        return {
            "algorithm": ALGORITHM,
            "tasks": self.names,
            "seed": settings.seed,
            "epochs": settings.epochs,
            "max_steps": settings.max_steps,
            "max_len": settings.max_len,
        }

    def step_costs(self, step: Step) -> Int64:
        """Integer cost of each draw of a step."""
        return self._per_draw(step, lambda task, ids: task.costs(ids, self.cost_model))

    def _per_draw(self, step: Step, value: Any) -> Int64:
        out = np.empty(len(step), np.int64)
        for number, task in enumerate(self.tasks):
            mine = step.tasks == number
            out[mine] = value(task, step.examples[mine])
        return out

    def shares(self, step: Step, world_size: int) -> list[Int64]:
        """Each rank's draws of a step, as indices into it."""
        return equal_cost_shares(step, self.step_costs(step), world_size, self.plan.seed)

    def balance(self, world_size: int, steps: int = 20, factor: int = 1) -> float:
        """Mean over maximum of the ranks' costs over some steps of the run: the share of time that no rank waits.

        Args:
            world_size: number of ranks.
            steps: how many steps to look at.
            factor: how many steps to take as one, for a step of so many times the size.
        """
        values = []
        windows = self.plan.num_steps // factor
        for number in np.unique(np.linspace(0, windows - 1, min(steps, windows), dtype=np.int64)).tolist():
            step = self.plan.window(number * factor, factor)
            values.append(share_balance(self.shares(step, world_size), self.step_costs(step)))
        return float(np.mean(values)) if values else 0.0

    def label_weights(self, step: Step) -> dict[tuple[int, int], float]:
        """Weight of each label of an example in the loss sum, by (task, example), as ``loss_norm`` says."""
        targets = self._per_draw(step, lambda task, ids: task.target_tokens(ids))
        if self.settings.loss_norm == "tasks":
            totals = np.bincount(step.tasks, weights=targets, minlength=len(self.tasks))
            values = 1.0 / totals[step.tasks]
        elif self.settings.loss_norm == "examples":
            values = 1.0 / targets
        else:
            values = np.ones(len(step))
        pairs = zip(step.tasks.tolist(), step.examples.tolist(), strict=True)
        return dict(zip(pairs, values.tolist(), strict=True))

    def micro_batch_draws(
        self, step: Step, rank: int, world_size: int, caps: Caps | None = None
    ) -> list[Int64]:
        """A rank's draws of a step by micro-batch, as indices into the step; within ``caps``, by default its own."""
        share = self.shares(step, world_size)[rank]
        positions = self._per_draw(step, lambda task, ids: task.positions(ids))
        return [share[part] for part in cut(step.tasks[share], positions[share], caps or self.caps)]

    def fill(self, step: Step, draws: Int64) -> tuple[int, int]:
        """Positions of a micro-batch without and with its padding."""
        lengths = self._per_draw(step, lambda task, ids: task.positions(ids))[draws]
        used = int(lengths.sum())
        return used, used if self.settings.packed else int(lengths.max()) * len(draws)

    def load(self, step: Step, draws: Int64, weights: Mapping[tuple[int, int], float]) -> MicroBatch:
        """Read and collate the draws of one micro-batch."""
        pairs = [(int(step.tasks[draw]), int(step.examples[draw])) for draw in draws]
        examples = [self.tasks[task].read(example, task, weights[task, example]) for task, example in pairs]
        batch = self.collator.train_batch(examples, step.first_draw + int(draws.min()), self.settings.packed)
        hashes = draw_hashes(step.tasks[draws], step.examples[draws])
        return replace(batch, draw_hash=int(hashes.sum()))
