"""The DeepSpeed ZeRO-2 engine with one exact reduction per optimizer step. The only module that imports deepspeed.

ZeRO-2 reduces gradients in the order in which they appeared on each rank, so ranks that see text and ranks that see
audio mix up each other's gradients. Here nothing is reduced during the micro-batches. When a rank has done its own,
whatever their number, one small vector of sums goes around; missing gradients become zeros; all are scaled by the one
global denominator; then DeepSpeed reduces every parameter once, in the same order everywhere. The result is the
gradient of the whole step on one process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from voxtral_dist import activity, distributed
from voxtral_dist.batch import MicroBatch
from voxtral_dist.errors import UserError
from voxtral_dist.model import TrainingModel

LOSS_NORMS = ("tokens", "examples", "tasks")

DS_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "steps_per_print": 1_000_000_000,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 0,
        "allgather_bucket_size": 0,
    },
}
"""The built-in settings, those of ds_configs/zero2.json. Zero bucket sizes and clipping are filled in at the start."""


@dataclass(frozen=True)
class EngineSettings:
    """What the flags decide of the engine; names as the flags."""

    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    loss_norm: str = "tokens"
    ds_config: str = ""
    seed: int = 0


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


def build_ds_config(settings: EngineSettings, trained_elements: int) -> dict[str, Any]:
    """The DeepSpeed config of a run: a preset, with what the flags decide filled in.

    ``gradient_clipping`` is always written, DeepSpeed clips at 1.0 without it. The buckets hold all trained elements,
    so that one step is one reduction.

    Raises:
        UserError: unreadable file, or a key that contradicts how this engine works.
    """
    config = json.loads(json.dumps(DS_CONFIG))
    if settings.ds_config:
        config |= _read_ds_config(Path(settings.ds_config))
    config["gradient_clipping"] = settings.max_grad_norm
    zero = config["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        zero[key] = zero.get(key) or trained_elements + trained_elements % 2
    if settings.bf16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def _read_ds_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
        stage = config.get("zero_optimization", {}).get("stage")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--ds_config {path} cannot be read as JSON settings: {error}") from error
    if stage not in (1, 2):
        raise UserError(
            f"--ds_config {path}: ZeRO stage {stage!r}; the exact one-reduction step needs stage 1 or 2"
        )
    wanted = {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(
                f"--ds_config {path}: {key} {config[key]} would scale the gradients wrongly; remove it and use "
                "--per_device_bsz, --grad_accum or --global_batch_size"
            )
    decided = ("train_batch_size", "optimizer", "scheduler", "bf16", "fp16", "torch_autocast")
    for key in (*decided, "gradient_allreduce_op"):
        if key in config:
            raise UserError(f"--ds_config {path}: {key!r} is decided by the flags; remove it from the file")
    clipping = config.get("gradient_clipping", 0.0)
    if clipping:
        raise UserError(
            f"--ds_config {path}: gradient_clipping {clipping} contradicts the flag; use --max_grad_norm"
        )
    return config


class TrainEngine:
    """A :class:`TrainingModel` under ZeRO-2.

    Args:
        model: on its device already, with the adapter attached.
        settings: see :class:`EngineSettings`.

    The process group must be open; every rank builds the engine and calls :meth:`train_step` together.
    """

    def __init__(self, model: TrainingModel, settings: EngineSettings) -> None:
        self.model = model
        self.settings = settings
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._params = [p for _, p in self._named]
        self._device = self._params[0].device
        self._engine = _initialize(model, self._params, settings)

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer, for reading and writing its state."""
        return self._engine.optimizer

    @property
    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trained parameters, in the order of the model."""
        return self._named

    def train_step(
        self,
        micro_batches: Iterable[MicroBatch],
        learning_rate: float,
        stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches, of which there may be none.

        Args:
            micro_batches: this rank's share of the step.
            learning_rate: of this step.
            stop: asked once at the end of the step; any rank's True reaches all in :attr:`StepResult.stop`.
        """
        self.model.train()
        with self._engine.coalesce_grad_reduction():
            sums = self._accumulate(micro_batches)
            activity.now("the reduction", waiting=True)
            sums[_STOP] = float(stop())
            distributed.all_reduce_sum(sums)
            totals = sums.tolist()
            self._finish_gradients(self._denominator(totals), poisoned=totals[_NON_FINITE] > 0)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        activity.now("the update", waiting=True)
        self._engine.step()
        activity.now("the records")
        return self._result(totals)

    def _accumulate(self, micro_batches: Iterable[MicroBatch]) -> torch.Tensor:
        """Forward and backward of this rank's micro-batches; their sums, float64 [_HEAD + 2 x tasks]."""
        tasks = self.model.num_tasks
        sums = torch.zeros(_HEAD + 2 * tasks, dtype=torch.float64, device=self._device)
        activity.now("reading micro-batch 1")
        for number, host_batch in enumerate(micro_batches, 1):
            activity.now(f"micro-batch {number}")
            batch = host_batch.to(self._device)
            torch.manual_seed(_dropout_seed(self.settings.seed, batch.first_draw))
            result = self._engine(batch)
            if result.loss.requires_grad:
                self._engine.backward(result.loss, scale_wrt_gas=False)
            loss = result.loss.detach().double()
            sums[_LOSS] += loss
            sums[_NON_FINITE] += (~torch.isfinite(loss)).double()
            sums[_HEAD : _HEAD + tasks] += result.task_nll.double()
            sums[_HEAD + tasks :] += result.task_tokens.double()
            bad = len(batch.bad_samples)
            work = [batch.samples, batch.tokens, batch.positions, batch.audio_seconds]
            counts = [*work, bad, batch.samples - bad, batch.draw_hash]
            sums[_COUNTS] += torch.tensor(counts, dtype=torch.float64).to(self._device)
            activity.now(f"reading micro-batch {number + 1}")
        return sums

    def _denominator(self, totals: list[float]) -> float:
        """What the loss sum of the step is divided by: target tokens, examples or tasks over all ranks."""
        task_tokens = totals[_HEAD + self.model.num_tasks :]
        value = {
            "tokens": sum(task_tokens),
            "examples": totals[_GOOD_SAMPLES],
            "tasks": float(sum(count > 0 for count in task_tokens)),
        }[self.settings.loss_norm]
        return max(value, 1.0)

    def _finish_gradients(self, denominator: float, poisoned: bool) -> None:
        """Give every parameter a gradient and scale all; DeepSpeed then averages over the ranks.

        A non-finite loss anywhere makes every gradient NaN, so that DeepSpeed skips the step on all ranks alike.
        """
        for parameter in self._params:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        factor = float("nan") if poisoned else self._engine.world_size / denominator
        torch._foreach_mul_([parameter.grad for parameter in self._params], factor)

    def _result(self, totals: list[float]) -> StepResult:
        tasks = self.model.num_tasks
        return StepResult(
            loss=totals[_LOSS] / self._denominator(totals),
            task_nll=totals[_HEAD : _HEAD + tasks],
            task_tokens=totals[_HEAD + tasks :],
            grad_norm=float(self._engine.get_global_grad_norm() or 0.0),
            applied=bool(self._engine.was_step_applied()),
            samples=int(totals[_SAMPLES]),
            tokens=int(totals[_TOKENS]),
            positions=int(totals[_POSITIONS]),
            audio_seconds=totals[_AUDIO],
            bad_samples=int(totals[_BAD]),
            draw_hash=int(totals[_DRAWS]),
            stop=totals[_STOP] > 0,
        )


_LOSS, _NON_FINITE, _STOP, _SAMPLES, _TOKENS, _POSITIONS, _AUDIO, _BAD, _GOOD_SAMPLES, _DRAWS, _HEAD = range(
    11
)
_COUNTS = slice(_SAMPLES, _HEAD)
"""Places in the vector that is summed over the ranks; behind _HEAD follow the tasks' loss sums and token counts."""


def _dropout_seed(seed: int, first_draw: int) -> int:
    """Seed of a micro-batch's dropout, a function of its data alone so that a resumed run needs no random state."""
    return (seed * 1_000_003 + first_draw) % (1 << 63)


def _initialize(model: TrainingModel, params: list[torch.nn.Parameter], settings: EngineSettings) -> Any:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # else the CPU backend compiles C++ for minutes
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    optimizer = torch.optim.AdamW(
        params, lr=0.0, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=params[0].is_cuda
    )
    config = build_ds_config(settings, sum(p.numel() for p in params))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=params, optimizer=optimizer, config=config
    )
    return engine
