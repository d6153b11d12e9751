"""What this machine's GPUs hold, do and use, read through NVML. Measuring never stops a training.

What cannot be read is said once and then absent, never 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from voxtral_dist.logger import get_logger

log = get_logger(__name__)


class GpuMeter:
    """Memory, utilisation, power and energy of this machine's GPUs.

    Args:
        uuids: NVML names of the devices (``GPU-...``); default: the CUDA devices this process sees. Names and
            not numbers, because NVML counts from 0 whatever CUDA_VISIBLE_DEVICES says.
        clock: seconds from any origin.
    """

    def __init__(
        self, uuids: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._uuids = _visible_uuids() if uuids is None else list(uuids)
        self._clock = clock
        self._nvml: Any = None
        self._said: set[str] = set()
        self._peaks: dict[int, float] = {}
        self._energy = [_Energy() for _ in self._uuids]

    def read(self) -> dict[str, float]:
        """The readings of every device as far as they can be had; {} on a machine without GPU or NVML.

        Returns:
            ``gpu<i>/memory_gib`` in use and ``gpu<i>/memory_peak_gib``, the highest of all readings (torch keeps what
            it once took, so that nothing is missed in between); ``gpu<i>/utilisation_percent``; ``gpu<i>/power_w``;
            ``gpu<i>/energy_wh`` since the first reading.
        """
        if self._uuids and self._nvml is None:
            self._nvml = self._try("load, memory and power", _open_nvml)
            if self._nvml is None:
                self._uuids = []
        readings = (reading for index in range(len(self._uuids)) for reading in self._device(index))
        return {name: value for name, value in readings if value is not None}

    def _device(self, index: int) -> Iterator[tuple[str, float | None]]:
        nvml, prefix = self._nvml, f"gpu{index}/"
        handle = self._try("load, memory and power", nvml.nvmlDeviceGetHandleByUUID, self._uuids[index])
        if handle is None:
            return
        used = self._try("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30)
        if used is not None:
            self._peaks[index] = max(used, self._peaks.get(index, 0.0))
        load = self._try("utilisation", lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        watts = self._try("power", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        yield f"{prefix}memory_gib", used
        yield f"{prefix}memory_peak_gib", self._peaks.get(index)
        yield f"{prefix}utilisation_percent", load
        yield f"{prefix}power_w", watts
        yield (
            f"{prefix}energy_wh",
            self._energy[index].add(self._clock(), watts, _counted_joules(nvml, handle)),
        )

    def _try(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a call returns; None where it fails, which is said the first time."""
        try:
            return call(*arguments)
        except Exception as error:
            if what not in self._said:
                log.warning("GPU %s: not recorded (%s: %s)", what, type(error).__name__, error)
            self._said.add(what)
            return None


class _Energy:
    """Energy of one device: the difference of its own counter, or else power times time between two readings."""

    def __init__(self) -> None:
        self._joules = 0.0
        self._last: tuple[float, float | None, float | None] | None = None

    def add(self, now: float, watts: float | None, counted: float | None) -> float | None:
        """Watt-hours since the first reading; None where this reading has neither power nor counter."""
        then, old_watts, old_counted = self._last or (now, watts, counted)
        if counted is not None and old_counted is not None:
            self._joules += max(0.0, counted - old_counted)
        elif watts is not None and old_watts is not None:
            self._joules += max(0.0, now - then) * (watts + old_watts) / 2
        self._last = (now, watts, counted)
        return None if watts is None and counted is None else self._joules / 3600


def _counted_joules(nvml: Any, handle: Any) -> float | None:
    """The device's energy counter; None on devices older than Volta, which have none."""
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except Exception:
        return None


def _open_nvml() -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def _visible_uuids() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
