"""Adam's state by parameter name, for any number of ranks: gathered from ZeRO-2's flat partitions and put back.

ZeRO-2 flattens the trained parameters into one buffer, padded at its end, and gives each rank an equal slice. Gathering
the slices once and cutting the buffer at the parameters' places needs one collective per moment; loading needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from voxtral_dist import distributed
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import VoxtralDistError

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather(engine: TrainEngine, keep: bool = True) -> tuple[dict[str, torch.Tensor], int]:
    """Copy Adam's moments of all ranks to host memory. Collective.

    Args:
        engine: of the run.
        keep: whether this rank wants them; it gets no tensors otherwise.

    Returns:
        ``{"exp_avg/<name>": float32 tensor of the parameter's shape, ...}`` on the CPU, and Adam's step count. Before
        the first step the moments are zeros.
    """
    zero = engine.zero_optimizer
    partition = _partition(zero)
    state = zero.optimizer.state.get(partition, {})
    tensors = {}
    for moment in MOMENTS:
        mine = state.get(moment, torch.zeros_like(partition))  # on the host where the optimizer is offloaded
        flat = distributed.all_gather_flat(mine.to(engine.named_parameters[0][1].device))
        flat = flat.cpu() if keep else flat
        for name, parameter, offset in _places(engine) if keep else ():
            part = flat[offset : offset + parameter.numel()].view(parameter.shape)
            tensors[f"{moment}/{name}"] = part.clone()
    return tensors, int(state.get("step", 0))


def restore(engine: TrainEngine, tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Put back what :func:`gather` returned, and make the master weights those of the model. Not collective.

    Raises:
        VoxtralDistError: a tensor is missing or has another shape.
    """
    zero = engine.zero_optimizer
    partition = _partition(zero)
    size, first = partition.numel(), distributed.rank() * partition.numel()
    whole = torch.zeros(size * zero.partition_count[0])

    def own_part(values: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
        for name, parameter, offset in _places(engine):
            value = values.get(prefix + name)
            if value is None or value.shape != parameter.shape:
                raise VoxtralDistError(
                    f"the saved optimizer state has no {prefix}{name} of shape {tuple(parameter.shape)}"
                )
            whole[offset : offset + parameter.numel()] = value.detach().float().cpu().flatten()
        return whole[first : first + size].to(partition.device, copy=True)

    moments = {moment: own_part(tensors, f"{moment}/") for moment in MOMENTS}
    steps = torch.tensor(float(step), device=partition.device)  # the fused Adam of CUDA wants it there
    zero.optimizer.state[partition] = {"step": steps, **moments}
    partition.data.copy_(own_part(dict(engine.named_parameters), ""))


def _partition(zero: Any) -> torch.Tensor:
    """This rank's flat float32 slice of the trained parameters."""
    if len(zero.single_partition_of_fp32_groups) != 1:
        raise VoxtralDistError("the optimizer must have exactly one parameter group")
    return zero.single_partition_of_fp32_groups[0]


def _places(engine: TrainEngine) -> Iterator[tuple[str, torch.nn.Parameter, int]]:
    """Name, parameter and offset of each trained parameter in the flat buffer, in the buffer's order."""
    zero = engine.zero_optimizer
    names = {id(parameter): name for name, parameter in engine.named_parameters}
    order = zero.round_robin_bit16_groups[0]
    offsets = getattr(zero, "round_robin_bit16_offsets", None)
    running = 0
    for number, parameter in enumerate(order):
        yield names[id(parameter)], parameter, int(offsets[0][number]) if offsets else running
        running += parameter.numel()
