"""Ranks and collectives: the only reader of RANK / SLURM_* and the only caller of torch.distributed.

The same program runs under the deepspeed launcher, torchrun, srun, and alone: :func:`read_world` takes torchrun's
variables, then slurm's, else one process. Objects travel between ranks as JSON, never as pickles.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from voxtral_dist.errors import BadSamplesError, UserError, run_main
from voxtral_dist.logger import get_logger

log = get_logger(__name__)
_started = False

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in a collective before it gives up."""


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``world_size``, ``local_rank`` on its machine."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0


def read_world() -> World:
    """Find this process's rank and export the variables that DeepSpeed and torch expect.

    Raises:
        UserError: the variables contradict each other or several ranks have no master address.
    """
    values = _from_names("RANK", "WORLD_SIZE", "LOCAL_RANK") or _from_names(
        "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
    )
    rank, world_size, local_rank = values or (0, 1, 0)
    if not 0 <= rank < world_size:
        raise UserError(
            f"rank {rank} of world size {world_size}: check RANK and WORLD_SIZE (or SLURM_PROCID, SLURM_NTASKS)"
        )
    if world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"{world_size} ranks but no MASTER_ADDR; set MASTER_ADDR and MASTER_PORT or use a launcher"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(29500 if world_size > 1 else _free_port())
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return World(rank, local_rank, world_size)


def _from_names(rank: str, world_size: str, local_rank: str) -> tuple[int, int, int] | None:
    if rank not in os.environ or world_size not in os.environ:
        return None
    try:
        return int(os.environ[rank]), int(os.environ[world_size]), int(os.environ.get(local_rank, "0"))
    except ValueError as error:
        raise UserError(
            f"{rank}={os.environ[rank]!r} and {world_size}={os.environ[world_size]!r} must be integers"
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_as_rank(run: Callable[[World], None]) -> None:
    """Run a program as one of its ranks and leave the process; an error of ours is told by rank 0 alone."""

    def start() -> None:
        world = read_world()
        run_main(lambda: heard(world), speak=world.is_main)

    def heard(world: World) -> None:
        try:
            run(world)
        except (
            UserError,
            BadSamplesError,
        ) as error:  # after the start of the group it may be this rank's alone
            if _started and not world.is_main:
                log.warning("this rank ends: %s", error)
            raise

    run_main(start)


def local_device(world: World) -> torch.device:
    """This rank's device: its CUDA device when there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = world.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def start(device: torch.device) -> None:
    """Open the process group (nccl on CUDA, gloo on the CPU). Every rank must call it."""
    global _started  # noqa: PLW0603
    _started = True
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)


def stop() -> None:
    """Close the process group, when it is open."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank in the open group, 0 without one."""
    return int(dist.get_rank()) if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks in the open group, 1 without one."""
    return int(dist.get_world_size()) if dist.is_initialized() else 1


def ranks_here() -> int:
    """Number of ranks of the open group on this machine. Collective."""
    here = socket.gethostname()
    hosts: list[str] = broadcast_json(gather_json(here))
    return hosts.count(here)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        all_reduce_sum(torch.zeros(1, device=_device()))


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over all ranks in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather_flat(part: torch.Tensor) -> torch.Tensor:
    """Concatenate equally long one-dimensional tensors of all ranks, in rank order."""
    if world_size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def gather_json(value: Any) -> list[Any] | None:
    """Collect a JSON-able value of every rank: the list in rank order on rank 0, None elsewhere."""
    if not dist.is_initialized():
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=_device())
    sizes[dist.get_rank()] = data.numel()
    longest = int(all_reduce_sum(sizes).max())
    padded = torch.nn.functional.pad(data, (0, longest - data.numel()))
    whole = all_gather_flat(padded).cpu().view(-1, longest)
    if dist.get_rank() != 0:
        return None
    return [json.loads(bytes(row[:size].numpy())) for row, size in zip(whole, sizes.tolist(), strict=True)]


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON-able value on every rank."""
    if not dist.is_initialized():
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    size = torch.tensor([data.numel()], device=_device())
    dist.broadcast(size, 0)
    if dist.get_rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=_device())
    dist.broadcast(data, 0)
    return json.loads(bytes(data.cpu().numpy()))


def open_store(port: int = 0) -> Any:
    """A small key-value store in the memory of rank 0, apart from the process group, for threads of their own.

    Requests wait for as long as the connection stands: a stopped rank 0 does not answer.

    Args:
        port: where rank 0 serves. 0, for rank 0: serve on a free port, the ``port`` of the result.
    """
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store = dist.TCPStore(host, port, is_master=port == 0, wait_for_workers=False)
    store.set_timeout(timedelta(days=1))
    return store


def _device() -> torch.device:
    """Where tensors of collectives must live."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
