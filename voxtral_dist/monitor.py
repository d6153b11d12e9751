"""Numbers over time: metrics.jsonl is the record, TensorBoard its copy; and the meters that feed both.

Rank 0 holds a :class:`Monitor`, the other ranks a :class:`NullMonitor`, so that no caller asks for its rank:

    monitor = Monitor.create(run_dir, rank, private_text, start_step)
    monitor.scalars(step, {"loss": 1.25, "grad_norm": None, **throughput.take(), **gpu_meter.read()})

Measuring must never stop a training: what fails here after the start is said once and then left out.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from voxtral_dist import atomic
from voxtral_dist.errors import UserError
from voxtral_dist.logger import get_logger

log = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


class NullMonitor:
    """The monitor of the ranks that do not write: every method does nothing."""

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record numbers of one optimizer step."""

    def texts(self, step: int, tag: str, markdown: str) -> None:
        """Record a text, for example a table of decoded samples."""

    def close(self) -> None:
        """Write what is still buffered."""


class Monitor(NullMonitor):
    """Writes ``metrics.jsonl`` and ``tensorboard/`` of one run directory.

    Args:
        run_dir: an existing directory.
        private_text: write no texts at all.
        start_step: the step this process goes on from. What a killed run recorded after it is dropped from
            the record and hidden from TensorBoard, because those steps are about to happen again.

    Raises:
        UserError: metrics.jsonl cannot be written.
    """

    def __init__(self, run_dir: Path, private_text: bool, start_step: int = 0) -> None:
        self._private_text = private_text
        self._warned = False
        path = run_dir / METRICS_FILE
        try:
            dropped = drop_lines_after(path, start_step)
            self._record = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.fchmod(self._record, 0o600)
        except OSError as error:
            reason = f"{path} cannot be written ({error.strerror}); choose another --output_dir"
            raise UserError(reason) from error
        if dropped:
            log.info("%s: dropped %d lines that an earlier run left after step %d", path, dropped, start_step)
        self._tensorboard = _TensorBoard(run_dir / TENSORBOARD_DIR, start_step)

    @staticmethod
    def create(run_dir: Path, rank: int, private_text: bool, start_step: int = 0) -> NullMonitor:
        """A writing monitor on rank 0, a silent one on the others. Arguments and errors as of the class."""
        return Monitor(run_dir, private_text, start_step) if rank == 0 else NullMonitor()

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append one JSON line ``{"step", "time", **values}`` and one TensorBoard point per value.

        Args:
            step: optimizer steps done.
            values: by name. None was not measured and is left out; a value that is not finite is null in the
                line, because JSON has no NaN.
        """
        measured = {name: float(value) for name, value in values.items() if value is not None}
        line = {name: value if math.isfinite(value) else None for name, value in measured.items()}
        self._append(json.dumps({"step": step, "time": round(time.time(), 3), **line}, ensure_ascii=False))
        self._tensorboard.scalars(step, measured)

    def texts(self, step: int, tag: str, markdown: str) -> None:
        """Show a text in TensorBoard, unless the run is private."""
        if not self._private_text:
            self._tensorboard.text(step, tag, markdown)

    def close(self) -> None:
        """Flush TensorBoard and close the record."""
        self._tensorboard.close()
        os.close(self._record)

    def _append(self, line: str) -> None:
        """Add the whole line or nothing, so that a full disk leaves the record readable."""
        data = f"{line}\n".encode()
        size = os.fstat(self._record).st_size
        try:
            if os.write(self._record, data) == len(data):
                return
            os.ftruncate(self._record, size)
            reason = "no space left"
        except OSError as error:
            reason = str(error.strerror)
        if not self._warned:
            log.warning("%s: a line is lost (%s); training goes on, more may be lost", METRICS_FILE, reason)
        self._warned = True


def drop_lines_after(path: Path, step: int) -> int:
    """Take the lines of later steps and damaged ones out of a metrics.jsonl, in one rename.

    Args:
        path: the record; it may be missing.
        step: lines up to this step stay.

    Returns:
        The number of lines dropped; 0 leaves the file as it is.
    """
    if not path.exists():
        return 0
    with path.open("rb") as file:
        dropped = sum(not _is_kept(line, step) for line in file)
    if dropped:
        with path.open("rb") as old, atomic.replacing(path, private=True) as new:
            new.writelines(line for line in old if _is_kept(line, step))
    return dropped


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class _TensorBoard:
    """A SummaryWriter that switches itself off, with one warning, when anything about it fails."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._writer: Any = None
        with self._guard():
            from torch.utils.tensorboard import SummaryWriter

            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)  # event files may hold decoded text
            self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._guard():
            for name, value in values.items() if self._writer else ():
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, tag: str, markdown: str) -> None:
        with self._guard():
            if self._writer:
                self._writer.add_text(tag, markdown, step)

    def close(self) -> None:
        with self._guard():
            if self._writer:
                self._writer.close()
        self._writer = None

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._writer = None
            log.warning("TensorBoard is off from here on (%s: %s)", type(error).__name__, error)


class GpuMeter:
    """Memory, utilisation and power of this machine's GPUs through NVML.

    Args:
        uuids: NVML names of the devices (``GPU-...``); default: the CUDA devices this process sees. Names and
            not numbers, because NVML counts from 0 whatever CUDA_VISIBLE_DEVICES says.
    """

    def __init__(self, uuids: Sequence[str] | None = None) -> None:
        self._uuids = _visible_uuids() if uuids is None else list(uuids)
        self._nvml: Any = None

    def read(self) -> dict[str, float]:
        """``gpu<i>/memory_gib``, ``gpu<i>/utilisation_percent`` and ``gpu<i>/power_w`` of every device.

        Returns:
            The values; nothing on a machine without GPU, or from the first failure of NVML on.
        """
        try:
            return dict(reading for index in range(len(self._uuids)) for reading in self._device(index))
        except Exception as error:
            log.warning("GPU memory and load are not recorded (%s: %s)", type(error).__name__, error)
            self._uuids = []
            return {}

    def _device(self, index: int) -> Iterator[tuple[str, float]]:
        if self._nvml is None:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
        handle = self._nvml.nvmlDeviceGetHandleByUUID(self._uuids[index])
        yield f"gpu{index}/memory_gib", self._nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30
        yield f"gpu{index}/utilisation_percent", float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        yield f"gpu{index}/power_w", self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000


def _visible_uuids() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]


class Throughput:
    """Rates between two log lines.

    Args:
        clock: seconds from any origin, never running backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._counted: defaultdict[str, float] = defaultdict(float)

    def add(
        self, *, tokens: float, samples: float, audio_seconds: float, padding: float, data_wait: float
    ) -> None:
        """Count one step.

        Args:
            tokens: language-model positions that are not padding.
            samples: examples.
            audio_seconds: audio, without padding.
            padding: language-model positions that are padding.
            data_wait: seconds in which this process waited for data.
        """
        self._counted["tokens"] += tokens
        self._counted["samples"] += samples
        self._counted["audio_seconds"] += audio_seconds
        self._counted["padding"] += padding
        self._counted["data_wait"] += data_wait

    def take(self) -> dict[str, float | None]:
        """Rates and shares since the last call, and start anew.

        Returns:
            ``tokens_per_second``, ``samples_per_second``, ``audio_seconds_per_second``, ``padding_share`` (of
            all positions) and ``data_wait_share`` (of the time); None where nothing was counted.
        """
        now, counted = self._clock(), self._counted
        elapsed, self._start, self._counted = now - self._start, now, defaultdict(float)
        return {
            "tokens_per_second": _ratio(counted["tokens"], elapsed),
            "samples_per_second": _ratio(counted["samples"], elapsed),
            "audio_seconds_per_second": _ratio(counted["audio_seconds"], elapsed),
            "padding_share": _ratio(counted["padding"], counted["tokens"] + counted["padding"]),
            "data_wait_share": _ratio(counted["data_wait"], elapsed),
        }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
