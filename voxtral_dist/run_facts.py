"""The facts of a run as words and tables: length, speed, energy, troubles, settings, data, mixture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from voxtral_dist.config import TrainConfig, split_list
from voxtral_dist.page import percent
from voxtral_dist.run_charts import stage_name
from voxtral_dist.run_record import RunRecord
from voxtral_dist.tasks import TASKS

DATA_SETTINGS = ("train_shards", "train_jsonl", "val_shards", "val_jsonl")
NOT_SHOWN = ("output_dir", "dry_run", "debug")

DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def short_path(value: str) -> str:
    """The last part of a path or address, with the task before it for a packed set; a hub id and other words as is."""
    parts = PurePosixPath(value).parts
    if "/" not in value or (len(parts) == 2 and parts[0] not in ("/", "~", ".", "..")):
        return value
    return "/".join(parts[-2:]) if len(parts) > 1 and parts[-2] in TASKS else parts[-1] if parts else value


def setting(value: Any) -> str:
    """A setting's value as the page shows it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "auto"}[value]
    if isinstance(value, (str, list)):
        return ", ".join(map(short_path, split_list(value))) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings(record: RunRecord, changed: bool) -> list[tuple[str, str, str]]:
    """Name, value and default of the settings that differ from their default, or of those that do not."""
    shown = {name: value for name, value in record.config.items() if name not in (*NOT_SHOWN, *DATA_SETTINGS)}
    return [
        (name, setting(value), setting(DEFAULTS[name]) if name in DEFAULTS else "–")
        for name, value in shown.items()
        if (name not in DEFAULTS or value != DEFAULTS[name]) == changed
    ]


def hours(seconds: float) -> str:
    """A duration: 45 s, 12.5 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def facts(record: RunRecord) -> list[tuple[str, str, str]]:
    """Name, value and remark of what people look for first; what was not recorded is left out."""
    return [(name, value, remark) for name, value, remark in _facts(record) if value]


def _facts(record: RunRecord) -> Iterator[tuple[str, str, str]]:
    epoch, seconds = record.last("train/epoch"), record.curves.get("speed/step_seconds")
    best = record.evaluations.get(record.best) if record.best is not None else None
    about = record.environment
    yield "Steps", f"{record.log.last_step:,}", "" if epoch is None else f"{epoch:.2f} epochs"
    yield (
        "Best step",
        "" if best is None else f"{record.best:,}",
        f"macro {best['macro']:.4f}" if best and best.get("macro") is not None else "",
    )
    yield "Training time", hours(seconds.total) if seconds else "", "in steps"
    yield "Ranks", str(about.get("world_size", "")), str(about.get("device", ""))
    for tag, name, digits in (("speed/tokens_per_second", "Tokens per second", 0), ("speed/mfu", "MFU", 3)):
        curve = record.curves.get(tag)
        yield name, f"{curve.mean:,.{digits}f}" if curve else "", "mean"
    audio = audio_hours(record)
    yield "Audio heard", f"{audio:.2f} h" if audio else "", ""
    energy = energy_wh(record)
    yield (
        "GPU energy",
        "" if energy is None else f"{energy:,.1f} Wh",
        f"{energy / audio:,.1f} Wh per audio hour" if energy and audio else "",
    )


def audio_hours(record: RunRecord) -> float:
    """Of the examples that were trained on, repeats counted."""
    return sum(c.last for tag, c in record.curves.items() if tag.startswith("audio_seconds_seen/")) / 3600


def energy_wh(record: RunRecord) -> float | None:
    """Watt hours of all recorded GPUs, those of rank 0's machine; None where none was read."""
    counters = [
        c.grown for tag, c in record.curves.items() if tag.startswith("gpu") and tag.endswith("/energy_wh")
    ]
    return sum(counters) if counters else None


def troubles(record: RunRecord) -> list[str]:
    """A sentence for each thing that went wrong or was left out."""
    return list(_troubles(record))


def _troubles(record: RunRecord) -> Iterator[str]:
    skipped, bad = record.last("train/skipped_steps") or 0, record.last("train/bad_samples") or 0
    if skipped:
        yield f"{skipped:,.0f} steps changed nothing: their loss or gradient was not finite."
    if bad:
        yield f"{bad:,.0f} samples could not be read and were masked."
    for first, end in record.state.get("left_out", []):
        yield f"Loss spike: the run went back and passed over steps {first + 1} to {end}."
    for path in sorted(record.folder.glob("superseded-*")):
        steps = sorted({entry.name for entry in path.glob("*/step-*")})
        yield f"The run went back; {path.name} holds what was set aside: {', '.join(steps) or 'nothing'}."
    if record.log.damaged:
        yield f"Lines of metrics.jsonl that cannot be read and are not in the curves: {record.log.damaged}."
    for step, metrics in record.evaluations.items():
        for task, values in metrics["tasks"].items():
            if values.get("missing"):
                yield f"Step {step}, {task}: {values['missing']} of {values['n']} predictions are missing."
        if metrics.get("undefined"):
            yield f"Step {step}: no average, because {', '.join(metrics['undefined'])} has no score."


def mixture(record: RunRecord) -> list[dict[str, str]]:
    """Per task: the configured share of examples by stage, and the realised shares of examples, tokens and audio."""
    names = [str(name) for name in record.identity.get("tasks", [])]
    stages = record.state.get("plan", {}).get("stages", [])
    configured = [[weight / (sum(stage["weights"]) or 1) for weight in stage["weights"]] for stage in stages]
    rows = []
    for place, task in enumerate(names):
        shares = [stage[place] for stage in configured if place < len(stage)]
        words = [
            f"{stage_name(record, n)} {percent(s)}" if len(shares) > 1 else percent(s)
            for n, s in enumerate(shares)
        ]
        row = {
            "task": task,
            "configured": ", ".join(words) or "n/a",
            "examples": percent(record.last(f"mix/{task}")),
        }
        for what in ("target_tokens", "tokens", "audio_seconds"):
            seen = {name: record.last(f"{what}_seen/{name}") or 0.0 for name in names}
            row[what] = percent(seen[task] / sum(seen.values()) if sum(seen.values()) else None)
        rows.append(row)
    return rows


def data(record: RunRecord) -> list[dict[str, str]]:
    """Per data set: task, split, name, rows, hours of audio and the first digits of its fingerprint."""
    known = dict(_manifests(record))
    splits = (("train", record.environment.get("data")), ("dev", record.identity.get("dev_data")))
    rows = []
    for split, tasks in splits:
        for task, prints in (tasks or {}).items():
            for fingerprint in prints:
                name, manifest = known.get(fingerprint, ("n/a", {}))
                seconds, examples = manifest.get("audio_seconds"), manifest.get("examples")
                rows.append(
                    {
                        "task": task,
                        "split": split,
                        "name": name,
                        "examples": "n/a" if examples is None else f"{examples:,}",
                        "hours": "n/a" if seconds is None else f"{seconds / 3600:.2f}",
                        "fingerprint": str(fingerprint)[:12],
                    }
                )
    return rows


def _manifests(record: RunRecord) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """By fingerprint, name and manifest of the packed sets that the settings name or that lie in the run."""
    named = [Path(item) for key in DATA_SETTINGS for item in split_list(record.config.get(key) or "")]
    for folder in [*named, *record.folder.glob("shards/*/*")]:
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
            yield manifest["fingerprint"], (short_path(f"x/{folder.parent.name}/{folder.name}"), manifest)
        except (OSError, ValueError, KeyError, TypeError):
            continue
