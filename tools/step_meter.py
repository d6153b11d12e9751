"""Time, memory and energy of a benchmark's step, and the micro-batches whose memory is compared."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import time
from collections.abc import Sequence
from typing import Any

import pynvml
import torch
from train_step_arms import Arms, Levers
from train_step_data import Lengths

from voxtral_dist import flops
from voxtral_dist.batch import MicroBatch
from voxtral_dist.step_memory import LiveBytes

TRIES = {"cuda": 1, "cpu": 10}
"""To measure the peak of a device; a busy machine is slow in some of them."""

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
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        used: Any = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return float(used) / 1000
    except pynvml.NVMLError:
        return None


@dataclasses.dataclass
class Measured:
    """What the rounds of one arm took.

    Attributes:
        seconds: of each round's step.
        peak: most bytes in use during a step, the model's own included.
        held: bytes in use before a step.
        joules: of a step, None without a counter.
        padding: share of positions that are padding.
        loss: of the last step.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0
    held: int = 0
    joules: float | None = None
    padding: float = 0.0
    loss: float = 0.0


def run_round(arms: Arms, levers: Levers, measured: Measured, steps: int) -> None:
    """Time some steps of an arm and keep the figures; before its first round, warm up and measure the memory."""
    batches = arms.prepare(levers)
    if not measured.seconds:
        measured.padding = 1 - sum(b.tokens for b in batches) / sum(b.positions for b in batches)
        if arms.device.type == "cuda":
            arms.step(batches)
        measured.held, measured.peak = held_and_peak(arms, batches)
    before = joules(arms.device)
    for _ in range(steps):
        started = time.perf_counter()
        measured.loss = arms.step(batches)
        measured.seconds.append(time.perf_counter() - started)
    after = joules(arms.device)
    if before is not None and after is not None:
        measured.joules = (after - before) / steps


def profile(arms: Arms, levers: Levers) -> None:
    """Print where the device's time of a step goes."""
    batches = arms.prepare(levers)
    arms.step(batches)
    with torch.profiler.profile() as profiler:
        arms.step(batches)
    print(
        profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=70)
    )


def clips(arms: Arms, levers: Levers) -> list[dict[str, Any]]:
    """Peak memory of micro-batches of so many clips of 3 s, decoder layers computed once and twice."""
    rows = []
    for recompute in (0, 1):
        for count in (8, 16, 32):
            arms.examples = [Lengths(0, 375 + 8, 46, 1, 3.0)] * count
            pulled = dataclasses.replace(levers, recompute=recompute, tokens=429 * count)
            if recompute:  # not possible together
                pulled = dataclasses.replace(pulled, compiled=False)
            measured = Measured()
            try:
                run_round(arms, pulled, measured, 1)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            peak = measured.peak / 2**30
            rows.append(
                {
                    "clips": count,
                    "recompute": recompute,
                    "peak_gib": peak,
                    "clips_per_s": count / measured.seconds[0],
                }
            )
            print(rows[-1], flush=True)
    return rows


def floors(arms: Arms, useful_flops: int) -> dict[str, float]:
    """Seconds that a step cannot go below on this device: its FLOPs, and reading all weights once.

    At the rate of one large matrix product and the bandwidth of one large copy, both measured here.
    """
    rate = max(flops.measured_peak(arms.device, "it").flops for _ in range(TRIES[arms.device.type]))
    weights = sum(parameter.nbytes for parameter in arms.model.parameters())
    return {"flops": useful_flops / rate, "bytes": weights / copy_bandwidth(arms.device)}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second, the best of some copies of 256 MB."""
    source = torch.ones(1 << 26, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - started))
    return best


def memory_by_rows(arms: Arms, usual: Levers, ours: Levers, counts: Sequence[int]) -> list[dict[str, float]]:
    """Peak memory of the usual recipe with so many examples in a micro-batch, and of ours, which cuts its own, over it.

    Printed, with the frozen weights and without what is held before a step.
    """
    rows_before, found = arms.rows, []
    held, peak = held_and_peak(arms, arms.prepare(ours))
    print("peak memory by the examples in a micro-batch of the usual recipe; ours over it:", flush=True)
    for arms.rows in counts:
        try:
            theirs_held, theirs = held_and_peak(arms, arms.prepare(usual))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        row = {
            "rows": arms.rows,
            "usual_gib": theirs / 2**30,
            "weights_share": theirs_held / theirs,
            "ours_over_usual": peak / theirs,
            "ours_over_usual_step": (peak - held) / (theirs - theirs_held),
        }
        found.append(row)
        print("  " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    arms.rows = rows_before
    return found
