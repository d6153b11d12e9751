"""Scores of records: the family of a task by its metric, normalisers by language, sums, intervals, groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from voxtral_dist import scoring, significance
from voxtral_dist.errors import UserError
from voxtral_dist.record_scores import RATIOS, cluster, groups, intervals, ratio_of, score_records
from voxtral_dist.tasks import TASKS, parse_row


def record(task: str, number: int, reference: str, prediction: str | None, **fields: Any) -> dict[str, Any]:
    about = {"language": "ko", "domain": "", "speaker": "", "document": "", "hit_max": False}
    texts = {"references": [reference], "prediction": prediction}
    return {"task": task, "id": f"{task}-{number}", "prompt": "", **about, **texts, **fields}


def corpus() -> list[dict[str, Any]]:
    """24 transcripts of 6 speakers in two domains, 24 answers of no speaker in two languages."""
    words = ["가나다 라마", "안녕하세요 고객님", "네 알겠습니다", "확인해 드리겠습니다"]
    rows = []
    for number in range(24):
        word = words[number % 4]
        heard = word.replace(" ", "") if number % 3 else word[1:] + "요"
        about = {"speaker": f"s{number % 6}", "domain": "call" if number % 2 else "clinic"}
        rows.append(record("asr", number, word, None if number == 23 else heard, **about))
    for number in range(24):
        word, language = (words[number % 4], "ko") if number % 2 else ("the answer is four words", "en")
        said = word if number % 5 else "no"
        rows.append(record("tqa", number, word, said, language=language, hit_max=number < 6))
    return rows


def test_tasks_and_records_get_what_scoring_says_of_their_texts() -> None:
    rows = corpus()
    metrics = score_records(rows)
    parts = {task: [row for row in rows if row["task"] == task] for task in ("asr", "tqa")}
    said = {task: [row["prediction"] for row in part] for task, part in parts.items()}
    asr = scoring.score_asr([row["references"][0] for row in parts["asr"]], said["asr"])
    tqa = scoring.score_qa([row["references"] for row in parts["tqa"]], said["tqa"])
    assert metrics["tasks"] == {
        "asr": asr | {"hit_max_rate": 0.0},
        "tqa": tqa | {"hit_max_rate": 0.25},
    }
    assert metrics.items() >= scoring.aggregate(metrics["tasks"]).items()
    assert metrics["normalizer"] == "ko-std/1" and metrics["tasks"]["asr"]["missing"] == 1
    first = parts["asr"][0]
    assert first["metrics"] == scoring.sample_asr(first["references"][0], first["prediction"])


def test_a_normaliser_is_applied_by_language_and_named() -> None:
    rows = [
        record("asr", 1, "70%", "칠십 퍼센트", language="ko"),
        record("asr", 2, "70%", "70%", language="en"),
        record("tqa", 1, "3일", "삼일"),
    ]
    assert score_records(rows)["tasks"]["tqa"]["em"] == 0.0
    metrics = score_records(rows, "ko-spoken/1")
    assert metrics["normalizer"] == "ko-spoken/1"
    assert metrics["tasks"]["asr"]["cer"] == 0.0 and metrics["tasks"]["tqa"]["em"] == 1.0
    assert [row["metrics"].get("ref_len") for row in rows] == [5, 3, None]
    with pytest.raises(UserError, match="unknown normalizer"):
        score_records(rows, "ko-std/9")


@pytest.mark.parametrize("metric", ["wer", "swer", "chrf", "bleu", "korquad_f1"])
def test_the_metric_of_a_new_task_decides_how_it_is_scored(
    monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    new = dataclasses.replace(TASKS["sqa"], name="st", metric=metric)
    monkeypatch.setitem(TASKS, "st", new)
    rows = [record("st", n, "a b c d e", "a b c d x" if n % 2 else "a b c d e") for n in range(8)]
    metrics = score_records(rows)
    is_transcript = metric in scoring.ERROR_RATES
    assert ("cer" in metrics["tasks"]["st"]) == is_transcript
    assert metrics["scores"]["st"] == scoring.task_score("st", metrics["tasks"]["st"]) < 1
    found = intervals(rows, metrics)
    assert (metric in found["st"]) == (metric != "chrf")
    low, high = found["st"].get(metric, (0, 100))
    assert low < metrics["tasks"]["st"][metric] < high
    assert ("macro" in found) == (metric not in ("chrf", "bleu"))


def test_numerators_and_denominators_sum_to_the_corpus_metrics() -> None:
    rows = corpus()
    metrics = score_records(rows)["tasks"]
    seen = set()
    for task in ("asr", "tqa"):
        for name in RATIOS:
            pairs = [ratio_of(row, name) for row in rows if row["task"] == task]
            if pairs[0] is None:
                assert name not in metrics[task]
                continue
            seen.add(name)
            top, bottom = np.sum(pairs, axis=0)
            assert top / bottom == pytest.approx(metrics[task][name])
    assert seen == {*RATIOS} and ratio_of(rows[-1], "bleu") is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"speaker": "v1", "document": "d"}, "speaker:v1"),
        ({"document": "call 7"}, "document:call 7"),
        ({}, "row:asr/asr-3"),
    ],
)
def test_what_is_resampled_together(fields: dict[str, str], expected: str) -> None:
    row = record("asr", 3, "네", "네", **fields)
    assert cluster(row) == expected
    for field in ("speaker", "document"):
        if not row[field]:
            del row[field]
    assert cluster(row) == expected


def test_a_row_may_name_its_document() -> None:
    row = {"audio_path": "a.wav", "transcript": "네"}
    assert parse_row({**row, "document": "call 7"}, "x:1", "x:1").document == "call 7"
    assert parse_row({**row, "document": 7}, "x:1", "x:1").document == "7"
    assert parse_row({**row, "document": None}, "x:1", "x:1").document == ""
    assert parse_row(row, "x:1", "x:1").document == ""


def test_intervals_resample_clusters() -> None:
    rows = corpus()
    metrics = score_records(rows)
    found = intervals(rows, metrics)
    assert found["clusters"] == {"asr": 6, "tqa": 24}
    asr = [row for row in rows if row["task"] == "asr"]
    pairs = np.array([ratio_of(row, "cer") for row in asr])
    expected = significance.bootstrap_interval(pairs[:, 0], pairs[:, 1], [row["speaker"] for row in asr])
    assert found["asr"]["cer"] == pytest.approx(expected, abs=1e-6)
    assert "chrf" not in found["tqa"]
    assert found == intervals(rows, metrics)


def test_the_macro_interval_resamples_tasks_apart_and_clips_rates() -> None:
    rows = [record("asr", n, "가", "가" if n % 2 else "나") for n in range(40)]
    rows += [record("tqa", n, "가", "가" if n % 2 else "나") for n in range(40)]
    metrics = score_records(rows)
    low, high = intervals(rows, metrics)["macro"]
    one = intervals(rows, metrics)["asr"]["cer"]
    assert low < metrics["macro"] == 0.5 < high
    assert (high - low) / (one[1] - one[0]) == pytest.approx(2**-0.5, abs=0.07)
    loops = [record("asr", n, "가", "나다라마바"[: 1 + n % 5]) for n in range(30)]
    assert intervals(loops, score_records(loops))["macro"] == [0.0, 0.0]


def test_what_has_no_interval() -> None:
    one = [record("asr", n, "가나", "가", speaker="s") for n in range(5)]
    found = intervals(one, score_records(one))
    assert found == {"asr": {}, "clusters": {"asr": 1}}
    empty = [record("asr", n, "", "", speaker=f"s{n}") for n in range(5)]
    assert intervals(empty, score_records(empty)) == {"asr": {}, "clusters": {"asr": 5}}
    mixed = one + [record("tqa", n, "서울", "서울") for n in range(5)]
    found = intervals(mixed, score_records(mixed))
    assert "macro" not in found and found["tqa"]["em"] == [1.0, 1.0] and "bleu" not in found["tqa"]


def test_groups_are_pooled_from_counts() -> None:
    rows = corpus()
    score_records(rows)
    found = groups(rows)
    assert {field: sorted(values) for field, values in found.items()} == {
        "language": ["en", "ko"],
        "domain": ["", "call", "clinic"],
    }
    call = [row for row in rows if row["domain"] == "call"]
    assert found["domain"]["call"] == score_records(call)["tasks"] and set(found["domain"]["call"]) == {"asr"}
    assert found["language"]["ko"]["tqa"]["n"] == found["language"]["en"]["tqa"]["n"] == 12
    assert groups([row for row in rows if row["task"] == "tqa" and row["language"] == "ko"]) == {}


def test_limits_that_were_not_recorded_have_no_rate() -> None:
    rows = [record("asr", 1, "네", "네")]
    del rows[0]["hit_max"]
    assert score_records(rows)["tasks"]["asr"]["hit_max_rate"] is None
