"""A micro-batch that does not fit into memory: the share is done again in smaller ones, with the same gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from test_engine import make_collator, make_step, make_training, micro_batches

from voxtral_dist.batch import MicroBatch
from voxtral_dist.collator import Collator, Example
from voxtral_dist.ds_config import EngineSettings
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import VoxtralDistError
from voxtral_dist.micro_batches import Caps, cut

RANKS = [[0, 1, 2, 4], [3, 5, 6]]
"""Examples of each rank's share."""


class CutShare:
    """A share that is cut under caps, as the loader does it."""

    def __init__(self, collator: Collator, examples: list[Example], caps: Caps) -> None:
        self.collator, self.examples, self.caps = collator, examples, caps

    def __iter__(self) -> Iterator[MicroBatch]:
        lengths = np.array([len(self.collator.prompt(e.sample, e.n_samples)) for e in self.examples])
        groups = cut(np.zeros_like(lengths), lengths, self.caps)
        return iter(micro_batches(self.collator, self.examples, [g.tolist() for g in groups]))

    def smaller(self) -> CutShare:
        return CutShare(self.collator, self.examples, self.caps.halved())


def out_of_memory(engine: TrainEngine, most: int, where: str) -> Callable[[], None]:
    """Let micro-batches but the first of more than ``most`` examples fail in a pass; undo it by calling the result."""
    seen = {"samples": 0, "batches": 0}

    def forward(module: Any, args: tuple[MicroBatch]) -> None:
        seen["samples"] = args[0].samples
        seen["batches"] += 1
        if where == "forward":
            fail()

    def fail(gradient: torch.Tensor | None = None) -> None:
        if seen["samples"] > most and seen["batches"] > 1:  # there is a gradient already
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handles = [engine.model.register_forward_pre_hook(forward)]
    if where == "backward":
        handles.append(engine.named_parameters[2][1].register_hook(fail))
    return lambda: [handle.remove() for handle in handles] and None


def step_of(rank: int, model_dir: str, most: int | None, where: str) -> tuple[dict[str, torch.Tensor], Any]:
    collator = make_collator(model_dir)
    engine = TrainEngine(make_training(model_dir), EngineSettings(max_grad_norm=1.0))
    examples = [make_step(collator)[number] for number in RANKS[rank]]
    share = CutShare(collator, examples, Caps(2, 10_000, overhead=10_000))
    undo = out_of_memory(engine, most, where) if most is not None and rank == 0 else lambda: None
    first = engine.train_step(share, 1e-3)
    undo()
    engine.train_step(share, 1e-3)
    return {name: p.detach().clone() for name, p in engine.named_parameters}, first


def redone(rank: int, model_dir: str, where: str) -> list[Any]:
    """Largest difference of a parameter, with and without the failures, and the two steps' results."""
    plain, one = step_of(rank, model_dir, None, where)
    again, other = step_of(rank, model_dir, 1, where)
    worst = max(float((plain[name] - again[name]).abs().max()) for name in plain)
    moved = [one.samples == other.samples, one.task_tokens == other.task_tokens, other.applied]
    return [worst, abs(one.loss - other.loss), abs(one.grad_norm / other.grad_norm - 1), moved]


@pytest.mark.parametrize("where", ["backward", pytest.param("forward", marks=pytest.mark.slow)])
def test_a_share_is_done_again_with_the_same_gradient(tiny_model: Path, where: str) -> None:
    """Rank 0 can only hold one example at a time; Adam would show a wrong gradient as a step of 1e-3."""
    for worst, loss, norm, counts in run_ranks(redone, 2, str(tiny_model), where):
        assert worst < 2e-5 and loss < 1e-5 and norm < 1e-5 and all(counts)


def too_large(rank: int, model_dir: str) -> str:
    try:
        step_of(rank, model_dir, 0, "forward")
    except VoxtralDistError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_an_example_that_does_not_fit_ends_the_run_on_all_ranks(tiny_model: Path) -> None:
    first, second = run_ranks(too_large, 2, str(tiny_model))
    assert first == second and "positions does not fit, alone in its micro-batch" in first
    keys = [example.key for example in make_step(make_collator(str(tiny_model)))]
    assert any(f"out of memory: {key} with" in first for key in keys)
