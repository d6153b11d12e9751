"""A rank that stands still or dies is named, with what it was doing, and the run ends instead of hanging for ever.

Every rank says every BEAT_S seconds what it does (:mod:`voxtral_dist.activity`) to a store in the memory of rank 0.
Ranks 0 and 1 watch all ranks; the others watch rank 0, without which nobody would tell them. Who stood still for the
allowed time without waiting for others, or fell silent, is the culprit: one line names it, every rank that can prints
the stacks of its threads, and all end.

A watcher measures with its own monotonic clock when it last saw a rank's words change; no clocks of different machines
meet, and a job that is suspended as a whole has missed nothing. What a silent rank did is what it said last, so up to
BEAT_S seconds before.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist import activity, distributed
from voxtral_dist.errors import VoxtralDistError
from voxtral_dist.logger import get_logger

BEAT_S = 2.0
"""Seconds between two heartbeats; a sixth of the allowed time when that is shorter."""

SILENT_BEATS = 2.5
"""Missed heartbeats after which a rank counts as silent."""

WATCHERS = 2
"""Lowest ranks that watch all: one would be enough if it could not stop itself."""

VERDICT = "verdict"

log = get_logger(__name__)


@contextmanager
def guarding(timeout_s: float, on_stall: Callable[[str], None]) -> Iterator[None]:
    """Run the block under a :class:`Watchdog`. Collective; 0 seconds: without one.

    Raises:
        VoxtralDistError: the block failed because other ranks died; names them. Every other error stays as it is.
    """
    if not timeout_s:
        yield
        return
    watchdog = Watchdog(timeout_s, on_stall)
    try:
        yield
        activity.now("the end", waiting=True)
        distributed.barrier()  # nobody loses the store before all are done
    except RuntimeError as error:  # what gloo, nccl and DeepSpeed raise when a peer is gone
        lost = watchdog.silent()
        if not lost:
            raise
        raise VoxtralDistError(
            f"{'; '.join(lost)}; the same command goes on from the last checkpoint"
        ) from error
    finally:
        watchdog.close()


@dataclass
class _Seen:
    """A rank's last heartbeat, and when this process noticed that it was new and that it told of progress."""

    beat: dict[str, Any]
    heard: float
    moved: float

    @property
    def name(self) -> str:
        """The rank with its machine and process."""
        return f"rank {self.beat['rank']} ({self.beat['host']}, pid {self.beat['pid']})"


@dataclass(frozen=True)
class _Verdict:
    """Why the run ends, the ranks at fault, and (host, pid) of those that no longer hear a signal but SIGKILL."""

    message: str
    culprits: list[int]
    deaf: list[tuple[str, int]]


class Watchdog:
    """Two daemon threads of a rank: one talks to the store, which may hang with rank 0; the other watches.

    Args:
        timeout_s: how long a rank may stand still, in seconds, after it named its first activity; loading the model
            takes as long as it takes.
        on_stall: called on every rank that can, with the line that names the culprit; it ends the process.

    Every rank makes one at the same place, with the process group open.
    """

    def __init__(self, timeout_s: float, on_stall: Callable[[str], None]) -> None:
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self._timeout_s, self._on_stall = timeout_s, on_stall
        self._beat_s = min(BEAT_S, timeout_s / 6)
        self._first = activity.current().changes
        self._all = self.rank < WATCHERS
        self._beats = 0
        self._seen: dict[int, _Seen] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._verdict: _Verdict | None = None
        self._server = distributed.open_store() if self.rank == 0 else None
        port = distributed.broadcast_json(self._server.port if self._server else None)
        self._store = distributed.open_store(port)
        if self.rank == 0:
            self._store.set(VERDICT, "")
        self._say()
        distributed.barrier()
        self._listen(range(self.world_size))
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._watch)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop both threads; a thread that hangs on the store ends with the process."""
        self._closed.set()
        for thread in self._threads:
            thread.join(1.0)

    def silent(self) -> list[str]:
        """Name the ranks whose heartbeats have stopped; for when a collective has failed.

        Waits for up to four heartbeats. Does not return when a stall was found: the process then ends with it. Where
        rank 0 is gone, the lowest rank that is left also logs the names, because errors are told by rank 0.
        """
        if not self._all:
            self._excuse(time.monotonic())  # nothing was heard of most ranks so far
            self._all = True
        lost: list[int] = []
        until = time.monotonic() + 4 * self._beat_s
        while time.monotonic() < until and not lost and self.world_size > 1:
            self._closed.wait(self._beat_s / 4)
            if self._verdict:
                self._threads[1].join()
            lost = self._silent_ranks()
        seen = [self._seen[rank] for rank in lost]
        names = [f"{one.name} died or lost its connection in '{one.beat['text']}'" for one in seen]
        if lost and self.rank == 0:
            self._closed.wait(self._beat_s)  # the others still ask the store
        elif 0 in lost and self._speaks(lost):
            log.error("%s", "; ".join(names))
        return names

    def _speaks(self, culprits: list[int]) -> bool:
        """Whether this is the lowest rank that is not at fault."""
        return self.rank == min(set(range(self.world_size)) - set(culprits), default=0)

    def _silent_ranks(self) -> list[int]:
        """Ranks that missed heartbeats; rank 0 alone when its store does not answer, which hides all others."""
        limit = time.monotonic() - SILENT_BEATS * self._beat_s
        with self._lock:
            quiet = [rank for rank in self._watched() if self._seen[rank].heard < limit]
        return [0] if self.rank in quiet else quiet

    def _watched(self) -> Sequence[int]:
        """The ranks this one listens to."""
        return range(self.world_size) if self._all else sorted({0, self.rank})

    def _talk(self) -> None:
        """Thread: exchange heartbeats until the store is gone; its silence is judged by the other thread."""
        with suppress(RuntimeError):
            while not self._closed.wait(self._beat_s):
                self._say()
                self._listen(self._watched())

    def _say(self) -> None:
        doing = activity.current()
        self._beats += 1
        beat = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beat": self._beats,
            "text": doing.text,
            "waiting": doing.waiting and self.world_size > 1,
            "changes": doing.changes - self._first,
        }
        self._store.set(f"rank{self.rank}", json.dumps(beat))
        if self._verdict:
            self._store.set(VERDICT, json.dumps(vars(self._verdict)))

    def _listen(self, ranks: Sequence[int]) -> None:
        """Read the heartbeats of ``ranks``, and the verdict when another rank has found one."""
        *beats, verdict = self._store.multi_get([*(f"rank{rank}" for rank in ranks), VERDICT])
        now = time.monotonic()
        with self._lock:
            for rank, text in zip(ranks, beats, strict=True):
                beat, old = json.loads(text), self._seen.get(rank)
                heard = now if old is None or beat["beat"] != old.beat["beat"] else old.heard
                moved = now if old is None or beat["changes"] != old.beat["changes"] else old.moved
                self._seen[rank] = _Seen(beat, heard, moved)
            if verdict and not self._verdict:
                self._verdict = _Verdict(**json.loads(verdict))

    def _watch(self) -> None:
        """Thread: judge what was heard, until somebody stands still."""
        before = time.monotonic()
        while not self._closed.wait(self._beat_s):
            now = time.monotonic()
            self._excuse(now - before - self._beat_s)
            before = now
            self._verdict = self._verdict or self._judge(now)
            if self._verdict:
                return self._end(self._verdict)

    def _excuse(self, overslept: float) -> None:
        """Forgive all ranks the time in which this process itself was stopped or starved."""
        if overslept > self._beat_s:
            now = time.monotonic()
            with self._lock:
                for seen in self._seen.values():
                    seen.heard = min(now, seen.heard + overslept)
                    seen.moved = min(now, seen.moved + overslept)

    def _judge(self, now: float) -> _Verdict | None:
        """The verdict at a time of this process's clock, None while all is well."""
        hidden = 0 in (quiet := self._silent_ranks()) and self.rank != 0
        with self._lock:
            suspects = [self._seen[rank] for rank in ([0] if hidden else self._watched())]
        still = [seen for seen in suspects if self._stands_still(seen, now)]
        if still:
            words = [
                f"{s.name} has stood still for {now - s.moved:.0f} s in '{s.beat['text']}'" for s in still
            ]
            deaf = [(s.beat["host"], s.beat["pid"]) for s in still if s.beat["rank"] in quiet]
            return self._sentence("; ".join(words), still, deaf)
        stuck = [s for s in suspects if s.beat["waiting"] and now - s.moved > self._timeout_s]
        if len(stuck) < self.world_size:
            return None
        words = [f"{seen.name} in '{seen.beat['text']}'" for seen in stuck]
        what = "every rank waits for the others and nothing has moved for"
        return self._sentence(f"{what} {self._timeout_s:.0f} s: {', '.join(words)}", [], [])

    def _stands_still(self, seen: _Seen, now: float) -> bool:
        idle = seen.beat["changes"] > 0 and not seen.beat["waiting"] and now - seen.moved > self._timeout_s
        return idle or now - seen.heard > self._timeout_s

    @staticmethod
    def _sentence(what: str, culprits: list[_Seen], deaf: list[tuple[str, int]]) -> _Verdict:
        end = "the run ends, the same command goes on from the last checkpoint"
        return _Verdict(f"{what}; {end}", [seen.beat["rank"] for seen in culprits], deaf)

    def _end(self, verdict: _Verdict) -> None:
        """Say it on the lowest rank that is not at fault, show where this rank is, give the others time to hear."""
        if self._speaks(verdict.culprits):
            log.error("%s", verdict.message)
        log.error("the threads of rank %d:", self.rank)
        faulthandler.dump_traceback()
        self._closed.wait((4 if self.rank == 0 else 2) * self._beat_s)  # rank 0 takes the store with it
        for host, pid in verdict.deaf:
            _kill_rank(host, int(pid))
        self._on_stall(verdict.message)


def _kill_rank(host: str, pid: int) -> None:
    """SIGKILL a rank of this machine: launchers send SIGTERM, which a stopped process does not get."""
    with suppress(OSError):
        same = Path(f"/proc/{pid}/cmdline").read_bytes() == Path("/proc/self/cmdline").read_bytes()
        if host == socket.gethostname() and same:
            os.kill(pid, signal.SIGKILL)
