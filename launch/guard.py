"""Runs a command and lets none of its processes outlive it, or whoever started the guard.

    python launch/guard.py MARK GRACE_SECONDS COMMAND    launch/supervise.py starts it so
    python launch/guard.py MARK GRACE_SECONDS            only ends what is left of MARK

Its standard input brings names of signals, a line each; they go on to the ranks, not to the launcher, which would kill
or orphan them. The end of that input says that the starter is gone, by SIGKILL too, or a lost connection. Then, as when
the command ends and leaves processes, the ranks get TERM, and KILL after the grace. The exit code is the command's, 1
instead of 0 where ranks were left. Output that goes to another process is handed on by the guard: see start_relay.

Launchers put ranks into sessions of their own, and a rank whose launcher died has lost its parent: what all processes
of the job keep is MARK in their environment, a NAME=VALUE.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
POLL_S = 0.1


class Guard:
    """The processes that carry a mark.

    Args:
        mark: NAME=VALUE in their environment.
        grace_s: seconds from TERM to KILL.
    """

    def __init__(self, mark: str, grace_s: float) -> None:
        self._mark, self._grace_s = mark, grace_s
        self._launcher: subprocess.Popen[bytes] | None = None
        self._abandoned = threading.Event()

    def run(self, command: list[str]) -> int:
        """Run a command to its end, or until nobody waits for it any more; its exit code as a shell tells it."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        name, _, value = self._mark.partition("=")
        environ = os.environ | {name: value}
        out = subprocess.PIPE if is_pipe(1) else None
        err = subprocess.STDOUT if same_file(1, 2) else subprocess.PIPE if is_pipe(2) else None
        self._launcher = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        relays = [
            start_relay(file.fileno(), fd)
            for file, fd in ((self._launcher.stdout, 1), (self._launcher.stderr, 2))
            if file
        ]
        threading.Thread(target=self._listen, daemon=True).start()
        while self._launcher.poll() is None and not self._abandoned.wait(POLL_S):
            pass
        code = self._launcher.poll()
        if code is None:
            say("nobody waits for this job any more; ending its ranks")
        elif not self._gone_after(1.0):
            say(f"the launcher is gone (exit code {shell_code(code)}) and left processes; ending them")
            code = code or int(bool(self._ranks()))
        self.end()
        for relay in relays:
            relay.join(1.0)
        return shell_code(code or 0)

    def end(self) -> None:
        """TERM to the ranks, after the grace KILL to all; returns when none is left."""
        if self._gone_after(0.0):
            return
        self._pass_on(signal.SIGTERM)
        if not self._gone_after(self._grace_s):
            while not self._gone_after(1.0):  # they may be starting others
                send(signal.SIGKILL, self._processes())

    def _listen(self) -> None:
        """Thread: pass on what standard input says, until its end."""
        for name in lines_of_stdin():
            self._pass_on(signal.Signals[name])
        self._abandoned.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._pass_on(signal.Signals(number))

    def _pass_on(self, number: signal.Signals) -> None:
        """Send a signal to the ranks, or to the launcher before there are any."""
        send(number, self._ranks() or self._processes())

    def _processes(self) -> list[int]:
        """All processes of the job."""
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._is_ours(path.name)]

    def _ranks(self) -> list[int]:
        """The ranks, without the helper processes that ranks start."""
        return [pid for pid in self._processes() if self._is_rank(pid) and not self._is_rank(parent_of(pid))]

    def _is_ours(self, pid: int | str) -> bool:
        return self._mark.encode() in environ_of(pid)

    def _is_rank(self, pid: int) -> bool:
        environ = environ_of(pid)
        return self._mark.encode() in environ and any(word.startswith(b"RANK=") for word in environ)

    def _gone_after(self, seconds: float) -> bool:
        """Wait for the last process of the job to end; whether it did in time."""
        deadline = time.monotonic() + seconds
        while self._processes():
            if time.monotonic() >= deadline:
                return False
            if self._launcher:
                self._launcher.poll()
            time.sleep(POLL_S)
        return True


def lines_of_stdin() -> Iterator[str]:
    """Unbuffered: a thread that waits in a buffered read would disturb the end of the process."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        for line in stdin:
            yield line.decode().strip()


def is_pipe(fd: int) -> bool:
    """Whether a descriptor leads to a process, which may end before the ranks: a pipe to tee, a connection of sshd."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def same_file(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def start_relay(source: int, target: int) -> threading.Thread:
    """Copy output for as long as anybody takes it. Ranks that wrote into a broken pipe would end without saving."""

    def work() -> None:
        while data := os.read(source, 65536):
            with suppress(OSError):
                while data:
                    data = data[os.write(target, data) :]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def environ_of(pid: int | str) -> list[bytes]:
    """The environment of a process, NAME=VALUE each; empty when it is gone or another user's."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def parent_of(pid: int) -> int:
    """The parent of a process, 0 when it is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1])
    return 0


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def shell_code(code: int) -> int:
    """A process's exit code, 128 + N when signal N ended it."""
    return 128 - code if code < 0 else code


def say(message: str) -> None:
    """One line on stderr, where there still is one."""
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)


def main(mark: str, grace_s: str, *command: str) -> int:
    guard = Guard(mark, float(grace_s))
    if command:
        return guard.run(list(command))
    guard.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
