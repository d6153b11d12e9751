"""Messages for people, on stderr: information from rank 0 only, warnings from every rank with its name.

Numbers do not belong here, they go through :mod:`voxtral_dist.monitor`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from tqdm import tqdm

ROOT = "voxtral_dist"
"""Every logger of the package is a child of this one."""

CHATTY = ("transformers", "DeepSpeed", "httpx", "httpx2", "huggingface_hub")
"""Libraries of which only errors are shown."""


class _RankFormatter(logging.Formatter):
    """``12:30:59 step 10``; a warning, or any line of another rank, names its level and rank."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(asctime)s %(prefix)s%(message)s", datefmt="%H:%M:%S")
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        plain = self.rank == 0 and record.levelno < logging.WARNING
        record.prefix = "" if plain else f"{record.levelname} [rank {self.rank}] "
        return super().format(record)


class _BesideBars(logging.StreamHandler):
    """Writes a line above a progress bar, which would otherwise stand on the same line.

    Nobody at the other end of stderr is no reason to stop.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except (OSError, ValueError):
            self.handleError(record)


def setup_logging(rank: int, debug: bool = False) -> None:
    """Send the package's messages to stderr and quiet the libraries; a second call replaces the first.

    Args:
        rank: of this process. Rank 0 shows information and above, the others warnings and above.
        debug: every rank shows everything, and the libraries are left as they are.
    """
    handler = _BesideBars(sys.stderr)
    handler.setFormatter(_RankFormatter(rank))
    root = logging.getLogger(ROOT)
    root.handlers = [handler]
    root.propagate = False  # a library that configures the root logger must not double our lines
    root.setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING)
    if not debug:
        _quiet_libraries()


def get_logger(name: str) -> logging.Logger:
    """The logger of a module or script: ``get_logger(__name__)``."""
    return logging.getLogger(name if name == ROOT or name.startswith(f"{ROOT}.") else f"{ROOT}.{name}")


def _quiet_libraries() -> None:
    """Hide what is not an error, also in libraries that set their own level when they are imported later."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in CHATTY:
        library = logging.getLogger(name)
        library.setLevel(logging.ERROR)
        if _is_error not in library.filters:
            library.addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
