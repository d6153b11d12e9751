"""Checkpoints beside the training: the ranks wait while state is copied to host memory, not while it is written.

    saver = Saver(run_dir, keep=3, max_failures=3)
    saver.save(step, engine, state)      copies, then a thread of rank 0 writes and deletes what is older
    saver.wait(final=True)               the last checkpoint is whole, or an error says why not

Every rank makes the same calls. What a thread of rank 0 found out reaches the others with the next call.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from voxtral_dist import activity, checkpoint, distributed
from voxtral_dist.checkpoint import Snapshot
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import VoxtralDistError
from voxtral_dist.logger import get_logger

log = get_logger(__name__)


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Args:
        run_dir: the run directory.
        keep: checkpoints kept besides the best one.
        max_failures: failed saves in a row that end the run; 0 and 1: the first does.
    """

    def __init__(self, run_dir: Path, keep: int, max_failures: int) -> None:
        self._run_dir = run_dir
        self._keep = keep
        self._max_failures = max(1, max_failures)
        self._step: int | None = None
        self._writer: threading.Thread | None = None
        self._failure: str | None = None
        self._expected = True
        self._failures = 0

    def save(self, step: int, engine: TrainEngine, state: dict[str, Any]) -> None:
        """Copy the state of a step and begin to write its checkpoint, once the one before is done. Collective.

        Args:
            step: optimizer steps done.
            engine: of the run.
            state: JSON-able trainer state.

        Raises:
            VoxtralDistError: as :meth:`wait`, of the checkpoint before.
        """
        self.wait()
        activity.within(f"the checkpoint of step {step}")
        activity.now("gathering", waiting=True)
        taken = checkpoint.snapshot(engine, state | {"step": step})
        self._step, self._failure = step, None
        if taken is not None:
            self._writer = threading.Thread(target=self._write, args=(taken,), name="checkpoint writer")
            self._writer.start()

    def wait(self, final: bool = False) -> None:
        """Return when nothing is being written any more, on every rank. Collective.

        Args:
            final: the last checkpoint must be whole, for the process is about to end.

        Raises:
            VoxtralDistError: the last of too many saves in a row failed, or one failed that must not; on all ranks
                alike, and the checkpoints before are as they were.
        """
        if self._step is not None:
            self._settle(self._step)
        if self._failure and (final or not self._expected or self._failures >= self._max_failures):
            raise VoxtralDistError(f"{self._failure} (failed saves in a row: {self._failures})")

    def _settle(self, step: int) -> None:
        """Wait for the writer and tell every rank how it ended."""
        activity.within(f"the checkpoint of step {step}")
        if self._writer is not None:
            activity.now("writing")
            self._writer.join()
        activity.now("agreeing on the end", waiting=True)
        self._failure, self._expected = distributed.broadcast_json([self._failure, self._expected])
        self._failures = self._failures + 1 if self._failure else 0
        self._step = self._writer = None

    def _write(self, taken: Snapshot) -> None:
        """What the thread does; it must not touch what :mod:`activity` says of the main one."""
        try:
            checkpoint.publish(self._run_dir, taken)
            checkpoint.prune(self._run_dir, self._keep)
        except (OSError, SafetensorError) as error:
            self._fail(taken, error)
        except Exception as error:  # a bug: the main thread would never hear of it
            self._expected = False
            self._fail(taken, error)
            log.error("the checkpoint writer failed", exc_info=True)

    def _fail(self, taken: Snapshot, error: Exception) -> None:
        latest = checkpoint.pointer(self._run_dir, "latest")
        left = f"{latest.name} stays the newest" if latest else "none was written before"
        reason = " ".join(str(error).split())
        self._failure = (
            f"checkpoint of step {taken.state['step']} could not be written: {reason}; {left}; "
            f"free space or mend {self._run_dir}"
        )
        in_a_row = f"failed saves in a row: {self._failures + 1}, {self._max_failures} end the run"
        log.warning("%s (%s)", self._failure, in_a_row)
