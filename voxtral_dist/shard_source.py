"""Where shards come from: folders and URLs, read as bytes, checked on the way, with locks between processes.

URLs go to webdataset's ``gopen``, which runs programs and for some schemes a shell. So only plain ``https`` and ``s3``
addresses get that far (:func:`is_url`), without a character that a shell, curl or a log could take for something else.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from voxtral_dist import atomic
from voxtral_dist.errors import UserError, VoxtralDistError

TRIES = 4
PAUSE_S = 2.0
"""Seconds before the second try; each later pause is twice as long."""
STALL_S = 300.0
"""Seconds without a byte after which a transfer is given up."""
NEVER = threading.Event()
"""An event that is never set."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_URL = re.compile(r"(?:https|s3)://[A-Za-z0-9][A-Za-z0-9.-]*(?::\d{1,5})?(?:/[A-Za-z0-9._~%+=@-]+)*/?")

Result = TypeVar("Result")
Item = TypeVar("Item")


class Stopped(Exception):
    """The caller has ended a transfer."""


def is_url(location: str) -> bool:
    """Whether a data set lies behind a URL; :class:`UserError` for one that is not a plain https or s3 address."""
    if not _SCHEME.match(location):
        return False
    if not _URL.fullmatch(location):
        raise UserError(
            f"{location!r} is not opened: a data set is a folder or a plain https:// or s3:// address of letters, "
            "digits and . _ ~ % + = @ - /; give a folder with a colon in its name by its full path"
        )
    return True


def retrying(source: str, work: Callable[[], Result], stop: threading.Event) -> Result:
    """``work()``, tried again after :class:`OSError`; then :class:`VoxtralDistError` with ``source`` and reason."""
    reason = ""
    for attempt in range(TRIES):
        if attempt and stop.wait(PAUSE_S * 2 ** (attempt - 1)):
            raise Stopped
        try:
            return work()
        except OSError as error:
            reason = str(error)
    raise VoxtralDistError(
        f"{source}: not fetched in {TRIES} tries: {reason}; see that it is there and can be read, then start again"
    )


def for_each(work: Callable[[Item], object], items: Sequence[Item]) -> None:
    """Do ``work`` for all items, eight at a time; the first error ends it."""
    with ThreadPoolExecutor(8) as pool:
        try:
            for _ in pool.map(work, items):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def copy(
    source: str,
    target: Path,
    size: int,
    sha256: str,
    stop: threading.Event,
    make_room: Callable[[int, Callable[[int], object]], None] | None = None,
) -> None:
    """Publish ``source`` as ``target``, whole or not at all.

    Args:
        source: absolute path or URL.
        target: in a folder that exists.
        size: of the file in bytes; without a hash the most that it may have.
        sha256: of its contents, hex; "" takes any.
        stop: ends the transfer.
        make_room: called with the size and a function that reserves the space, before a byte is written.

    Raises:
        OSError: the source cannot be read, or is not of this size and hash.
        Stopped: ``stop`` was set meanwhile.
    """
    digest = hashlib.sha256()
    with atomic.replacing(target) as file:
        if make_room is not None:
            make_room(size, file.truncate)

        def sink(chunk: bytes) -> None:
            digest.update(chunk)
            file.write(chunk)

        read(source, size, stop, sink)
        if sha256 and file.tell() != size:
            raise OSError(f"{file.tell()} bytes came where the manifest says {size}")
        if sha256 and digest.hexdigest() != sha256:
            raise OSError("its hash is not the manifest's")


def read(source: str, limit: int, stop: threading.Event, sink: Callable[[bytes], object]) -> None:
    """Hand the bytes of a file or URL to ``sink``; :class:`OSError` if they are more than ``limit`` or incomplete."""
    if not is_url(source):
        with open(source, "rb", buffering=0) as file:
            return _pump(file.fileno(), limit, stop, sink)
    pipe = _open_url(source)
    try:
        _pump(pipe.stream.fileno(), limit, stop, sink)
    except BaseException:
        pipe.proc.kill()
        with suppress(OSError):
            pipe.close()
        raise
    try:
        pipe.close()
    except OSError:
        raise OSError(f"{pipe.proc.args[0]} ended with exit code {pipe.status}") from None


def _open_url(url: str) -> Any:
    """webdataset's stream of a URL; it has none for s3, whose bytes the ``aws`` command brings."""
    from webdataset.gopen import Pipe, gopen, gopen_schemes

    def open_s3(url: str, mode: str, bufsize: int) -> Any:
        return Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode=mode, bufsize=bufsize)

    gopen_schemes.setdefault("s3", open_s3)
    return gopen(url)


def _pump(descriptor: int, limit: int, stop: threading.Event, sink: Callable[[bytes], object]) -> None:
    """Read a descriptor to its end, looking at ``stop`` and the clock also while nothing comes."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    total, last = 0, time.monotonic()
    while not stop.is_set():
        if not poll.poll(200):
            if time.monotonic() - last > STALL_S:
                raise OSError(f"nothing has come for {STALL_S:.0f} s")
            continue
        chunk = os.read(descriptor, 1 << 20)
        if not chunk:
            return
        total, last = total + len(chunk), time.monotonic()
        if total > limit:
            raise OSError(f"it has more than the {limit} bytes expected")
        sink(chunk)
    raise Stopped


@contextmanager
def locked(path: Path, stop: threading.Event = NEVER) -> Iterator[None]:
    """Hold the lock file ``path``; one holder among all threads and processes of the machine."""
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.wait(0.05):
                    raise Stopped from None
        yield
