"""The DeepSpeed ZeRO-2 engine with one exact reduction per optimizer step. The only module that imports deepspeed.

ZeRO-2 reduces gradients in the order in which they appeared on each rank, so ranks that see text and ranks that see
audio mix up each other's gradients. Here nothing is reduced during the micro-batches. When a rank has done its own,
whatever their number, one small vector of sums goes around; missing gradients become zeros; all are scaled by the one
global denominator; then DeepSpeed reduces every parameter once, in the same order everywhere. The result is the
gradient of the whole step on one process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from voxtral_dist import activity, distributed
from voxtral_dist.batch import MicroBatch
from voxtral_dist.ds_config import EngineSettings, build_ds_config, offloads
from voxtral_dist.errors import VoxtralDistError
from voxtral_dist.logger import get_logger
from voxtral_dist.model import ForwardResult, TrainingModel
from voxtral_dist.step_sums import StepResult, StepSums

log = get_logger(__name__)


class Share(Protocol):
    """A rank's part of a step; see :class:`voxtral_dist.step_loader.StepShare`."""

    def __iter__(self) -> Iterator[MicroBatch]:
        """Its micro-batches, of which there may be none."""

    def smaller(self) -> Share:
        """The same examples in smaller micro-batches."""


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

    def gradient(self, batch: MicroBatch) -> tuple[torch.Tensor, ForwardResult]:
        """Gradient of a micro-batch's loss sum without dropout, and the sums; training goes on as if it were not made.

        It goes around DeepSpeed: no gradient of a parameter, bucket or random state changes.

        Returns:
            float32 [trained elements], in the order of :attr:`named_parameters`, zero where the loss does not reach;
            and the sums.
        """
        self.model.eval()
        self.model.recompute_layers()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.bf16):
            result: ForwardResult = self.model(batch.to(self._device))
        found: Sequence[torch.Tensor | None] = [None] * len(self._params)
        if result.loss.requires_grad:
            found = torch.autograd.grad(result.loss, self._params, allow_unused=True)
        self.model.eval()
        pairs = zip(found, self._params, strict=True)
        flat = [(torch.zeros_like(p) if g is None else g).reshape(-1).float() for g, p in pairs]
        return torch.cat(flat), result

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
        fused=params[0].is_cuda or offloads(config),
    )
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=params, optimizer=optimizer, config=config
    )
    return engine
