"""Checkpoints: adapter, optimizer state by parameter name and trainer state, published whole or not at all.

    checkpoints/step-00000100/adapter/            peft format, loadable by anyone
                              optimizer.safetensors
                              trainer_state.json  step, draws consumed, segments of the plan, best score
                              manifest.json       size and SHA-256 of every file, written last

A checkpoint is written into a directory of another name, flushed, and renamed; one without a manifest, or with a file
that does not match it, does not exist for the reader. Nothing depends on the number of ranks, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from voxtral_dist import adapter, distributed, optimizer_state
from voxtral_dist.atomic import new_folder, write_bytes, write_json
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import NoCheckpointError, UserError

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER = "adapter"

log = logging.getLogger(__name__)


def step_dir(run_dir: Path, step: int) -> Path:
    """Directory of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step a checkpoint directory is of."""
    return int(path.name.removeprefix("step-"))


def published(run_dir: Path) -> list[Path]:
    """All published checkpoint directories, oldest first, damaged ones among them."""
    found = (run_dir / "checkpoints").glob("step-" + "[0-9]" * 8)
    return sorted(path for path in found if path.is_dir())


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in host memory: trainer state with its step, optimizer state by name, adapter."""

    state: dict[str, Any]
    optimizer: dict[str, torch.Tensor]
    adapter: adapter.Snapshot


def snapshot(engine: TrainEngine, state: dict[str, Any]) -> Snapshot | None:
    """Copy all that a checkpoint holds to the memory of rank 0; None elsewhere. Collective.

    Args:
        engine: of the run.
        state: JSON-able trainer state with the ``step``.
    """
    main = distributed.rank() == 0
    tensors, adam_step = optimizer_state.gather(engine, keep=main)
    if not main:
        return None
    return Snapshot(state | {"adam_step": adam_step}, tensors, adapter.snapshot(engine.model.model))


def publish(run_dir: Path, taken: Snapshot) -> None:
    """Write a checkpoint, unless the same one is there already, and point ``latest`` at it; for rank 0.

    Raises:
        OSError, SafetensorError: writing failed; nothing is left behind.
    """
    target = step_dir(run_dir, taken.state["step"])
    if verify(target) is not None:
        _write(target, taken)
    write_bytes(run_dir / "latest", f"{target.name}\n".encode())


def _write(target: Path, taken: Snapshot) -> None:
    for old in target.parent.glob("*.tmp-*"):
        shutil.rmtree(old, ignore_errors=True)
    with new_folder(target) as temporary:
        adapter.write(taken.adapter, temporary / ADAPTER)
        save_file(taken.optimizer, temporary / OPTIMIZER)
        write_json(temporary / STATE, taken.state)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        entries = {
            str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files
        }
        write_json(
            temporary / MANIFEST,
            {"schema": "voxtral-dist/checkpoint/1", "step": taken.state["step"], "files": entries},
        )
        if target.exists():
            shutil.rmtree(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint directory, None when it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        files = manifest["files"]
        if path.name.startswith("step-") and manifest["step"] != step_of(path):
            return f"the manifest is of step {manifest['step']}"
        for name, entry in files.items():
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {entry['bytes']}"
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} does not have the SHA-256 of the manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the manifest or a file of it cannot be read ({type(error).__name__}: {error})"
    return None


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, the same on every rank. Collective.

    A damaged one is named in a warning and passed over. None when none was ever published.

    Raises:
        NoCheckpointError: checkpoints were published and all are damaged.
    """
    found: str | None = None
    damaged = 0
    if distributed.rank() == 0:
        for path in reversed(published(run_dir)):
            fault = verify(path)
            if fault is None:
                found = path.name
                break
            damaged += 1
            log.warning("checkpoint %s is damaged and passed over: %s", path, fault)
    found, damaged = distributed.broadcast_json([found, damaged])
    if found is None and damaged:
        raise NoCheckpointError(
            f"{run_dir}: all {damaged} checkpoints are damaged; restore one, or start again in a new --output_dir"
        )
    return run_dir / "checkpoints" / found if found else None


def read_state(path: Path) -> dict[str, Any]:
    """The trainer state of a whole checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text("utf-8"))
    return state


def load(path: Path, engine: TrainEngine) -> dict[str, Any]:
    """Put a whole checkpoint into model and optimizer, and return its trainer state. Every rank calls it."""
    state = read_state(path)
    adapter.load_weights(engine.model.model, path / ADAPTER)
    optimizer_state.restore(engine, load_file(path / OPTIMIZER), state["adam_step"])
    return state


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best one; for rank 0."""
    best = pointer(run_dir, "best")
    for path in published(run_dir)[:-keep]:
        if path != best:
            with suppress(OSError):
                (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def pointer(run_dir: Path, name: str) -> Path | None:
    """The checkpoint that ``best`` or ``latest`` names, None when there is none."""
    try:
        target = run_dir / "checkpoints" / (run_dir / name).read_text("utf-8").strip()
    except OSError:
        return None
    return target if target.name.startswith("step-") and target.is_dir() else None


def find_adapter(lora_dir: Path) -> Path:
    """The adapter folder that ``--lora_dir`` means: of a run (best, else latest), a checkpoint, or itself.

    Raises:
        UserError: none of these is there, or the checkpoint is damaged.
    """
    checkpoint = pointer(lora_dir, "best") or pointer(lora_dir, "latest") or lora_dir
    if (checkpoint / MANIFEST).is_file():
        fault = verify(checkpoint)
        if fault:
            raise UserError(f"--lora_dir {lora_dir}: checkpoint {checkpoint.name} is damaged: {fault}")
        return checkpoint / ADAPTER
    if (checkpoint / "adapter_config.json").is_file():
        return checkpoint
    raise UserError(
        f"--lora_dir {lora_dir}: neither a run directory with a checkpoint, nor a checkpoint, nor an adapter"
    )
