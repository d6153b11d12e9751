"""The run directory: whose it is, what made it, how it ended.

config.yaml  identity.json  environment.json  metrics.jsonl  tensorboard/  checkpoints/  best  latest
eval/step-00000100/  shards/  exit_status.json  superseded-1/
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from voxtral_dist.atomic import write_bytes, write_json
from voxtral_dist.errors import ExitCode, Preempted, UserError, VoxtralDistError

IDENTITY = "identity.json"
EXIT_STATUS = "exit_status.json"
ROUNDING = ("world_size", "device", "threads")
"""What decides the order of floating-point sums."""

KNOWN = {
    *"config.yaml identity.json environment.json metrics.jsonl tensorboard checkpoints best latest eval shards".split(),
    *"exit_status.json report.html base_model demo evaluations predictions slurm".split(),
    *"predictions.jsonl timing.jsonl metrics.json audio_probe.json parts".split(),
    *"rescored.json errors.html errors.json comparison.html comparison.json".split(),
}
"""What the directory of a run or an evaluation may hold; anything else means that it is the user's own."""


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


class _Stop(BaseException):
    """Raised where a signal finds the process; no library takes it for an error of its own."""


_claims: dict[Path, int] = {}
"""Descriptors of the directories this process writes into; the kernel lets go of them when it dies."""


def claim(run_dir: Path) -> None:
    """Keep a directory, if it is there, for this process.

    Raises:
        UserError: another process that still runs has it.
    """
    path = run_dir.resolve()
    if path in _claims or not path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"--output_dir {run_dir}: another process is writing into it; wait for its end or give another directory"
        ) from None
    except OSError:  # a file system without locks
        pass
    _claims[path] = descriptor


def moved_away(run_dir: Path) -> str:
    """What became of a directory that this process keeps, "" when it is where it was or is not kept."""
    descriptor = _claims.get(run_dir.resolve())
    if descriptor is None:
        return ""
    try:
        if os.path.samestat(os.fstat(descriptor), os.stat(run_dir)):
            return ""
    except FileNotFoundError:
        pass
    except OSError:  # whoever writes next says it better
        return ""
    return (
        f"--output_dir {run_dir} was moved or deleted while the run wrote into it; put it back, the same command "
        "goes on from its last checkpoint"
    )


def check_output_dir(run_dir: Path) -> None:
    """Refuse to write into a directory that is no run of ours.

    Raises:
        UserError: it is a file, or holds something that no run writes.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--output_dir {run_dir} is a file; give a directory")
    foreign = (
        sorted(path.name for path in run_dir.glob("*") if path.name not in KNOWN) if run_dir.is_dir() else []
    )
    if foreign and not (run_dir / IDENTITY).exists():
        raise UserError(
            f"--output_dir {run_dir} is not a run directory: it holds {foreign[0]!r}; give a new one"
        )


def stored_identity(run_dir: Path) -> dict[str, Any] | None:
    """The identity of the run that lives in a directory, None when there is none."""
    try:
        identity: dict[str, Any] = json.loads((run_dir / IDENTITY).read_text("utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise UserError(f"{run_dir / IDENTITY} is damaged ({error}); give a new --output_dir") from error
    return identity


def check_identity(run_dir: Path, identity: Mapping[str, Any], flag: str = "--output_dir") -> None:
    """Refuse to go on with a run whose data, model or settings are not those it was started with.

    Args:
        run_dir: the run directory.
        identity: of this start.
        flag: the one that named the run.

    Raises:
        UserError: names each field that differs, with both values.
    """
    stored = stored_identity(run_dir)
    if stored is None:
        return
    current = json.loads(json.dumps(identity))
    names = [name for name in {**stored, **current} if stored.get(name) != current.get(name)]
    if names:
        shown = "; ".join(
            f"{name}: {_short(stored.get(name))} -> {_short(current.get(name))}" for name in names
        )
        raise UserError(
            f"{flag} {run_dir} holds another run, it would become a different model: {shown}. "
            "Give a new --output_dir, or the settings of that run"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def begin(
    run_dir: Path, config_yaml: str, identity: Mapping[str, Any], environment: Mapping[str, Any]
) -> None:
    """Record settings, identity and environment of a start; for rank 0."""
    run_dir.mkdir(parents=True, exist_ok=True)
    claim(run_dir)
    write_bytes(run_dir / "config.yaml", config_yaml.encode())
    write_json(run_dir / IDENTITY, dict(identity))
    write_json(run_dir / "environment.json", dict(environment))


def environment(world_size: int, device: str) -> dict[str, Any]:
    """Versions and machine of this start."""
    packages = (
        "voxtral-dist",
        "torch",
        "deepspeed",
        "transformers",
        "peft",
        "mistral-common",
        "numpy",
        "soundfile",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = torch.__version__  # with its build, such as +cpu
    return {
        "python": platform.python_version(),
        "packages": versions,
        "world_size": world_size,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def changed_environment(run_dir: Path, now: Mapping[str, Any]) -> str:
    """What differs from the start before and lets results differ in their last bits; "" for nothing."""
    try:
        before = json.loads((run_dir / "environment.json").read_text("utf-8"))
        old = {name: before[name] for name in ROUNDING} | {"torch": before["packages"]["torch"]}
    except (OSError, ValueError, KeyError):
        return ""
    new = {name: now[name] for name in ROUNDING} | {"torch": now["packages"]["torch"]}
    return ", ".join(f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name])


@contextmanager
def exit_status(output_dir: str, active: bool) -> Iterator[None]:
    """Claim the run directory, and leave in ``exit_status.json`` how the block ended: launchers change exit codes.

    SIGTERM, SIGUSR2 or SIGHUP end the block wherever it is, unless the block handles them itself.

    Args:
        output_dir: the run directory.
        active: whether this process writes; rank 0 does.

    Raises:
        UserError: the directory is not one of ours, or another process writes into it; it is left as it is.
        Preempted: a signal ended the block.
    """
    run_dir = Path(output_dir)
    check_output_dir(run_dir)
    path = run_dir / EXIT_STATUS
    if active:
        claim(run_dir)
        path.unlink(missing_ok=True)
    code, message = ExitCode.FAILURE, "unexpected error, see the log"
    try:
        with _ended_by_signals():
            yield
        code, message = ExitCode.OK, "done"
    except VoxtralDistError as error:
        code, message = error.exit_code, str(error)
        raise
    finally:
        if active and run_dir.is_dir():
            write_json(path, {"exit_code": int(code), "message": message})


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Make the first signal :class:`Preempted`; later ones are ignored, they would only disturb the ending.

    So are all after a block that handled signals itself: launchers send SIGTERM to the ranks that end last, and it
    would become their exit code.
    """

    def stop(number: int, frame: Any) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _Stop

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except _Stop:
        raise Preempted("stopped by a signal before it was done; start the same command again") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if signal.getsignal(number) is stop else signal.SIG_IGN)


def end_stalled(run_dir: Path, message: str) -> None:
    """End this process with exit code 80 and record it; every rank that stops for a stall writes the same.

    The file is not waited for long: the disk may be what hangs.
    """
    status = {"exit_code": int(ExitCode.STALLED), "message": message}

    def write() -> None:
        write_json(run_dir / EXIT_STATUS, status)
        sys.stdout.flush()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(10.0)
    os._exit(int(ExitCode.STALLED))
