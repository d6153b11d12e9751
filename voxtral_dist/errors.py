"""Exit codes, the error a user can mend, and the wrapper that turns it into one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum


class ExitCode(IntEnum):
    """What a process of ours returns; a job script decides on these alone."""

    OK = 0
    FAILURE = 1
    USER_ERROR = 2
    PREEMPTED = 75
    NO_CHECKPOINT = 76
    BAD_SAMPLES = 77
    NON_FINITE = 79
    STALLED = 80


class VoxtralDistError(Exception):
    """An end that has an exit code of its own. The message is one line: value, consequence, remedy."""

    exit_code: ExitCode = ExitCode.FAILURE


class UserError(VoxtralDistError):
    """The user's input is wrong: exit code 2."""

    exit_code = ExitCode.USER_ERROR


class NoCheckpointError(VoxtralDistError):
    """No valid checkpoint where one was expected: exit code 76."""

    exit_code = ExitCode.NO_CHECKPOINT


class BadSamplesError(VoxtralDistError):
    """Too many samples could not be read: exit code 77."""

    exit_code = ExitCode.BAD_SAMPLES


class NonFiniteError(VoxtralDistError):
    """Too many steps in a row had a non-finite loss or gradient: exit code 79."""

    exit_code = ExitCode.NON_FINITE


class Preempted(VoxtralDistError):
    """A signal asked the process to stop and nothing was lost: exit code 75, the same command goes on."""

    exit_code = ExitCode.PREEMPTED


def run_main(main: Callable[[], None], speak: bool = True) -> None:
    """Run ``main`` and leave the process: an error of ours becomes one line on stderr and its exit code.

    Any other exception keeps its traceback and ends the process with exit code 1. Errors of ours are the same on every
    rank, so only one of them needs to ``speak``.
    """
    try:
        main()
    except VoxtralDistError as error:
        if speak:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(int(error.exit_code))
