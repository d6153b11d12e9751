"""The curriculum (``--stages``): which weights the tasks have over which part of a run.

A YAML file, or the short form ``NAME:SHARE:WEIGHTS; ...`` on the command line:

    stages:
      - {name: text, share: 0.2, task_weights: tqa=1}
      - {name: listen, share: 0.3, task_weights: "asr=2,tqa=1"}
      - {name: all, share: 0.5, task_weights: "1.0,1.5,1.2"}

    --stages "text:0.2:tqa=1; listen:0.3:asr=2,tqa=1; all:0.5:1.0,1.5,1.2"

A task that a stage does not name sleeps in it. The edges are rounded to steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

from voxtral_dist.config import load_yaml
from voxtral_dist.errors import UserError
from voxtral_dist.mix import parse_weights

KEYS = ("name", "share", "task_weights")


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        name: for logs and checkpoints.
        end: share of the run that is done when it ends, in (0, 1].
        weights: integer share of each task in it; 0: the task sleeps.
    """

    name: str
    end: Fraction
    weights: tuple[int, ...]

    def record(self) -> dict[str, Any]:
        """JSON-able values that tell two stages apart."""
        return {"name": self.name, "end": str(self.end), "weights": list(self.weights)}


def parse_stages(text: str, tasks: Sequence[str], weights: tuple[int, ...]) -> tuple[Stage, ...]:
    """The stages of a run.

    Args:
        text: value of ``--stages``; empty: one stage without a name.
        tasks: names of the tasks with training data.
        weights: of that one stage.

    Raises:
        UserError: unreadable, shares that are not positive or do not add up to 1, unknown tasks, names that come twice.
    """
    if not text:
        return (Stage("", Fraction(1), weights),)
    is_file = text.endswith((".yaml", ".yml"))
    rows = _from_file(Path(text)) if is_file else _from_flag(text)
    names = [row["name"] for row in rows]
    if len(set(names)) < len(names) or not all(names):
        raise UserError(
            f"--stages {text}: the names are {', '.join(names)}; give each stage a name of its own"
        )
    shares = [_share(row["share"], row["name"], text) for row in rows]
    if sum(shares) != 1:
        raise UserError(f"--stages {text}: the shares add up to {float(sum(shares)):g}; make it 1")
    return tuple(
        Stage(row["name"], end, parse_weights(row["task_weights"], tasks, (), flag="--stages", some=True))
        for row, end in zip(rows, accumulate(shares), strict=True)
    )


def _from_flag(text: str) -> list[dict[str, str]]:
    rows = []
    for item in filter(None, (part.strip() for part in text.split(";"))):
        parts = [part.strip() for part in item.split(":")]
        if len(parts) != len(KEYS):
            raise UserError(f"--stages: {item!r} is not NAME:SHARE:WEIGHTS, nor is {text!r} a .yaml file")
        rows.append(dict(zip(KEYS, parts, strict=True)))
    return rows


def _from_file(path: Path) -> list[dict[str, str]]:
    rows = load_yaml(path).get("stages")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"--stages {path}: no list named 'stages' in it; see voxtral_dist/stages.py")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or set(row) != set(KEYS):
            raise UserError(f"--stages {path}: stage {number} must have just the keys {', '.join(KEYS)}")
    return [{key: str(row[key]) for key in KEYS} for row in rows]


def _share(text: str, name: str, flag: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise UserError(f"--stages {flag}: the share {text} of stage {name} is not in (0, 1]")
    return share
