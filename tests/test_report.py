"""What people read of an evaluation: tables that line up, the verdict of the audio probe, previews."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from voxtral_dist import report
from voxtral_dist.errors import UserError
from voxtral_dist.tasks import TASKS


def columns(text: str) -> int:
    """Terminal columns of a text."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def bars(line: str) -> list[int]:
    """The terminal columns in which ``|`` stands."""
    return [columns(line[:place]) for place, char in enumerate(line) if char == "|"]


def cells(text: str) -> list[list[str]]:
    """The cells of the lines of a table."""
    return [[cell.strip() for cell in row.split("|")] for row in text.splitlines()]


def metrics(cer: float | None, rouge: float, macro: float | None = 0.5) -> dict[str, Any]:
    answers = {"n": 2, "rouge_l_f1": rouge, "em": 0.5, "bleu": None}
    tasks = {"asr": {"n": 2, "cer": cer, "wer": 1.0}, "sqa": answers, "tqa": answers}
    return {"tasks": tasks, "macro": macro, "weighted": macro, "balance": 1.0}


def record(task: str, prompt: str, reference: str, prediction: str | None) -> dict[str, Any]:
    return {"task": task, "prompt": prompt, "references": [reference], "prediction": prediction}


def test_columns_line_up_with_hangul() -> None:
    text = report.table(["task", "전사"], [["asr", "삼 팔"], ["sqa 한국어", "six"], ["t", ""]])
    lines = text.splitlines()
    assert len(lines) == 5 and len({tuple(bars(line)) for line in lines}) == 1
    assert columns(lines[1].split(" | ")[0]) == columns("sqa 한국어")


def test_score_table_shows_undefined_scores_as_such() -> None:
    rows = [
        [cell.strip() for cell in row.split("|")]
        for row in report.score_table(metrics(0.25, 1.0, None)).splitlines()
    ]
    assert rows[0] == ["task", "metric", "score"]
    assert (
        ["asr", "cer", "0.2500"] in rows
        and ["tqa", "bleu", "n/a"] in rows
        and ["all", "macro", "n/a"] in rows
    )


def test_comparison_has_both_sides() -> None:
    text = report.comparison_table(metrics(1.0, 0.0), metrics(0.01, 0.9))
    rows = [[cell.strip() for cell in row.split("|")] for row in text.splitlines()]
    assert rows[0] == ["task", "metric", "before", "after"]
    assert ["asr", "cer", "1.0000", "0.0100"] in rows and ["sqa", "rouge_l_f1", "0.0000", "0.9000"] in rows


@pytest.mark.parametrize(
    ("swapped", "deaf"),
    [
        (metrics(0.9, 0.1), []),
        (metrics(0.02, 0.1), ["asr"]),
        (metrics(0.9, 0.95), ["sqa"]),
        (metrics(0.02, 0.95), ["asr", "sqa"]),
        (metrics(0.0, 1.0), ["asr", "sqa"]),
    ],
)
@pytest.mark.parametrize("probe", ["swapped", "silence"])
def test_probe_verdict(swapped: dict[str, Any], deaf: list[str], probe: str) -> None:
    probes = {"swapped": metrics(0.9, 0.1), "silence": metrics(0.8, 0.2)} | {probe: swapped}
    verdict = report.probe_verdict(metrics(0.02, 0.95), probes, ["asr", "sqa"])
    assert verdict.startswith("audio NOT used" if deaf else "audio used") and "tqa" not in verdict
    assert all(name in verdict for name in deaf)
    other = {"swapped": "silence", "silence": "another example"}[probe]
    assert (other in verdict) == (not deaf)
    if len(deaf) == 1:
        assert {"asr": "sqa", "sqa": "asr"}[deaf[0]] not in verdict


def test_probe_table_has_a_column_for_each_audio() -> None:
    probes = {"swapped": metrics(0.9, 0.1), "silence": metrics(0.8, 0.2)}
    rows = cells(report.probe_table(metrics(0.02, 0.95), probes, ["asr"]))
    assert rows[0] == ["task", "metric", "own audio", "swapped audio", "silence audio"]
    assert ["asr", "cer", "0.0200", "0.9000", "0.8000"] in rows and {row[0] for row in rows[2:]} == {"asr"}


def test_probe_of_one_task_says_nothing_of_the_other() -> None:
    plain, swapped = metrics(0.02, 0.9), metrics(0.02, 0.1)
    for side in (plain, swapped):
        del side["tasks"]["asr"]
    assert report.probe_verdict(plain, {"swapped": swapped}, ["asr", "sqa"]).startswith("audio used")


@pytest.mark.parametrize(
    ("metric", "shown", "good", "bad"),
    [
        ("wer", ("wer",), 0.1, 0.9),
        ("cer_spaced", ("cer_spaced", "wer"), 0.1, 0.9),
        ("em", ("em", "rouge_l_f1", "bleu"), 0.9, 0.1),
        ("chrf", ("chrf", "rouge_l_f1", "em", "bleu"), 70.0, 20.0),
    ],
)
def test_a_new_task_is_shown_and_probed_by_its_metric(
    monkeypatch: pytest.MonkeyPatch, metric: str, shown: tuple[str, ...], good: float, bad: float
) -> None:
    monkeypatch.setitem(TASKS, "st", dataclasses.replace(TASKS["sqa"], name="st", metric=metric))
    assert report.headlines("st") == shown

    def scored(value: float) -> dict[str, Any]:
        return {"tasks": {"st": {"n": 3, metric: value}}, "macro": 0.5, "weighted": 0.5, "balance": 1.0}

    assert ["st", metric, f"{good:.4f}"] in cells(report.score_table(scored(good)))
    audio, deaf = {"swapped": scored(bad)}, {"swapped": scored(good + (bad - good) / 20)}
    assert report.probe_verdict(scored(good), audio, ["st"]).startswith("audio used")
    assert report.probe_verdict(scored(good), deaf, ["st"]).startswith("audio NOT used")
    assert report.probe_verdict(scored(bad), {"swapped": scored(good)}, ["st"]).startswith("audio NOT used")


def test_a_task_of_another_version_is_shown_by_what_it_has() -> None:
    scores = {"n": 3, "bliss": 0.25, "joy": None}
    text = report.score_table({"tasks": {"xyz": scores}, "macro": None, "weighted": None, "balance": None})
    assert ["xyz", "bliss", "0.2500"] in cells(text) and ["xyz", "joy", "n/a"] in cells(text)


def test_intervals_stand_beside_their_numbers_and_few_clusters_are_named() -> None:
    values = metrics(0.0142, 0.9) | {
        "intervals": {
            "asr": {"cer": [0.006, 0.0239]},
            "sqa": {},
            "macro": [0.4, 0.6],
            "clusters": {"asr": 3, "sqa": 20},
        }
    }
    text = report.score_table(values)
    rows = cells(text)
    assert ["asr", "cer", "0.0142 [0.006, 0.024]"] in rows and ["asr", "wer", "1.0000"] in rows
    assert ["all", "macro", "0.5000 [0.400, 0.600]"] in rows and ["sqa", "rouge_l_f1", "0.9000"] in rows
    assert text.splitlines()[-1].endswith("asr (3)") and "95 % interval" in text.splitlines()[-2]
    assert len({tuple(bars(line)) for line in text.splitlines()[:-2]}) == 1
    assert "[" not in report.score_table(metrics(0.1, 0.9))
    both = cells(report.comparison_table(metrics(1.0, 0.0), values))
    assert ["asr", "cer", "1.0000", "0.0142 [0.006, 0.024]"] in both


def test_previews_show_reference_beside_hypothesis() -> None:
    records = [record("asr", "", f"참조 {n}", f"가설 {n}") for n in range(5)]
    records += [record("tqa", "가장 | 큰\n수는?", "one", None), record("tqa", "long", "x" * 200, "y")]
    lines = report.previews(records, per_task=3).splitlines()
    assert len(lines) == 2 + 3 + 2 and len({tuple(bars(line)) for line in lines}) == 1
    assert "참조 2" in lines[4] and "가설 2" in lines[4] and "참조 3" not in "".join(lines)
    assert "가장 / 큰 수는?" in lines[5] and "(missing)" in lines[5]
    assert "…" in lines[6] and columns(lines[6]) < 200


def write_evaluation(eval_dir: Path, step: int, values: dict[str, Any]) -> None:
    folder = eval_dir / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(values))


def test_first_and_last_evaluation_of_a_run(tmp_path: Path) -> None:
    for step, cer in ((0, 1.5), (100, 0.5), (20, 0.9)):
        write_evaluation(tmp_path, step, metrics(cer, 0.5))
    text = report.first_and_last(tmp_path)
    assert "1.5000" in text and "0.5000" in text and "0.9000" not in text
    command = [sys.executable, "-m", "voxtral_dist.report", str(tmp_path)]
    root = Path(report.__file__).parent.parent
    assert (
        subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip() == text
    )
    command.pop()
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_one_evaluation_cannot_be_compared(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, metrics(1.0, 0.0))
    with pytest.raises(UserError, match="1 evaluation"):
        report.first_and_last(tmp_path)
