"""Runs the parts of a job, passes signals on to them and returns the job's exit code.

    python launch/supervise.py --status RUN/exit_status.json -- COMMAND    launch/run_ranks.sh starts it so

COMMAND runs under launch/guard.py, in a session of its own: Ctrl-C reaches this process alone. TERM, INT, HUP and USR2
go through a pipe to the guard and from there to the ranks, USR1 as USR2. The pipe also says when this process is gone,
by SIGKILL too, because the kernel then closes it; the guard ends the ranks. When the guard is gone, this process does.

The exit code is the one that rank 0 leaves in the status file, because torchrun turns every failure into 1 and
deepspeed calls a killed job a success. Without that file it is 75 for a job that a signal ended while it started, else
the command's, but never 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from guard import POLL_S, SIGNALS, lines_of_stdin, say, shell_code

GUARD = Path(__file__).resolve().with_name("guard.py")
LATE_S = 10.0
"""How long the record of rank 0 may take to be seen on other machines, whose file system may keep old views."""


class Parts:
    """Started commands that hear of signals by lines on their standard input, and of our end by its end.

    Args:
        commands: a part each, with what it is called in messages.
        first_words: what each is told first.
        grace_s: seconds that the others have to end once a part has failed.
    """

    def __init__(
        self, commands: dict[str, list[str]], first_words: dict[str, str] | None = None, grace_s: float = 60.0
    ) -> None:
        self.stopped = False
        self._grace_s = grace_s
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        self._early: list[str] | None = []
        for number in (*SIGNALS, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        for name, command in commands.items():
            part = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
            self._tell(part, (first_words or {}).get(name, ""))
            self._parts[name] = part
        early, self._early = self._early, None
        for name in early:
            self._pass_on(name)

    def listen(self) -> None:
        """Take names of signals from our own standard input too; its end ends the parts."""

        def work() -> None:
            for name in lines_of_stdin():
                self._pass_on(name)
            self.close()

        threading.Thread(target=work, daemon=True).start()

    def wait(self) -> int:
        """Wait for all parts: the exit code of the one that failed first, else the last one's."""
        code, deadline = 0, float("inf")
        running = dict(self._parts)
        while running:
            time.sleep(POLL_S)
            for name, part in list(running.items()):
                if part.poll() is None:
                    continue
                del running[name]
                code = code or shell_code(part.returncode)
                if part.returncode not in {0, 75} and running:
                    say(f"{name} ended with exit code {shell_code(part.returncode)}")
                    deadline = min(deadline, time.monotonic() + self._grace_s)
            if running and time.monotonic() > deadline:
                say(f"ending what still runs: {', '.join(running)}")
                deadline = float("inf")
                self.close()
        return code

    def close(self) -> None:
        """End the parts: their input ends."""
        for part in self._parts.values():
            with suppress(OSError):
                part.stdin.close()  # type: ignore[union-attr]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._pass_on("SIGUSR2" if number == signal.SIGUSR1 else signal.Signals(number).name)

    def _pass_on(self, name: str) -> None:
        self.stopped = True
        if self._early is not None:  # some parts are not started yet
            self._early.append(name)
            return
        for part in self._parts.values():
            self._tell(part, f"{name}\n")

    @staticmethod
    def _tell(part: subprocess.Popen[bytes], words: str) -> None:
        with suppress(OSError, ValueError):  # it has ended, or its input was closed
            part.stdin.write(words.encode())  # type: ignore[union-attr]


class Status:
    """What rank 0 leaves in a file about its end.

    Args:
        path: the file, None when the job leaves none.
        is_main: whether this machine runs rank 0, and so removes what an earlier start left. Elsewhere an old file may
            still lie there for a while.
    """

    def __init__(self, path: Path | None, is_main: bool = True) -> None:
        self.path, self._is_main = path, is_main
        if path and is_main:
            path.unlink(missing_ok=True)
        self._old = self._stamp()

    def _stamp(self) -> tuple[int, int] | None:
        with suppress(OSError):
            if self.path:
                about = self.path.stat()
                return about.st_ino, about.st_mtime_ns
        return None

    def exit_code(self, code: int, stopped: bool) -> int:
        """The exit code of the job.

        Args:
            code: of the launcher, or of the part that failed first.
            stopped: whether a signal was passed on.
        """
        if self.path is None or (code == 0 and not self._is_main):
            return code
        deadline = time.monotonic() + (0.0 if self._is_main else LATE_S)
        while self._stamp() in {None, self._old}:
            if time.monotonic() >= deadline:
                return self._without(code, stopped)
            time.sleep(POLL_S)
        with suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads(self.path.read_text("utf-8"))["exit_code"])
        return 1

    def _without(self, code: int, stopped: bool) -> int:
        if stopped:
            return 75
        if code == 0:
            say(f"the launcher reports success but rank 0 left no {self.path}; taken as a failure")
        return code or 1


def main(argv: Sequence[str]) -> int:
    """Supervise what stands behind ``--``."""
    place = list(argv).index("--")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--status", default="", help="file in which rank 0 records how the run ended")
    parser.add_argument("--node_rank", type=int, default=0, help="which machine of the job this is")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds from TERM to KILL")
    parser.add_argument("--control", action="store_true", help="take signals from standard input too")
    flags = parser.parse_args(argv[:place])
    mark = f"VOXTRAL_DIST_JOB={os.getpid()}-{time.time_ns()}"
    guard = [sys.executable, str(GUARD), mark, str(flags.grace)]
    status = Status(Path(flags.status) if flags.status else None, flags.node_rank == 0)
    parts = Parts({"the guard": [*guard, *argv[place + 1 :]]})
    if flags.control:
        parts.listen()
    code = parts.wait()
    if code > 128:  # perhaps the guard itself was killed
        subprocess.run(guard, check=False, start_new_session=True)
    return status.exit_code(code, parts.stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
