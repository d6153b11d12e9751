"""The numbers of one optimizer step: what was learned from what, how fast, at what use of the machine.

    metrics = StepMetrics(data, model_config, world_size, rank=rank, device=device, max_grad_norm=1.0,
                          lora_parameters=n, totals=state.totals)
    values = metrics.scalars(result, state, rate, data_wait_s)      after state.step and the other counts went up
    metrics.restart_clock()                                          after an evaluation: its time is no training time

``totals`` (dict[str, float], JSON-able) is counted up in place and belongs into the checkpoint; then sums and shares
"so far" survive a restart. Rank 0 alone records: on the other ranks ``scalars`` does nothing and returns {}.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from voxtral_dist.flops import VoxtralFlops, peak
from voxtral_dist.gpu_meter import GpuMeter
from voxtral_dist.logger import get_logger
from voxtral_dist.step_sums import StepResult

log = get_logger(__name__)

SAMPLE_RATE = 16_000

WINDOW_STEPS = 100
"""Steps whose speed the expected times are worked out from."""


class PlannedData(Protocol):
    """What is asked of :class:`~voxtral_dist.data.TrainData`, whose layer this one does not know."""

    names: list[str]
    plan: Any
    tasks: list[Any]


class Progress(Protocol):
    """What is asked of the trainer's state: the run with this step counted."""

    step: int
    draws_consumed: int
    bad_samples: int


class StepMetrics:
    """Assembles the numbers of each step.

    Args:
        data: training data with its plan.
        model_config: ``VoxtralConfig``.
        world_size: number of ranks.
        rank: of this process.
        device: of the model on this rank.
        max_grad_norm: norm above which gradients are clipped; 0: never.
        lora_parameters: parameters of the adapter ("lora_" in their names), 0 without one; for the FLOPs of a step.
        language_model_trains: the weights of its layers are trained themselves; for the same.
        encoder_trains: the audio encoder is trained too; for the same.
        totals: sums so far, counted up in place; keep them in the checkpoint.
        gpus: default: those this process sees.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        data: PlannedData,
        model_config: Any,
        world_size: int,
        *,
        rank: int = 0,
        device: torch.device,
        max_grad_norm: float = 0.0,
        lora_parameters: int = 0,
        language_model_trains: bool = False,
        encoder_trains: bool = False,
        totals: dict[str, float] | None = None,
        gpus: GpuMeter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._data, self._world_size, self._records = data, world_size, rank == 0
        self._max_grad_norm = max_grad_norm
        self._training_flops = partial(
            VoxtralFlops.from_config(model_config).training,
            lora_parameters=lora_parameters,
            language_model_trains=language_model_trains,
            encoder_trains=encoder_trains,
        )
        self._totals = {} if totals is None else totals
        self._window: deque[tuple[int, float]] = deque(maxlen=WINDOW_STEPS)
        self._audio_hours = 0.0
        self._clock = clock
        self._gpus = GpuMeter() if gpus is None else gpus
        self._peak = 0.0
        if self._records:
            found = peak(device)
            self._peak = found.flops
            log.info("MFU is a share of %.4g TFLOP/s per rank: %s", found.flops / 1e12, found.source)
            self._gpus.read()  # energy is counted from here
        self._since = clock()

    def restart_clock(self) -> None:
        """Leave the time since the last step out of the rates."""
        self._since = self._clock()

    def scalars(
        self, result: StepResult, state: Progress, rate: float, data_wait_s: float
    ) -> dict[str, float | None]:
        """Count a step and return its numbers by TensorBoard tag; {} on other ranks than 0.

        Args:
            result: of the step.
            state: with the step counted.
            rate: learning rate of the step.
            data_wait_s: seconds in which this process waited for data.
        """
        if not self._records:
            return {}
        now = self._clock()
        seconds, self._since = max(0.0, now - self._since), now
        work = self._planned_work(state.step - 1)
        self._count(result, work)
        return {
            **self._training(result, state, rate),
            **self._tasks(result, state),
            **self._speed(result, work, seconds, data_wait_s),
            **self._expected_time(state, seconds),
            **self._gpu_readings(result),
        }

    def _planned_work(self, index: int) -> list[_Work]:
        """What each task brings into a step, from the plan and the tables of lengths."""
        step, out = self._data.plan.step(index), []
        for number, task in enumerate(self._data.tasks):
            ids = step.examples[step.tasks == number]
            lengths = (task.positions(ids), task.chunks(ids), task.target_tokens(ids))
            samples = int(task.n_samples(ids).sum())
            out.append(_Work(int(lengths[0].sum()), samples / SAMPLE_RATE, self._training_flops(*lengths)))
        return out

    def _count(self, result: StepResult, work: Sequence[_Work]) -> None:
        self._audio_hours += result.audio_seconds / 3600
        self._add("steps", 1)
        self._add("skipped", not result.applied)
        self._add("clipped", 0 < self._max_grad_norm < result.grad_norm)  # false for NaN
        for name, part, target_tokens in zip(self._data.names, work, result.task_tokens, strict=True):
            self._add(f"tokens/{name}", part.tokens)
            self._add(f"target_tokens/{name}", target_tokens)
            self._add(f"audio_seconds/{name}", part.audio_seconds)

    def _add(self, name: str, value: float) -> None:
        self._totals[name] = self._totals.get(name, 0.0) + value

    def _training(self, result: StepResult, state: Progress, rate: float) -> dict[str, float | None]:
        plan, totals = self._data.plan, self._totals
        return {
            "train/loss": result.loss,
            "train/learning_rate": rate,
            "train/grad_norm": result.grad_norm,
            "train/clip_share": totals["clipped"] / totals["steps"] if self._max_grad_norm else None,
            "train/skipped": float(not result.applied),
            "train/skipped_steps": totals["skipped"],
            "train/bad_samples": float(state.bad_samples),
            "train/stage": float(plan.segment_of(state.step - 1).stage),
            "train/epoch": state.draws_consumed / max(1, self._epoch_draws()),
            "data/draws_consumed": float(state.draws_consumed),
            "data/draw_hash": float(result.draw_hash),
        }

    def _tasks(self, result: StepResult, state: Progress) -> dict[str, float | None]:
        draws = self._data.plan.own_draws_after(state.step)
        values: dict[str, float | None] = {}
        rows = zip(self._data.names, draws, result.task_nll, result.task_tokens, strict=True)
        for name, drawn, nll, tokens in rows:
            values[f"loss/{name}"] = _ratio(nll, tokens)
            values[f"target_token_share/{name}"] = _ratio(tokens, sum(result.task_tokens))
            values[f"mix/{name}"] = _ratio(drawn, sum(draws))
            for what in ("tokens", "target_tokens", "audio_seconds"):
                values[f"{what}_seen/{name}"] = self._totals[f"{what}/{name}"]
        return values

    def _speed(
        self, result: StepResult, work: Sequence[_Work], seconds: float, data_wait_s: float
    ) -> dict[str, float | None]:
        flops, ranks = sum(part.flops for part in work), result.seconds_by_rank
        return {
            "speed/step_seconds": seconds,
            "speed/tokens_per_second": _ratio(result.tokens, seconds),
            "speed/samples_per_second": _ratio(result.samples, seconds),
            "speed/audio_seconds_per_second": _ratio(result.audio_seconds, seconds),
            "speed/mfu": _ratio(flops, seconds * self._world_size * self._peak),
            "speed/padding_share": _ratio(result.positions - result.tokens, result.positions),
            "speed/data_wait_share": _ratio(data_wait_s, seconds),
            "speed/rank_spread": _ratio(max(ranks, default=0.0) * len(ranks), sum(ranks)),
        }

    def _expected_time(self, state: Progress, seconds: float) -> dict[str, float | None]:
        """From the draws per second of the last steps."""
        plan = self._data.plan
        self._window.append((state.draws_consumed - plan.draws_after(state.step - 1), seconds))
        draws, window = map(sum, zip(*self._window, strict=True))
        hours = _ratio(window / 3600, draws)
        if not hours:
            return {}
        left = plan.total_draws - state.draws_consumed
        return {"speed/epoch_hours": self._epoch_draws() * hours, "speed/eta_hours": left * hours}

    def _epoch_draws(self) -> int:
        return sum(map(len, self._data.plan.streams))

    def _gpu_readings(self, result: StepResult) -> dict[str, float | None]:
        values: dict[str, float | None] = dict(self._gpus.read())
        for name, watt_hours in list(values.items()):
            if name.endswith("/energy_wh") and watt_hours is not None:
                tag = name.replace("energy_wh", "wh_per_audio_hour")
                values[tag] = _ratio(watt_hours * self._world_size, self._audio_hours)
        return values


@dataclass(frozen=True)
class _Work:
    """One task's part of a step: positions without padding, seconds of audio, FLOPs that training on it needs."""

    tokens: int
    audio_seconds: float
    flops: int


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
