"""Memory and energy of a benchmark's step."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from typing import Any

import torch
from train_step_arms import Arms

from voxtral_dist.batch import MicroBatch
from voxtral_dist.step_memory import LiveBytes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for all arms alike, as CUDA's allocator does.

    Else it gives large blocks back to the system, and every operation pays for getting its pages again.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def held_and_peak(arms: Arms, batches: Sequence[MicroBatch]) -> tuple[int, int]:
    """Bytes of tensors before a step, the model's included, and most at once during it.

    As CUDA's allocator counts them; on a CPU they are counted storage by storage.
    """
    gc.collect()
    if arms.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        arms.step(batches)
        return held, torch.cuda.max_memory_allocated()
    tensors = [
        value for batch in batches for value in vars(batch).values() if isinstance(value, torch.Tensor)
    ]
    with LiveBytes([*arms.model.parameters(), *arms.model.buffers(), *tensors]) as live:
        held = live.live
        live.phase("step")
        arms.step(batches)
    return held, max(live.peaks.values())


def joules(device: torch.device) -> float | None:
    """What the GPU has used since its driver was loaded; None without a counter."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        used: Any = pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0))
        return float(used) / 1000
    except (ImportError, pynvml.NVMLError):
        return None
