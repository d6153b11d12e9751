"""Independent jobs spread over processes of this machine: progress over their rows, one error, no orphans.

A job is a function's argument; the function calls ``tick(place)`` as it comes to each row. That moves the progress
bar, lets an error end the other jobs at their next row, and tells where a process was that died without a word.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from voxtral_dist.errors import VoxtralDistError

Job = TypeVar("Job")
Result = TypeVar("Result")

_PLACE_BYTES = 1024
_POLL_S = 0.2


class Tick(Protocol):
    """Says where a job is: ``tick(place)`` before each row, or ``tick(place, n)`` for n units of progress."""

    def __call__(self, place: str, count: int = 1) -> None: ...


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_jobs(
    function: Callable[[Job, Tick], Result],
    jobs: Sequence[Job],
    *,
    workers: int,
    desc: str,
    unit: str,
    total: int,
    progress: bool,
) -> list[Result]:
    """Call ``function(job, tick)`` for every job, in this process or in up to ``workers`` fresh ones.

    Args:
        function: of a module's top level; it and the jobs travel to the workers.
        jobs: what to do.
        workers: most processes; with 1, or with one job, none is started.
        desc, unit, total: of the progress bar; the counts of all ticks add up to ``total``.
        progress: whether to show it.

    Returns:
        The results in the order of the jobs.

    Raises:
        VoxtralDistError: one of a job; a file that cannot be read or written, named with the row at hand; a worker
            that died, named with the rows that were at hand. The other jobs have ended too.
        RuntimeError: a job failed otherwise; names the row at hand, and its cause is the failure.
    """
    workers = min(workers, len(jobs))
    scale = unit == "B"
    with tqdm(total=total, desc=desc, unit=unit, unit_scale=scale, disable=not progress) as bar:
        if workers > 1:
            return _in_processes(function, jobs, workers, bar)
        here = _Here(bar)
        return [_call(function, job, here.tick, here) for job in jobs]


class _Here:
    """Where a job of this process is."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.place = bar, ""

    def tick(self, place: str, count: int = 1) -> None:
        self.place = place
        self.bar.update(count)


class _Board:
    """Memory shared with the workers: progress and place of each, and whether they are to stop."""

    def __init__(self, context: SpawnContext, workers: int) -> None:
        self.stop: Any = context.Value(ctypes.c_bool, False, lock=False)
        self.seats: Any = context.Value(ctypes.c_int, 0)
        self.done: Any = context.Array(ctypes.c_longlong, workers, lock=False)
        self.places: Any = context.Array(ctypes.c_char, workers * _PLACE_BYTES, lock=False)

    def all_places(self) -> list[str]:
        """Where the workers are that have begun."""
        raw = bytes(self.places[:])
        slots = (raw[at : at + _PLACE_BYTES].rstrip(b"\0") for at in range(0, len(raw), _PLACE_BYTES))
        return [slot.decode("utf-8", "replace") for slot in slots if slot]


class _Stopped(Exception):
    """Another job has failed."""


class _Seat:
    """A worker's part of the board."""

    def __init__(self, board: _Board) -> None:
        with board.seats.get_lock():
            self.number = board.seats.value
            board.seats.value += 1
        self.board, self.place = board, ""

    def tick(self, place: str, count: int = 1) -> None:
        if self.board.stop.value:
            raise _Stopped
        self.place = place
        at = self.number * _PLACE_BYTES
        raw = place.encode("utf-8", "replace")[:_PLACE_BYTES]
        self.board.places[at : at + _PLACE_BYTES] = raw.ljust(_PLACE_BYTES, b"\0")
        self.board.done[self.number] += count


_seat: list[_Seat] = []
"""In a worker: its seat."""


def _enter(board: _Board) -> None:
    """A worker begins: Ctrl-C is the parent's business, and without a parent there is nobody to work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _seat.append(_Seat(board))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(function: Callable[[Job, Tick], Result], job: Job) -> Result:
    return _call(function, job, _seat[0].tick, _seat[0])


def _call(function: Callable[[Job, Tick], Result], job: Job, tick: Tick, where: _Here | _Seat) -> Result:
    try:
        return function(job, tick)
    except (VoxtralDistError, _Stopped):
        raise
    except OSError as error:
        raise VoxtralDistError(f"{where.place}: {error}; mend that and start again") from error
    except Exception as error:
        raise RuntimeError(f"{where.place}: {type(error).__name__}: {error}") from error


def _in_processes(
    function: Callable[[Job, Tick], Result], jobs: Sequence[Job], workers: int, bar: Any
) -> list[Result]:
    context = multiprocessing.get_context("spawn")
    board = _Board(context, workers)
    pool = ProcessPoolExecutor(workers, context, initializer=_enter, initargs=(board,))
    try:
        futures = [pool.submit(_work, function, job) for job in jobs]
        _watch(futures, board, bar)
        return [future.result() for future in futures]
    except BrokenProcessPool:
        places = " or ".join(board.all_places()) or "its start"
        raise VoxtralDistError(
            f"a worker process died (killed, out of memory, or a decoder crashed) at {places}; "
            "try fewer --workers, or remove the row that one worker alone dies of"
        ) from None
    finally:
        board.stop.value = True
        pool.shutdown(cancel_futures=True)


def _watch(futures: Sequence[Future[Any]], board: _Board, bar: Any) -> None:
    """Move the bar until all is done; raises the first error."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
        bar.update(sum(board.done) - bar.n)
        for future in done:
            future.result()
