"""Evaluations read back: which folder a path means, what a result is called, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_record_scores import corpus, record

from voxtral_dist import predictions
from voxtral_dist.errors import UserError
from voxtral_dist.predictions import find, load
from voxtral_dist.record_scores import score_records


def write(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """An evaluation folder as the evaluator writes it."""
    rows = corpus() if rows is None else rows
    folder.mkdir(parents=True)
    metrics = score_records(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(lines, "utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_a_run_means_its_best_then_its_last_then_its_latest_evaluation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    latest = write(run / "evaluations" / "latest")
    write(run / "evaluations" / "other")
    assert find(run) == latest
    first, last = write(run / "eval" / "step-00000100"), write(run / "eval" / "step-00000200")
    assert find(run) == last
    (run / "eval" / "step-00000300" / "parts").mkdir(parents=True)
    assert find(run) == last
    (run / "best").write_text("step-00000100\n")
    assert find(run) == first
    (run / "best").write_text("step-00000300\n")
    assert find(run) == last and find(first) == first


def test_a_result_has_records_metrics_and_a_name_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "run-7" / "evaluations" / "night")
    alone = write(tmp_path / "copied")
    (tmp_path / "run-7" / "eval").mkdir()
    write(tmp_path / "run-7" / "eval" / "step-00000100")
    assert load(folder).name == "run-7/night" and load(alone).name == "copied"
    assert load(tmp_path / "run-7" / "eval" / "step-00000100").name == "run-7/step-00000100"
    assert load(tmp_path / "run-7").name == "run-7"
    monkeypatch.chdir(folder)
    result = load(Path())
    assert result.name == "run-7/night" and len(result.records) == 48
    assert result.metrics["tasks"]["asr"]["n"] == 24
    assert [row["id"] for row in result.records] == [row["id"] for row in corpus()]


def test_fields_of_later_versions_are_filled(tmp_path: Path) -> None:
    rows = [record("asr", 1, "네", "네")]
    for field in ("document", "speaker", "domain", "language"):
        del rows[0][field]
    read = load(write(tmp_path / "old", rows)).records[0]
    assert [read[field] for field in ("document", "speaker", "domain", "language")] == [""] * 4
    assert predictions.cluster(read) == "row:asr/asr-1"


def test_nothing_to_find_says_how_to_make_it(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "holds no evaluation")):
        with pytest.raises(UserError, match=what) as caught:
            load(path)
        assert "bash launch/evaluate.sh" in str(caught.value)


def with_line(folder: Path, number: int, line: bytes) -> Path:
    """A copy of an evaluation with another line in place of one, from 1."""
    file = folder / "predictions.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[number - 1] = line
    file.write_bytes(b"".join(lines))
    return file


GOOD = {"task": "asr", "id": "x", "prompt": "", "references": ["네"], "prediction": "네", "metrics": {}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{\n", "no JSON"),
        (b"\xff{}\n", "no JSON"),
        (b"[" * 100_000 + b"\n", "no JSON"),
        (b"[1]\n", "no JSON object"),
        (json.dumps({**GOOD, "id": 7}).encode() + b"\n", "field 'id' is int"),
        (json.dumps({**GOOD, "prediction": 7}).encode() + b"\n", "field 'prediction' is int"),
        (
            json.dumps({key: GOOD[key] for key in GOOD if key != "metrics"}).encode() + b"\n",
            "no field 'metrics'",
        ),
        (json.dumps({**GOOD, "references": []}).encode() + b"\n", "no reference"),
        (json.dumps({**GOOD, "references": [1]}).encode() + b"\n", "something else than texts"),
        (json.dumps({**GOOD, "task": "xyz"}).encode() + b"\n", "unknown task 'xyz'"),
        (json.dumps({**GOOD, "id": "asr-0"}).encode() + b"\n", "is in line 1 too"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = with_line(write(tmp_path / "e"), 3, line)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "e")
    assert str(caught.value).startswith(f"{file}:3: ") and message in str(caught.value)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty")
    (empty / "predictions.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        load(empty)
    torn = write(tmp_path / "torn")
    (torn / "predictions.jsonl").write_bytes(
        b"".join((torn / "predictions.jsonl").read_bytes().splitlines(keepends=True)[:40])
    )
    with pytest.raises(UserError, match="they are of two evaluations"):
        load(torn)
    for name, text, message in (("a", None, "did not finish"), ("b", "{", "damaged"), ("c", "[]", "damaged")):
        folder = write(tmp_path / name)
        (folder / "metrics.json").unlink()
        if text:
            (folder / "metrics.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load(folder)
