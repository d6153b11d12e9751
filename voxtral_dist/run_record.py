"""What a run directory records, read with little memory: long curves are thinned out while they are read.

record = read_run(Path("runs/quickstart"))
record.curves["train/loss"].points()        steps, means, lowest and highest values of at most MOST_BINS bins
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxtral_dist.config import load_yaml
from voxtral_dist.errors import UserError

MOST_BINS = 200
"""Points of a curve; twice as wide bins are made when there would be more."""

STEP_FOLDER = re.compile(r"step-(\d{8})")


class Curve:
    """A number over the steps.

    Attributes:
        total: sum of all values.
        count: how many there were.
        last: the newest value.
        grown: the newest value of a counter, with what it had reached each time a restart set it back to 0.
    """

    def __init__(self) -> None:
        self._width = 1
        self._bins: dict[int, list[float]] = {}  # count, sum of steps, sum, lowest, highest
        self.total = self.last = self._before_restarts = 0.0
        self.count = 0

    def add(self, step: int, value: float) -> None:
        """Record a value; steps need not follow one another."""
        if value < self.last:
            self._before_restarts += self.last
        self.total, self.count, self.last = self.total + value, self.count + 1, value
        self._put(step // self._width, 1, step, value, value, value)
        if len(self._bins) > MOST_BINS:
            self._width *= 2
            old, self._bins = self._bins, {}
            for index, content in old.items():
                self._put(index // 2, *content)

    def _put(self, index: int, count: float, steps: float, total: float, low: float, high: float) -> None:
        known = self._bins.get(index)
        if known is None:
            self._bins[index] = [count, steps, total, low, high]
            return
        known[0] += count
        known[1] += steps
        known[2] += total
        known[3], known[4] = min(known[3], low), max(known[4], high)

    @property
    def mean(self) -> float:
        """Of all values."""
        return self.total / self.count

    @property
    def grown(self) -> float:
        """Of a counter: what it counted over all starts of the run."""
        return self._before_restarts + self.last

    def points(self) -> tuple[list[float], list[float], list[float], list[float]]:
        """Mean step, mean, lowest and highest value of each bin, in the order of the steps."""
        bins = [self._bins[index] for index in sorted(self._bins)]
        steps, means = [b[1] / b[0] for b in bins], [b[2] / b[0] for b in bins]
        return steps, means, [b[3] for b in bins], [b[4] for b in bins]


@dataclass
class StepLog:
    """metrics.jsonl.

    Attributes:
        curves: by tag.
        undefined: how often a tag was null, because its value was not finite.
        stage_starts: first step and number, from 0, of every stretch of a stage.
        last_step: the last optimizer step.
        damaged: lines that cannot be read.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    undefined: Counter[str] = field(default_factory=Counter)
    stage_starts: list[tuple[int, int]] = field(default_factory=list)
    last_step: int = 0
    damaged: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Count in a line."""
        step = int(line["step"])
        for tag, value in line.items():
            if value is None:
                self.undefined[tag] += 1
            elif tag not in ("step", "time"):
                self.curves.setdefault(tag, Curve()).add(step, float(value))
        if "train/stage" in line:
            stage = int(line["train/stage"])
            if not self.stage_starts or self.stage_starts[-1][1] != stage:
                self.stage_starts.append((step, stage))
        if "train/learning_rate" in line:
            self.last_step = max(self.last_step, step)


@dataclass(frozen=True)
class RunRecord:
    """A run directory.

    Attributes:
        folder: the directory; its name is the run's.
        config: settings of the last start.
        identity: what the run may not change.
        environment: versions and machine; {} when missing.
        status: exit_status.json; {} when missing, because the run goes on or was killed.
        state: trainer_state.json of the newest checkpoint; {} without one.
        log: the numbers of every step.
        evaluations: metrics.json by step.
        best: step of the best checkpoint, None when nothing names one.
        others: metrics.json by folder name of the evaluations made after training, and audio_probe.json.
    """

    folder: Path
    config: dict[str, Any]
    identity: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    state: dict[str, Any]
    log: StepLog
    evaluations: dict[int, dict[str, Any]]
    best: int | None
    others: dict[str, tuple[dict[str, Any], dict[str, Any]]]

    @property
    def curves(self) -> dict[str, Curve]:
        """Numbers over the steps, by tag."""
        return self.log.curves

    def last(self, tag: str) -> float | None:
        """The newest value of a tag, None when it was never recorded."""
        return self.curves[tag].last if tag in self.curves else None


def read_run(folder: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UserError: it is none, or a small file of it is damaged; damaged lines of metrics.jsonl are counted instead.
    """
    if not (folder / "identity.json").is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run directory (identity.json, config.yaml); name one of training")
    steps = _step_folders(folder / "eval")
    evaluations = {step: metrics for step, path in steps if (metrics := _metrics(path))}
    states = [path / "trainer_state.json" for _, path in _step_folders(folder / "checkpoints")]
    others = {
        path.name: (_metrics(path), _read(path / "audio_probe.json")) for path in _other_evaluations(folder)
    }
    return RunRecord(
        folder=folder,
        config=load_yaml(folder / "config.yaml"),
        identity=_read(folder / "identity.json"),
        environment=_read(folder / "environment.json"),
        status=_read(folder / "exit_status.json"),
        state=next((state for path in reversed(states) if (state := _read(path))), {}),
        log=read_log(folder / "metrics.jsonl"),
        evaluations=evaluations,
        best=_pointer(folder / "best"),
        others=others,
    )


def read_log(path: Path) -> StepLog:
    """Read a metrics.jsonl line by line; empty when there is none."""
    log = StepLog()
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    log.add(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    log.damaged += 1
    return log


def read_predictions(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of an evaluation one by one; damaged lines are passed over, a missing file gives none."""
    path = folder / "predictions.jsonl"
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and "task" in record:
                    yield record


def eval_folder(folder: Path, step: int) -> Path:
    """Where the evaluation of a step lies."""
    return folder / "eval" / f"step-{step:08d}"


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    found = [(STEP_FOLDER.fullmatch(path.name), path) for path in sorted(folder.glob("step-*"))]
    return [(int(match[1]), path) for match, path in found if match]


def _other_evaluations(folder: Path) -> list[Path]:
    return [path for path in sorted((folder / "evaluations").glob("*")) if _metrics(path)]


def _metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of an evaluation; {} of one that did not finish."""
    path = folder / "metrics.json"
    metrics = _read(path)
    if metrics and not {"tasks", "scores", "macro", "weighted", "balance"} <= metrics.keys():
        raise UserError(f"{path} is not what an evaluation writes; remove {folder.name} or evaluate again")
    return metrics


def _pointer(path: Path) -> int | None:
    match = STEP_FOLDER.fullmatch(path.read_text("utf-8").strip()) if path.is_file() else None
    return int(match[1]) if match else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; {} when there is no such file.

    Raises:
        UserError: it is damaged.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; restore or remove it")
    return value
