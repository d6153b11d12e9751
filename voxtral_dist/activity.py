"""What this process is doing now, in words: the watchdog names it when the process stands still or dies.

    activity.within("step 12")
    activity.now("micro-batch 3")                       -> 'micro-batch 3 of step 12'
    activity.now("the reduction", waiting=True)         -> waits for other ranks, so standing still is not its fault

One call costs about a microsecond. Every call counts as progress, also with the same words.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Activity:
    """A phase of this process.

    Attributes:
        text: what it does.
        waiting: whether it needs other ranks to go on.
        changes: calls of :func:`now` so far.
        since: :func:`time.monotonic` of the last call, in seconds; comparable in this process only.
    """

    text: str
    waiting: bool
    changes: int
    since: float


_lock = threading.Lock()
_place = ""
_current = Activity("start-up", False, 0, time.monotonic())


def within(place: str) -> None:
    """Name the larger thing that the following phases belong to; "" for none."""
    global _place  # noqa: PLW0603
    _place = place


def now(text: str, waiting: bool = False) -> None:
    """A new phase begins, or the same one has moved on."""
    global _current  # noqa: PLW0603
    with _lock:
        text = f"{text} of {_place}" if _place else text
        _current = Activity(text, waiting, _current.changes + 1, time.monotonic())


def current() -> Activity:
    """The phase this process is in."""
    return _current
