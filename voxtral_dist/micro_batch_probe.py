"""The largest micro-batch that a device holds, found by training on made-up ones: ``python tools/probe_micro_batch.py``

Real weights, real engine: each attempt is one optimizer step with the learning rate 0 over the same micro-batch twice,
so that the second finds all gradients there. The micro-batch is the dearest of its size, :meth:`Shape.worst`. All ranks
try the same sizes, and one fits when it fits everywhere.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from voxtral_dist import distributed, memory, prepare, step_memory
from voxtral_dist.batch import MicroBatch
from voxtral_dist.config import TrainConfig
from voxtral_dist.ds_config import EngineSettings
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import UserError
from voxtral_dist.logger import get_logger
from voxtral_dist.step_memory import LiveBytes, Shape

log = get_logger(__name__)


class MadeUp:
    """A share of given micro-batches, and of none once one of them did not fit.

    Attributes:
        failed: one did not.
    """

    def __init__(self, *batches: MicroBatch) -> None:
        self._batches = batches
        self.failed = False

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._batches)

    def smaller(self) -> MadeUp:
        """Nothing, which every device holds."""
        self._batches, self.failed = (), True
        return self


def held_by(engine: TrainEngine) -> list[torch.Tensor]:
    """All that stays on the device between the steps: weights, master weights, Adam's moments."""
    zero = engine.zero_optimizer
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    return [
        *engine.model.parameters(),
        *engine.model.buffers(),
        *zero.single_partition_of_fp32_groups,
        *states,
    ]


def probe(config: TrainConfig, device: torch.device, limit_bytes: int = 0) -> int:
    """Most positions of a micro-batch, to a sixteenth, that fit with :data:`memory.FREE_SHARE` left free. Collective.

    Args:
        config: the flags of the run.
        device: this rank's, the process group being open.
        limit_bytes: use no more of the device; 0: all of it. A CPU needs a limit: its tensor storages are counted.

    Raises:
        UserError: a CPU without a limit, or the weights do not fit.
    """
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        limit = min(limit_bytes or whole, whole)
        torch.cuda.set_per_process_memory_fraction((1 - memory.FREE_SHARE) * limit / whole, device)
    elif not limit_bytes:
        raise UserError("--limit_gb is missing; a CPU's memory has no limit of its own to probe")
    try:
        training = prepare.training_model(config, device, 1)
        names = EngineSettings.__dataclass_fields__.keys() - {"bf16"}
        flags = {name: getattr(config, name) for name in names}
        engine = TrainEngine(training, EngineSettings(bf16=prepare.use_bf16(config, device), **flags))
        engine.train_step(MadeUp(), 0.0)  # makes Adam's moments
        with _counted(engine, limit_bytes):
            engine.train_step(MadeUp(), 0.0)
    except torch.OutOfMemoryError as error:
        line = str(error).splitlines()[0]
        raise UserError(f"the weights and the optimizer alone do not fit: {line}") from error

    def fits(positions: int) -> bool:
        with _counted(engine, limit_bytes):
            return _attempt(engine, positions, config)

    return memory.largest(fits, config.max_len)


def _counted(engine: TrainEngine, limit_bytes: int) -> AbstractContextManager[object]:
    """Count storages and fail above the limit, where the device does not."""
    if engine.device.type == "cuda":
        return nullcontext()
    return LiveBytes(held_by(engine), int((1 - memory.FREE_SHARE) * limit_bytes))


def _attempt(engine: TrainEngine, positions: int, config: TrainConfig) -> bool:
    """Whether a step with micro-batches of so many positions fits on all ranks; leaves nothing behind."""
    model_config = engine.model.voxtral.config
    shape = Shape.worst(positions, config.max_len, model_config, config.packed)
    with engine.device:
        batch = step_memory.micro_batch(shape, model_config)
    batch = dataclasses.replace(batch, samples=max(2, shape.rows))  # one example that does not fit ends a run
    share = MadeUp(batch, batch)
    engine.train_step(share, 0.0)
    failures = distributed.all_reduce_sum(torch.tensor([float(share.failed)], device=engine.device))
    failed = bool(failures)
    del batch, share
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    log.info("%d positions %s", positions, "do not fit" if failed else "fit")
    return not failed
