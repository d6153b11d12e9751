"""A finished evaluation, read from its folder: the records of ``predictions.jsonl`` and the scores of ``metrics.json``.

Analysis, comparison and rescoring start here, on any machine: nothing needs torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist import record_scores
from voxtral_dist.errors import UserError
from voxtral_dist.tasks import get_task

PREDICTIONS, METRICS = "predictions.jsonl", "metrics.json"

FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "id", "prompt"), (str,)),
    "references": (list,),
    "prediction": (str, type(None)),
    "metrics": (dict,),
}
"""What every record has, and of which type."""

OPTIONAL: dict[str, Any] = dict.fromkeys(("language", "domain", "speaker", "document"), "")
"""What a record without them gets."""

cluster = record_scores.cluster
"""What is resampled together with a record."""


@dataclass(frozen=True)
class EvalResult:
    """One evaluation.

    Attributes:
        name: the run's or the folder's name, for people; never an absolute path.
        folder: where it lies.
        records: lines of ``predictions.jsonl``, sorted by task and id.
        metrics: ``metrics.json``.
    """

    name: str
    folder: Path
    records: list[dict[str, Any]]
    metrics: dict[str, Any]


def find(path: Path) -> Path:
    """The folder of an evaluation.

    Args:
        path: that folder; or a run: the evaluation of its best checkpoint, else its last one in training, else
            ``evaluations/latest``.

    Raises:
        UserError: there is no finished evaluation.
    """
    if (path / PREDICTIONS).is_file():
        return path
    steps = sorted(path.glob("eval/step-*"), reverse=True)
    best = path / "best"
    if best.is_file():
        steps.insert(0, path / "eval" / best.read_text("utf-8").strip())
    for folder in (*steps, path / "evaluations" / "latest"):
        if (folder / PREDICTIONS).is_file() and (folder / METRICS).is_file():
            return folder
    missing = "does not exist" if not path.exists() else f"holds no evaluation with {PREDICTIONS}"
    raise UserError(
        f"{path} {missing}; name a run or an evaluation folder, or make one: "
        "bash launch/evaluate.sh --lora_dir RUN --val_shards DIR"
    )


def load(path: Path) -> EvalResult:
    """Read and check an evaluation.

    Args:
        path: see :func:`find`.

    Raises:
        UserError: there is none, or a file of it is damaged; names file and line.
    """
    folder = find(path)
    records = _read_records(folder / PREDICTIONS)
    return EvalResult(_name(path, folder), folder, records, _read_metrics(folder / METRICS, records))


def _name(path: Path, folder: Path) -> str:
    """``RUN`` for a run, ``RUN/step-00000100`` or ``RUN/NAME`` for a folder of one, else the folder's own name."""
    if folder != path:
        return path.resolve().name
    full = folder.resolve()
    return f"{full.parents[1].name}/{full.name}" if full.parent.name in ("eval", "evaluations") else full.name


def _read_records(file: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    lines: dict[tuple[str, str], int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        record = _record(line, f"{file}:{number}")
        first = lines.setdefault((record["task"], record["id"]), number)
        if first != number:
            raise UserError(
                f"{file}:{number}: {record['task']} {record['id']!r} is in line {first} too; every example counts "
                "once, evaluate again"
            )
        records.append(record)
    if not records:
        raise UserError(f"{file} is empty; evaluate again")
    return records


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON ({error}); the file is damaged, evaluate again") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: no JSON object; the file is damaged, evaluate again")
    for name, types in FIELDS.items():
        if name not in record:
            raise UserError(f"{where}: no field {name!r}; not written by an evaluation of ours")
        if not isinstance(record[name], types):
            raise UserError(f"{where}: field {name!r} is {type(record[name]).__name__}; the file is damaged")
    if not record["references"]:
        raise UserError(f"{where}: no reference; predictions for rows without answers cannot be scored")
    if not all(isinstance(text, str) for text in record["references"]):
        raise UserError(f"{where}: field 'references' holds something else than texts; the file is damaged")
    get_task(record["task"], where)
    return OPTIONAL | record


def _read_metrics(file: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """``metrics.json``, whose counts must be those of the records beside it."""
    try:
        metrics = json.loads(file.read_text("utf-8"))
        stored = {task: values["n"] for task, values in metrics["tasks"].items()}
    except FileNotFoundError:
        raise UserError(
            f"{file.parent} has no {file.name}: the evaluation did not finish; evaluate again"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); evaluate again") from None
    found: dict[str, int] = {}
    for record in records:
        found[record["task"]] = found.get(record["task"], 0) + 1
    if stored != found:
        raise UserError(
            f"{file} counts {stored} and {PREDICTIONS} {found} samples: they are of two evaluations; evaluate again"
        )
    return dict(metrics)
