"""Numbers over time: metrics.jsonl is the record, TensorBoard its copy, with texts and sounds beside.

Rank 0 holds a :class:`Monitor`, the other ranks a :class:`NullMonitor`, so that no caller asks for its rank:

    monitor = Monitor.create(run_dir, rank, private_text, start_step)
    monitor.scalars(step, {"train/loss": 1.25, "train/grad_norm": None})

Recording must never stop a training: what fails here after the start is said once and then left out.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from voxtral_dist import atomic
from voxtral_dist.errors import UserError
from voxtral_dist.logger import get_logger
from voxtral_dist.scoring import ERROR_RATES
from voxtral_dist.tasks import TASKS

log = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"

_SCORES = {name: f"^eval_{name}/{task.metric}$" for name, task in TASKS.items()}
_ERROR_RATES = [_SCORES[name] for name, task in TASKS.items() if task.metric in ERROR_RATES]

LAYOUT = {
    "tasks": {
        "loss": [r"^loss/"],
        "loss on dev rows": [r"^val_loss/"],
        "score, higher is better": [*sorted(set(_SCORES.values()) - set(_ERROR_RATES)), r"^eval/macro$"],
        "error rate, lower is better": _ERROR_RATES,
        "share of the examples so far": [r"^mix/"],
        "likeness of the tasks' gradients": [r"^interference/"],
        "share of a step's target tokens": [r"^target_token_share/"],
    },
    "training": {
        "loss": [r"^train/loss$"],
        "learning rate": [r"^train/learning_rate$"],
        "gradient norm": [r"^train/grad_norm$"],
        "stage, from 0": [r"^train/stage$"],
        "share of the steps so far that were clipped": [r"^train/clip_share$"],
        "steps left out": [r"^train/skipped_steps$"],
    },
    "speed": {
        "MFU": [r"^speed/mfu$"],
        "tokens per second": [r"^speed/tokens_per_second$"],
        "examples and seconds of audio per second": [r"^speed/(samples|audio_seconds)_per_second$"],
        "shares lost": [r"^speed/\w+_share$"],
        "slowest rank over mean": [r"^speed/rank_spread$"],
        "hours to the end": [r"^speed/eta_hours$"],
    },
    "GPU": {
        "memory, GiB": [r"^gpu\d+/memory_"],
        "utilisation, %": [r"^gpu\d+/utilisation_percent$"],
        "power, W": [r"^gpu\d+/power_w$"],
        "energy, Wh": [r"^gpu\d+/energy_wh$"],
    },
}
"""The page "Custom Scalars": charts by group, each of the tags that its patterns match; GPU only where there is one."""

RECORD_ONLY = frozenset({"data/draw_hash"})
"""Numbers of metrics.jsonl that make no curve."""


class NullMonitor:
    """The monitor of the ranks that do not write: every method does nothing."""

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record numbers of one optimizer step."""

    def texts(self, step: int, tag: str, markdown: str) -> None:
        """Record a text, for example a table of decoded samples."""

    def audio(self, step: int, tag: str, samples: torch.Tensor, rate: int) -> None:
        """Record a sound: float32 [n] in [-1, 1], ``rate`` samples per second."""

    def close(self) -> None:
        """Write what is still buffered."""


class Monitor(NullMonitor):
    """Writes ``metrics.jsonl`` and ``tensorboard/`` of one run directory.

    Args:
        run_dir: an existing directory.
        private_text: write no texts and no sounds.
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
            self._tensorboard.write("add_text", tag, markdown, step)

    def audio(self, step: int, tag: str, samples: torch.Tensor, rate: int) -> None:
        """Play a sound in TensorBoard, unless the run is private."""
        if not self._private_text:
            self._tensorboard.write("add_audio", tag, samples[None], step, sample_rate=rate)

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
            groups = {g: c for g, c in LAYOUT.items() if g != "GPU" or torch.cuda.is_available()}
            charts = {g: {t: ["Multiline", p] for t, p in c.items()} for g, c in groups.items()}
            self._writer.add_custom_scalars(charts)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point per value."""
        for name, value in values.items():
            if name not in RECORD_ONLY:
                self.write("add_scalar", name, value, step)

    def write(self, method: str, *arguments: Any, **options: Any) -> None:
        """Call a method of the SummaryWriter."""
        with self._guard():
            if self._writer:
                getattr(self._writer, method)(*arguments, **options)

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
