"""Evaluations made up for tests: from texts, or from counts of errors alone, in memory or as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxtral_dist.predictions import EvalResult
from voxtral_dist.record_scores import score_records


def record(task: str, number: int, reference: str, prediction: str | None, **fields: Any) -> dict[str, Any]:
    """A record without scores; ``fields`` replace what it has."""
    about = {
        "task": task,
        "id": f"{task}-{number:04d}",
        "language": "ko",
        "domain": "",
        "speaker": "",
        "document": "",
    }
    asked = {
        "audio_path": "",
        "duration": 0.0,
        "prompt": "" if task == "asr" else "무엇?",
        "references": [reference],
    }
    return {**about, **asked, "prediction": prediction, "hit_max": False, "error": None, **fields}


def result(name: str, records: Sequence[dict[str, Any]], **provenance: Any) -> EvalResult:
    """An evaluation of these records, scored."""
    rows = [dict(row) for row in records]
    return EvalResult(name, Path("/nowhere") / name, rows, score_records(rows) | {"provenance": provenance})


def counted(
    name: str,
    errors: Sequence[int],
    lengths: Sequence[int],
    speakers: Sequence[str] | None = None,
    word_errors: Sequence[int] | None = None,
) -> EvalResult:
    """An ASR evaluation in English of which only edits are known."""
    words = word_errors or errors
    rows = [
        record("asr", n, "", "", language="en", speaker=speakers[n] if speakers else "")
        | {
            "metrics": {
                "edits": e,
                "ref_len": r,
                "word_edits": w,
                "word_len": r,
                "swer_edits": w,
                "flags": [],
            }
        }
        for n, (e, r, w) in enumerate(zip(errors, lengths, words, strict=True))
    ]
    return EvalResult(name, Path("/nowhere") / name, rows, {"normalizer": "ko-std/1", "provenance": {}})


def write(folder: Path, evaluation: EvalResult) -> Path:
    """The evaluation as the files of a real one."""
    folder.mkdir(parents=True)
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in evaluation.records]
    (folder / "predictions.jsonl").write_text("".join(lines), "utf-8")
    (folder / "metrics.json").write_text(json.dumps(evaluation.metrics), "utf-8")
    return folder
