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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from voxtral_dist import activity, distributed
from voxtral_dist.batch import MicroBatch
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.logger import get_logger
from voxtral_dist.model import ForwardResult, TrainingModel
from voxtral_dist.step_sums import StepResult, StepSums

log = get_logger(__name__)

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

BUCKET_LIMIT = 250_000_000
"""Most elements of a bucket that is filled in: 1 GB of float32."""


@dataclass(frozen=True)
class EngineSettings:
    """What the flags decide of the engine; names as the flags."""

    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    loss_norm: str = "tokens"
    ds_config: str = ""
    seed: int = 0


class Share(Protocol):
    """A rank's part of a step; see :class:`voxtral_dist.step_loader.StepShare`."""

    def __iter__(self) -> Iterator[MicroBatch]:
        """Its micro-batches, of which there may be none."""

    def smaller(self) -> Share:
        """The same examples in smaller micro-batches."""


def build_ds_config(settings: EngineSettings, trained_elements: int) -> dict[str, Any]:
    """The DeepSpeed config of a run: a preset, with what the flags decide filled in.

    ``gradient_clipping`` is always written, DeepSpeed clips at 1.0 without it. The buckets hold all trained elements up
    to :data:`BUCKET_LIMIT`, so that one step of an adapter is one reduction.

    Raises:
        UserError: unreadable file, or a key that contradicts how this engine works.
    """
    config = json.loads(json.dumps(DS_CONFIG))
    if settings.ds_config:
        config |= _read_ds_config(Path(settings.ds_config))
    config["gradient_clipping"] = settings.max_grad_norm
    zero = config["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        zero[key] = zero.get(key) or min(trained_elements + trained_elements % 2, BUCKET_LIMIT)
    if _offloads(config):
        config["zero_force_ds_cpu_optimizer"] = False
    if settings.bf16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def _offloads(config: dict[str, Any]) -> bool:
    """Whether the optimizer's state lies in host memory."""
    where = config["zero_optimization"].get("offload_optimizer") or {}
    return bool(where.get("device", "none") != "none")


_STAGES = {
    0: "keeps no gradient back until the end of the step, which the exact reduction needs",
    3: "gathers weights in the forward pass, and ranks with and without audio would do so in different orders",
}
_FIXED = {
    "gradient_accumulation_steps": (
        1,
        "would divide the gradient a second time; --grad_accum (at the first start) or --global_batch_size decides",
    ),
    "train_micro_batch_size_per_gpu": (
        1,
        "is nominal, micro-batches differ in size; --per_device_bsz and --max_tokens_per_micro_batch decide",
    ),
    "gradient_clipping": (0.0, "contradicts the flag; --max_grad_norm decides"),
    "zero_force_ds_cpu_optimizer": (False, "wants DeepSpeed's Adam, but torch's AdamW is used"),
}
_DECIDED = {
    "train_batch_size": "--global_batch_size, else --per_device_bsz x --grad_accum x ranks",
    "optimizer": "--weight_decay; AdamW is built in",
    "scheduler": "--learning_rate, --warmup_ratio and --lr_schedule",
    "bf16": "--bf16",
    "fp16": "--bf16",
    "torch_autocast": "--bf16",
    "gradient_allreduce_op": "--loss_norm",
}


def _read_ds_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        zero = config.get("zero_optimization", {})
        offloads = _offloads({"zero_optimization": zero})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--ds_config {path} cannot be read as JSON settings: {error}") from error
    stage = zero.get("stage")
    if stage not in (1, 2):
        reason = f" {_STAGES[stage]};" if type(stage) is int and stage in _STAGES else ""
        raise UserError(
            f"--ds_config {path}: ZeRO stage {stage!r}{reason or ';'} the exact one-reduction step needs stage 1 or 2"
        )
    for key, (value, reason) in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"--ds_config {path}: {key} {config[key]} {reason}; remove it from the file")
    for key, flag in _DECIDED.items():
        if key in config:
            raise UserError(f"--ds_config {path}: {key!r} is decided by {flag}; remove it from the file")
    if offloads and zero["offload_optimizer"]["device"] != "cpu":
        raise UserError(
            f"--ds_config {path}: offload_optimizer to {zero['offload_optimizer']['device']!r}; only 'cpu'"
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
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @property
    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trained parameters, in the order of the model."""
        return self._named

    def train_step(
        self, share: Share, learning_rate: float, stop: Callable[[], bool] = lambda: False
    ) -> StepResult:
        """One optimizer step over this rank's share of it.

        Args:
            share: this rank's micro-batches; where one does not fit into memory it is asked for smaller ones.
            learning_rate: of this step.
            stop: asked once at the end of the step; any rank's True reaches all in :attr:`StepResult.stop`.

        Raises:
            VoxtralDistError: on all ranks, when a single example does not fit into the memory of one.
        """
        self.model.train()
        with self._engine.coalesce_grad_reduction(), self._alone_when_it_fails():
            sums = self._accumulate(share)
            activity.now("the reduction", waiting=True)
            sums.reduce(stop())
            denominator = self._denominator(sums)
            self._finish_gradients(denominator, poisoned=sums["non_finite"] + sums["too_large"] > 0)
        if sums["too_large"]:
            self._give_up(sums.too_large)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        activity.now("the update", waiting=True)
        self._engine.step()
        activity.now("the records")
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        return sums.result(denominator, norm, bool(self._engine.was_step_applied()))

    @contextmanager
    def _alone_when_it_fails(self) -> Iterator[None]:
        """Keep DeepSpeed from the reduction that it makes of a failed step, too: the other ranks are not there."""
        try:
            yield
        except BaseException:
            self._engine._flush_coalesced_reduction_zero12 = lambda optimizer: None
            raise

    def _accumulate(self, share: Share) -> StepSums:
        """Forward and backward of a share's micro-batches, in smaller ones where they do not fit."""
        while True:
            sums, keys, batch = StepSums(self.model.num_tasks, self._device), [], None
            activity.now("reading micro-batch 1")
            try:
                for number, batch in enumerate(share, 1):
                    activity.now(f"micro-batch {number}")
                    keys += batch.keys
                    sums.add(batch, self._forward_backward(batch.to(self._device)))
                    activity.now(f"reading micro-batch {number + 1}")
                sums.add_gradients([p.grad for p in self._params if p.grad is not None], keys)
                return sums
            except torch.OutOfMemoryError as error:
                log.warning("out of memory in %s: %s", activity.current().text, str(error).splitlines()[0])
            for parameter in self._params:
                parameter.grad = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if batch is not None and batch.samples == 1:
                sums = StepSums(self.model.num_tasks, self._device)
                sums.set_too_large(f"{batch.keys[0]} with {batch.tokens} positions")
                return sums
            share = share.smaller()

    def _forward_backward(self, batch: MicroBatch) -> ForwardResult:
        torch.manual_seed(_dropout_seed(self.settings.seed, batch.first_draw))
        result: ForwardResult = self._engine(batch)
        if result.loss.requires_grad:
            self._engine.backward(result.loss, scale_wrt_gas=False)
        return result

    def _give_up(self, too_large: str) -> None:
        """Raise on all ranks what one could not hold."""
        found = distributed.broadcast_json([one for one in distributed.gather_json(too_large) or [] if one])
        raise VoxtralDistError(
            f"out of memory: {found[0]} does not fit, alone in its micro-batch; lower --max_len, give --grad_ckpt, or "
            "use more memory"
        )

    def losses(self, batch: MicroBatch) -> ForwardResult:
        """Sums of losses of a micro-batch without dropout and without gradient."""
        self.model.eval()
        with torch.no_grad():
            result: ForwardResult = self._engine(batch.to(self._device))
        return result

    def _denominator(self, sums: StepSums) -> float:
        """What the loss sum of the step is divided by: target tokens, examples or tasks over all ranks."""
        value = {
            "tokens": sum(sums.task_tokens),
            "examples": sums["good_samples"],
            "tasks": float(sum(count > 0 for count in sums.task_tokens)),
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
    config = build_ds_config(settings, sum(p.numel() for p in params))
    optimizer = torch.optim.AdamW(
        params,
        lr=0.0,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=params[0].is_cuda or _offloads(config),
    )
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=params, optimizer=optimizer, config=config
    )
    return engine
