"""Files and folders that appear whole or not at all: written aside, flushed to the disk, then renamed over the target.

A reader therefore sees the old file or the new one, also after a power cut. A temporary is called
``<name>.tmp-<pid>-<hex>`` and is locked by its writer, so that :func:`sweep` can tell litter from work.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from voxtral_dist import activity
from voxtral_dist.errors import UserError, VoxtralDistError

PATIENCE_S = 3600.0
"""How long :func:`wait_for` sees no progress before it gives up."""


@contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write to, which becomes ``path`` when the block ends and vanishes when it raises.

    Args:
        path: the target; its folder must exist.
        private: readable by its owner only (mode 0600); otherwise the umask decides.
    """
    temporary, descriptor = _locked_temporary(path, 0o600 if private else 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_bytes(path: Path, data: bytes, private: bool = False) -> None:
    """Publish ``data`` as ``path``; see :func:`replacing`."""
    with replacing(path, private) as file:
        file.write(data)


def write_json(path: Path, value: Any, private: bool = False) -> None:
    """Publish ``value`` as JSON with sorted keys: equal values give equal bytes."""
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    write_bytes(path, text.encode() + b"\n", private)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` with all its files when the block ends and vanishes when it raises.

    Args:
        path: the target; missing or empty when the block ends. The folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        aside.mkdir()
        yield aside
        for entry in (*aside.rglob("*"), aside):
            flush(entry)
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    flush(path.parent)


def holds(folder: Path, record: str, mark: str) -> bool:
    """Whether ``mark`` is in the file ``record`` of a folder; False where there is no folder or nothing in it.

    Raises:
        UserError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    path = folder / record
    if path.is_file() and mark in path.read_text("utf-8"):
        return True
    raise UserError(
        f"{folder} holds something else than what was asked for; remove it or name another folder"
    )


def sweep(folder: Path) -> None:
    """Remove the temporaries in ``folder`` whose writer died; those still being written are locked."""
    for path in folder.glob("*.tmp-*"):
        with suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def wait_for(missing: Callable[[], list[str]], poll_s: float = 0.2, patience_s: float = PATIENCE_S) -> None:
    """Return once ``missing()``, the names of files that other processes still have to publish, is empty.

    Raises:
        VoxtralDistError: the list did not change for ``patience_s`` seconds; names the first missing file.
    """
    last: list[str] = []
    changed = time.monotonic()
    while names := missing():
        now = time.monotonic()
        if names != last:
            activity.now(f"waiting for {names[0]}", waiting=True)
            last, changed = names, now
        elif now - changed > patience_s:
            raise VoxtralDistError(
                f"{names[0]}: not written after {patience_s:.0f} s without progress (missing: {len(names)}); "
                "the process that builds it has died or sees other input; end all processes and start again"
            )
        time.sleep(poll_s)


def _locked_temporary(path: Path, mode: int) -> tuple[Path, int]:
    """A new temporary of ``path`` and its descriptor; one that a sweep took before it was locked is made again."""
    while True:
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with suppress(OSError):  # a file system without locks: sweep() then leaves the litter
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)


def flush(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
