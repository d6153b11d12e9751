"""What an export is made of: the trained weights that a path means, and the base model beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist import checkpoint
from voxtral_dist.config import load_yaml
from voxtral_dist.errors import UserError

NEEDED = ["*.json", "*.jinja", "model*.safetensors"]
"""Files of a base model on the hub."""


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        base: folder or hub id of the base model.
        adapter: folder of the trained weights.
        run: the run directory they come from, None for an adapter on its own.
        step: of the checkpoint, None for an adapter on its own.
        settings: of the run.
    """

    base: str
    adapter: Path
    run: Path | None
    step: int | None
    settings: dict[str, Any]


def find_source(path: Path, which: str, model_id: str) -> Source:
    """Find the trained weights.

    Args:
        path: a run directory, a checkpoint or an adapter folder.
        which: of a run: "best", "last", "step-N", or "" for the best, else the last.
        model_id: the base model; "": the one on record.

    Raises:
        UserError: nothing there, it is damaged, or no base model is on record.
    """
    chosen = _checkpoint(path, which)
    try:
        folder = checkpoint.find_adapter(chosen)
    except UserError as error:
        raise UserError(str(error).removeprefix("--lora_dir ")) from error
    parents = chosen.resolve().parents
    run = parents[1] if len(parents) > 1 and (parents[1] / "identity.json").is_file() else None
    settings = load_yaml(run / "config.yaml") if run else {}
    base = model_id or settings.get("model_id") or _recorded_base(folder)
    if not base:
        raise UserError(f"{path} does not say on which base model it was trained; give --model_id")
    return Source(base, folder, run, checkpoint.step_of(chosen) if run else None, settings)


def _checkpoint(path: Path, which: str) -> Path:
    if not (path / "identity.json").is_file():
        if which:
            raise UserError(f"--checkpoint {which}: {path} is no run directory; leave the flag out")
        return path
    pointers = {"": ("best", "latest"), "best": ("best",), "last": ("latest",)}.get(which)
    number = which.removeprefix("step-")
    if pointers is None and not (which.startswith("step-") and number.isdigit()):
        raise UserError(f"--checkpoint {which}: give best, last or step-N")
    found = (
        [checkpoint.step_dir(path, int(number))]
        if pointers is None
        else [checkpoint.pointer(path, name) for name in pointers]
    )
    chosen = next((folder for folder in found if folder and folder.is_dir()), None)
    if chosen is None:
        there = ", ".join(folder.name for folder in checkpoint.published(path)) or "none"
        raise UserError(f"{path} has no checkpoint {which or 'best or last'}; there are: {there}")
    return chosen


def _recorded_base(folder: Path) -> str:
    try:
        values = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        return str(values.get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError):
        return ""


def find_base(model_id: str) -> Path:
    """The folder of a base model; one on the hub is downloaded, or taken from the cache.

    Raises:
        UserError: it is neither a folder nor on the hub.
    """
    if Path(model_id).is_dir():
        return Path(model_id)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=NEEDED))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"--model_id {model_id}: no local folder, and not on the hub ({reason}); give the base model's folder"
        ) from None
