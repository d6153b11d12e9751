"""``--resume PATH``: going on from a checkpoint that the user names instead of the newest one.

A checkpoint of the run itself takes the run back to that step; what came later is set aside, never deleted. One of
another run begins a run in a new directory, with that run's identity. The same command given again, as after a
preemption, goes on from the newest checkpoint like ``auto``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voxtral_dist import atomic, checkpoint, distributed
from voxtral_dist.errors import NoCheckpointError, UserError
from voxtral_dist.run_dir import IDENTITY, check_identity


def named(resume: str, run_dir: Path, config_yaml: str) -> Path | None:
    """The checkpoint to begin from, None when that is the newest of the run directory.

    Args:
        resume: the flag.
        run_dir: the run directory; its config.yaml tells whether this very command was started before.
        config_yaml: settings of this start.

    Raises:
        UserError: no checkpoint of that name, or one of another run although this run has its own.
    """
    if resume in ("auto", "none") or (checkpoint.published(run_dir) and _started(run_dir, config_yaml)):
        return None
    path = Path(resume).resolve()
    if not re.fullmatch(r"step-\d{8}", path.name) or not path.is_dir():
        raise UserError(
            f"--resume {resume}: neither auto, none nor a checkpoint; expected a folder RUN/checkpoints/step-00000100"
        )
    if is_own(path, run_dir):
        return path
    if checkpoint.published(run_dir):
        raise UserError(
            f"--resume {resume} is a checkpoint of another run, but --output_dir {run_dir} has checkpoints of its own; "
            "give a new --output_dir, or leave --resume out to go on"
        )
    if not (run_of(path) / IDENTITY).is_file():
        raise UserError(
            f"--resume {resume}: no {IDENTITY} in {run_of(path)}, so nothing says what was trained; copy the whole run"
        )
    return path


def _started(run_dir: Path, config_yaml: str) -> bool:
    try:
        return (run_dir / "config.yaml").read_text("utf-8") == config_yaml
    except OSError:
        return False


def run_of(path: Path) -> Path:
    """The run directory that a checkpoint lies in."""
    return path.parent.parent


def is_own(path: Path, run_dir: Path) -> bool:
    """Whether a checkpoint lies in this run's directory."""
    return path.parent == (run_dir / "checkpoints").resolve()


def whole(path: Path) -> Path:
    """The checkpoint itself. Collective.

    Raises:
        NoCheckpointError: it is damaged; on all ranks alike.
    """
    fault = checkpoint.verify(path) if distributed.rank() == 0 else None
    fault = distributed.broadcast_json(fault)
    if fault:
        raise NoCheckpointError(f"--resume {path}: the checkpoint is damaged: {fault}; name another one")
    return path


def check_identities(out: Path, origin: Path | None, identity: Mapping[str, Any]) -> None:
    """The run in the directory, and the run of the checkpoint that ``--resume`` names, must be of this identity.

    Raises:
        UserError: one is not.
    """
    check_identity(out, identity)
    if origin and not is_own(origin, out):
        check_identity(run_of(origin), identity, "--resume:")


def check_not_over(out: Path, origin: Path | None, last_step: int) -> None:
    """A run cannot begin where another one ended.

    Raises:
        UserError: it would.
    """
    if origin and not is_own(origin, out) and checkpoint.step_of(origin) >= last_step:
        raise UserError(
            f"--resume {origin} ends its run of {last_step} steps: nothing is left to train; name one before it"
        )


def set_aside(run_dir: Path, step: int) -> str | None:
    """Move checkpoints and evaluations after a step to ``superseded-<n>/``, for rank 0.

    A copy of metrics.jsonl goes with them, because the run drops the later lines.

    Returns:
        One line about it, None when nothing came later.
    """
    folders = [
        path for kind in ("checkpoints", "eval") for path in (run_dir / kind).glob("step-" + "[0-9]" * 8)
    ]
    later = sorted(path for path in folders if checkpoint.step_of(path) > step)
    if not later:
        return None
    aside = run_dir / f"superseded-{1 + len(list(run_dir.glob('superseded-*')))}"
    aside.mkdir()
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        atomic.write_bytes(aside / metrics.name, metrics.read_bytes(), private=True)
    for path in later:
        (aside / path.parent.name).mkdir(exist_ok=True)
        path.rename(aside / path.parent.name / path.name)
    atomic.write_bytes(run_dir / "latest", f"{checkpoint.step_dir(run_dir, step).name}\n".encode())
    names = ", ".join(f"{path.parent.name}/{path.name}" for path in later)
    return f"back to step {step}: set aside in {aside}: {names}"
