"""What the ranks of a step tell one another: one small float64 vector, summed over the ranks once per step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from voxtral_dist import distributed
from voxtral_dist.batch import MicroBatch
from voxtral_dist.model import ForwardResult

_FIELDS = (
    *("loss", "non_finite", "too_large", "stop", "samples", "tokens", "positions", "audio_seconds"),
    *("bad_samples", "good_samples", "draw_hash"),
)
_PLACE = {name: place for place, name in enumerate(_FIELDS)}
"""Places in the vector; behind them follow the tasks' loss sums, their token counts, and the ranks' seconds."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw, summed over all ranks.

    Attributes:
        loss: loss of the step by its denominator, in nats.
        task_nll: loss sum of each task's labels, in nats.
        task_tokens: target tokens of each task.
        grad_norm: global gradient norm before clipping.
        applied: whether the parameters changed; False when a loss or gradient was not finite.
        samples: examples.
        tokens: positions that are not padding.
        positions: positions with padding.
        audio_seconds: seconds of audio.
        bad_samples: examples that could not be read.
        draw_hash: see :func:`voxtral_dist.plan.draw_hashes`.
        stop: some rank asked to stop.
        seconds_by_rank: from the beginning of the step until the rank met the others.
        suspects: for each rank that met a loss or gradient that is not finite, its number and samples.
    """

    loss: float
    task_nll: list[float]
    task_tokens: list[float]
    grad_norm: float
    applied: bool
    samples: int
    tokens: int
    positions: int
    audio_seconds: float
    bad_samples: int
    draw_hash: int
    stop: bool
    seconds_by_rank: list[float]
    suspects: list[tuple[int, list[str]]]


class StepSums:
    """The sums of one rank, and after :meth:`reduce` those of all.

    Args:
        num_tasks: number of tasks the losses are summed by.
        device: where the model is.
    """

    def __init__(self, num_tasks: int, device: torch.device) -> None:
        self._tasks, self._ranks, self._began = num_tasks, distributed.world_size(), time.perf_counter()
        self._vector = torch.zeros(
            len(_FIELDS) + 2 * num_tasks + self._ranks, dtype=torch.float64, device=device
        )
        self._finite: list[tuple[torch.Tensor, list[str]]] = []
        self.too_large = ""
        self.totals: list[float] = []

    def add(self, batch: MicroBatch, result: ForwardResult) -> None:
        """Count a micro-batch. Nothing waits for the device."""
        loss, tasks = result.loss.detach().double(), self._tasks
        self._vector[_PLACE["loss"]] += loss
        self._flag(torch.isfinite(loss), batch.keys)
        head = len(_FIELDS)
        self._vector[head : head + tasks] += result.task_nll.double()
        self._vector[head + tasks : head + 2 * tasks] += result.task_tokens.double()
        bad = len(batch.bad_samples)
        work = [batch.samples, batch.tokens, batch.positions, batch.audio_seconds]
        counts = torch.tensor([*work, bad, batch.samples - bad, batch.draw_hash], dtype=torch.float64)
        self._vector[_PLACE["samples"] : head] += counts.to(self._vector.device)

    def add_gradients(self, gradients: list[torch.Tensor], keys: list[str]) -> None:
        """Look whether this rank's gradients are finite; ``keys`` are all its samples."""
        if gradients:
            self._flag(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all(), keys)

    def _flag(self, finite: torch.Tensor, keys: list[str]) -> None:
        self._finite.append((finite, keys))
        self._vector[_PLACE["non_finite"]] += (~finite).double()

    def set_too_large(self, what: str) -> None:
        """This rank has an example that does not fit into its memory."""
        self.too_large = what
        self._vector[_PLACE["too_large"]] = 1.0

    def reduce(self, stop: bool) -> None:
        """Sum over the ranks; :attr:`totals` then holds the sums. Collective."""
        if self._vector.is_cuda:
            torch.cuda.synchronize()
        self._vector[_PLACE["stop"]] = float(stop)
        self._vector[distributed.rank() - self._ranks] = time.perf_counter() - self._began
        self.totals = distributed.all_reduce_sum(self._vector).tolist()

    def __getitem__(self, name: str) -> float:
        """A sum over the ranks."""
        return self.totals[_PLACE[name]]

    @property
    def task_nll(self) -> list[float]:
        """Loss sum of each task over the ranks."""
        return self.totals[len(_FIELDS) : len(_FIELDS) + self._tasks]

    @property
    def task_tokens(self) -> list[float]:
        """Target tokens of each task over the ranks."""
        return self.totals[len(_FIELDS) + self._tasks : len(self.totals) - self._ranks]

    def suspects(self) -> list[tuple[int, list[str]]]:
        """Each rank with a loss or gradient that is not finite and its samples. Collective."""
        mine = [keys for finite, keys in self._finite if not finite]
        shares = distributed.broadcast_json(distributed.gather_json(mine[0] if mine else None))
        return [(rank, keys) for rank, keys in enumerate(shares) if keys is not None]

    def result(self, denominator: float, grad_norm: float, applied: bool) -> StepResult:
        """Everything about the step. Collective where it was not applied."""
        counts = {
            name: int(self[name]) for name in ("samples", "tokens", "positions", "bad_samples", "draw_hash")
        }
        return StepResult(
            loss=self["loss"] / denominator,
            task_nll=self.task_nll,
            task_tokens=self.task_tokens,
            grad_norm=grad_norm,
            applied=applied,
            audio_seconds=self["audio_seconds"],
            stop=self["stop"] > 0,
            seconds_by_rank=self.totals[-self._ranks :],
            suspects=[] if applied else self.suspects(),
            **counts,
        )
