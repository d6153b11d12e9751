"""``--debug``: an engineer's first look. A few real steps on a few examples, and everything about them on rank 0.

    bash launch/train.sh --debug ...        the flags of a run

Per micro-batch: the shape of every tensor, each example decoded with its label mask, loss per task. Per step: gradient
norm by kind of module. After each phase: memory. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxtral_dist import distributed, prepare
from voxtral_dist.batch import MicroBatch
from voxtral_dist.config import TrainConfig
from voxtral_dist.data import TrainData
from voxtral_dist.distributed import World
from voxtral_dist.dry_run import masked_lines
from voxtral_dist.ds_config import EngineSettings
from voxtral_dist.engine import TrainEngine
from voxtral_dist.loss import IGNORE_INDEX
from voxtral_dist.model import ForwardResult
from voxtral_dist.plan import Step
from voxtral_dist.step_sums import StepResult

STEPS = 3
EXAMPLES_PER_TASK = 2
"""Examples of each task and rank in a step."""

SEARCHED_STEPS = 50
"""Steps of the plan in which the first examples of each task are looked for."""

_LINEAR = re.compile(r"\.(?:self_attn|mlp)\.([qkvo]|gate|up|down)_proj\.")


def debug(config: TrainConfig, data: TrainData, world: World) -> None:
    """Train up to three steps on the plan's first examples of each task and print what happens. Collective.

    Operations without a deterministic form are an error on the CPU and a warning on CUDA.
    """
    device = distributed.local_device(world)
    distributed.start(device)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    try:
        names = EngineSettings.__dataclass_fields__.keys() - {"bf16"}
        flags = {name: getattr(config, name) for name in names}
        training = prepare.training_model(config, device, len(data.tasks))
        engine = TrainEngine(training, EngineSettings(bf16=prepare.use_bf16(config, device), **flags))
        view = _View(engine, data, config, device, world)
        view.memory("model and engine")
        for number, step in enumerate(first_examples(data, world.world_size), 1):
            view.train(number, step)
        view.say(f"\n--debug: nothing was written to {Path(config.output_dir)}")
    finally:
        torch.use_deterministic_algorithms(False)
        distributed.stop()


def first_examples(data: TrainData, world_size: int) -> list[Step]:
    """Up to :data:`STEPS` steps of the first draws of each task in the plan, the same number of each where it has so
    many."""
    each = EXAMPLES_PER_TASK * world_size
    step = data.plan.window(0, min(SEARCHED_STEPS, data.plan.num_steps))
    by_task = [np.flatnonzero(step.tasks == number) for number in range(len(data.tasks))]
    chosen = [np.concatenate([found[n * each : (n + 1) * each] for found in by_task]) for n in range(STEPS)]
    return [
        Step(step.first_draw + int(draws.min()), step.tasks[draws], step.examples[draws])
        for draws in chosen
        if len(draws)
    ]


def group_of(name: str) -> str:
    """Kind of module a trained parameter belongs to, for example ``language model q``."""
    if "audio_tower" in name:
        return "audio encoder"
    if "multi_modal_projector" in name:
        return "projector"
    linear = _LINEAR.search(name)
    return f"language model {linear[1]}" if linear else "language model norms"


def tensor_lines(batch: MicroBatch) -> Iterator[str]:
    """Type and shape of every tensor of a micro-batch."""
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            yield f"  {field.name:<13} {str(value.dtype).removeprefix('torch.'):<8} {list(value.shape)}"


def example_lines(batch: MicroBatch, vocabulary: Any, private: bool) -> Iterator[str]:
    """Each example of a micro-batch decoded, with its label mask; lengths alone when it is private."""
    ids = batch.input_ids.flatten()
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[batch.label_index + 1] = batch.labels
    if batch.position_ids is None:
        starts = torch.arange(0, ids.numel(), batch.input_ids.shape[1])
    else:
        starts = (batch.position_ids[0] == 0).nonzero().flatten()
    pad = vocabulary.special("<pad>")
    sizes = [*starts[1:].tolist(), ids.numel()]
    for key, begin, end in zip(batch.keys, starts.tolist(), sizes, strict=True):
        used = int((ids[begin:end] != pad).nonzero().max()) + 1
        mine = slice(begin, begin + used)
        count = int((labels[mine] != IGNORE_INDEX).sum())
        yield f"  {key}: {used} positions, {count} labels, {end - begin - used} padding"
        if not private:
            yield from (f"  {line}" for line in masked_lines(ids[mine], labels[mine], vocabulary))


class _View:
    """Watches the engine's steps from outside: through its micro-batches, a hook on the model and the stop call."""

    def __init__(
        self, engine: TrainEngine, data: TrainData, config: TrainConfig, device: torch.device, world: World
    ) -> None:
        self.engine, self.data, self.config, self.device, self.world = engine, data, config, device, world
        self._squares: dict[str, float] = {}
        engine.model.register_forward_hook(lambda _model, _inputs, out: self._after_forward(out))

    def say(self, *lines: str) -> None:
        """Print on rank 0."""
        if self.world.is_main:
            print("\n".join(lines), flush=True)

    def memory(self, phase: str) -> None:
        """Print what a phase took: the peak of CUDA's allocator in it, or this process's size after it."""
        if self.device.type == "cuda":
            text = f"peak {torch.cuda.max_memory_allocated(self.device) / 2**20:,.0f} MiB allocated"
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            text = f"{_resident_mib():,.0f} MiB resident"
        self.say(f"  memory, {phase}: {text}")

    def train(self, number: int, step: Step) -> None:
        """One optimizer step on the examples of ``step``."""
        self.say(f"\nstep {number}: {len(step)} examples on {self.world.world_size} rank(s)")
        share = _Share(self, step)
        result = self.engine.train_step(share, self.config.learning_rate, stop=self._before_reduction)
        self.memory("step")
        self.say(*self._step_lines(result))

    def _after_forward(self, out: ForwardResult) -> None:
        self.memory("forward")
        sums = zip(self.data.names, out.task_nll.tolist(), out.task_tokens.tolist(), strict=True)
        self.say(
            *(f"  loss {n}: {nll / count:.4f} over {count:.0f} labels" for n, nll, count in sums if count)
        )

    def _before_reduction(self) -> bool:
        """Sum the squares of the whole step's gradient by kind of module."""
        squares: dict[str, float] = defaultdict(float)
        for name, parameter in self.engine.named_parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            squares[group_of(name)] += float(distributed.all_reduce_sum(gradient).double().square().sum())
        self._squares = dict(squares)
        return False

    def _step_lines(self, result: StepResult) -> Iterator[str]:
        """Loss and gradient norms of a step; the groups' norms are scaled as the engine scales the gradient."""
        state = "applied" if result.applied else "skipped: not finite"
        yield f"  loss of the step {result.loss:.4f}, gradient norm {result.grad_norm:.4g} before clipping, {state}"
        whole = sum(self._squares.values()) ** 0.5
        for group, square in sorted(self._squares.items()):
            yield f"  gradient {group}: {result.grad_norm * square**0.5 / whole if whole else 0.0:.4g}"


class _Share:
    """A rank's micro-batches of a step, shown when the engine takes them."""

    def __init__(self, view: _View, step: Step) -> None:
        self._view, self._step, self._caps = view, step, view.data.caps

    def __iter__(self) -> Iterator[MicroBatch]:
        view, data, step = self._view, self._view.data, self._step
        weights = data.label_weights(step)
        draws = data.micro_batch_draws(step, view.world.rank, view.world.world_size, self._caps)
        for number, group in enumerate(draws, 1):
            batch = data.load(step, group, weights)
            view.say(f"\n micro-batch {number} of {len(draws)}", *tensor_lines(batch))
            view.say(*example_lines(batch, data.collator.vocabulary, view.config.private_text))
            yield batch
            view.memory("backward")

    def smaller(self) -> _Share:
        """The same in micro-batches of half the size."""
        self._caps = self._caps.halved()
        return self


def _resident_mib() -> float:
    """Size of this process in memory, VmRSS of /proc."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0
