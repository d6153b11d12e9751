"""The analysis of an evaluation: what is listed, counted, grouped and flagged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluations import record, result

from voxtral_dist.error_analysis import analyze
from voxtral_dist.error_groups import dimensions
from voxtral_dist.error_rows import align, frequent_edits, rows_of
from voxtral_dist.errors import UserError
from voxtral_dist.normalizers import get_normalizer
from voxtral_dist.predictions import EvalResult
from voxtral_dist.record_scores import intervals, score_records
from voxtral_dist.significance import bootstrap_interval

Records = list[dict[str, Any]]


def asr(number: int, reference: str, prediction: str | None, **fields: Any) -> dict[str, Any]:
    return record(
        "asr", number, reference, prediction, **{"duration": 2.0, "speaker": f"s{number % 3}"} | fields
    )


def tqa(number: int, reference: str, prediction: str | None, **fields: Any) -> dict[str, Any]:
    return record("tqa", number, reference, prediction, **fields)


def ids(samples: Records) -> list[int]:
    return [int(sample["id"].split("-")[1]) for sample in samples]


def task(records: Records, **options: Any) -> dict[str, Any]:
    """The analysis of the only task of these records."""
    analysis = analyze(result("night", records), **options)
    assert json.loads(json.dumps(analysis, allow_nan=False)) == json.loads(json.dumps(analysis))
    (only,) = analysis["tasks"].values()
    return dict(only)


MIXED = [
    asr(0, "안녕하세요 고객님", "안녕하세요 고객님"),
    asr(1, "네", "아니요"),
    asr(2, "무엇을 도와드릴까요 고객님 말씀하세요", "무엇을 도와드릴까 고객 말해요"),
    asr(3, "", "환청"),
    asr(4, "감사합니다", "감사합니다아"),
]


def test_worst_by_edits_by_rate_and_by_lot() -> None:
    found = task(MIXED)
    assert ids(found["worst"])[0] == 2 and set(ids(found["worst"])) == {1, 2, 3, 4}
    assert ids(found["worst_by_rate"]) == [3, 1, 2, 4], "an empty reference is the worst of all"
    assert sorted(ids(found["random"])) == [0, 1, 2, 3, 4], "right rows are in the random sample"
    assert found["errors"] == 11 and found["half_of_errors"] == {"rows": 2, "share": 0.4}
    worst = found["worst"][0]
    assert (worst["errors"], worst["share"], worst["value"]) == (5, 5 / 11, 5 / 17)


def test_lists_are_cut_and_the_draw_is_repeatable() -> None:
    rows = [asr(n, "가나다", "가나라") for n in range(40)]
    first, again, other = (task(rows, samples=7, seed=seed)["random"] for seed in (0, 0, 1))
    assert len(first) == 7 and first == again and ids(first) != ids(other) and ids(first) != list(range(7))
    assert len(task(rows, samples=7)["worst"]) == 7


def test_an_alignment_holds_both_texts_and_ignores_blanks() -> None:
    reference, prediction = "오늘 날씨가 정말 좋네요", "오늘날씨가 정 좋네여요"
    pieces = align(reference, prediction)
    assert "".join(piece[1] for piece in pieces) == reference
    assert "".join(piece[2] for piece in pieces) == prediction
    assert [piece for piece in pieces if piece[0] != "equal"] == [("delete", "말 ", ""), ("insert", "", "여")]


def test_frequent_edits_count_once_per_place_and_name_a_row() -> None:
    texts = [
        ("a", "가나다", "가마다"),
        ("b", "나나", "마마"),
        ("c", "나다", "마다라"),
        ("d", "가나다", "가다"),
    ]
    found = frequent_edits(texts, most=1)
    assert found["substitutions"] == [
        {"reference": "나", "prediction": "마", "count": 4, "share": 1.0, "rows": 3, "example": "a"}
    ]
    assert found["deletions"][0] == {
        "reference": "나",
        "prediction": "",
        "count": 1,
        "share": 1.0,
        "rows": 1,
        "example": "d",
    }
    assert found["insertions"][0]["prediction"] == "라" and found["insertions"][0]["example"] == "c"


def test_edits_of_words_and_characters_leave_missing_predictions_out() -> None:
    rows = [
        asr(0, "혈압 약을 드세요", "혈당 약을 드세요"),
        asr(1, "혈압 약", "혈당 약"),
        asr(2, "혈압 약", None),
        asr(3, "가 나", "나"),
        asr(4, "나", "나 다"),
    ]
    edits = task(rows)["edits"]
    assert [(e["reference"], e["prediction"], e["count"]) for e in edits["words"]["substitutions"]] == [
        ("혈압", "혈당", 2)
    ]
    assert edits["characters"]["substitutions"][0]["share"] == 1.0
    assert [e["reference"] for e in edits["characters"]["deletions"]] == ["가"]
    assert [e["prediction"] for e in edits["words"]["insertions"]] == ["다"]


def grouped(rows: Records) -> dict[str, list[dict[str, Any]]]:
    score_records(rows)
    return dimensions(rows_of(rows, "cer", get_normalizer("ko-std/1")))


def test_groups_by_length_duration_and_speed() -> None:
    rows = [asr(n, "가" * (n + 1), "나" * (n + 1), duration=0.5 * (n + 1)) for n in range(12)]
    rows += [asr(12, "가" * 200, "가" * 200, duration=0.0)]
    tables = grouped(rows)
    lengths = [(group["group"], group["n"], group["value"]) for group in tables["reference_characters"]]
    assert lengths == [("1–5", 5, 1.0), ("6–10", 5, 1.0), ("11–20", 2, 1.0), ("over 160", 1, 0.0)]
    assert [(g["group"], g["n"]) for g in tables["audio_seconds"]] == [
        ("0–1", 2),
        ("1–2", 2),
        ("2–5", 6),
        ("5–10", 2),
    ]
    assert sum(group["share"] for group in tables["reference_characters"]) == pytest.approx(1)
    assert [(g["group"], g["n"]) for g in tables["characters_per_second"]] == [("0–2", 12)]


def test_the_interval_of_a_group_resamples_speakers_and_inside_a_speaker_rows() -> None:
    rows = [
        asr(n, "가나다라마", "가나다라마"[: 5 - n % 5], speaker=f"s{n % 7}", domain=f"d{n % 2}")
        for n in range(60)
    ]
    tables = grouped(rows)
    inside = [row for row in rows if row["domain"] == "d1"]
    counts = [row["metrics"]["edits"] for row in inside]
    expected = bootstrap_interval(counts, [5] * len(inside), [row["speaker"] for row in inside], trials=2_000)
    group = next(group for group in tables["domain"] if group["group"] == "d1")
    assert expected is not None and group["interval"] == list(expected)
    assert all(group["interval"][0] < group["value"] < group["interval"][1] for group in tables["speaker"])


def test_the_worst_speakers_come_first_and_need_rows() -> None:
    rows = [asr(n, "가나다라", "가나다", speaker="few") for n in range(4)]
    rows += [asr(10 + n, "가나다라", "가나다라", speaker="good") for n in range(5)]
    rows += [asr(20 + n, "가나다라", "가나", speaker="poor") for n in range(5)]
    assert [group["group"] for group in grouped(rows)["speaker"]] == ["poor", "good"]
    assert "domain" not in grouped(rows), "no row has one"


FAILING = {
    "missing": asr(0, "안녕하세요", None),
    "empty": asr(1, "안녕하세요", "…"),
    "hallucination": asr(2, "", "구독과 좋아요"),
    "loop": asr(3, "안녕하세요 고객님 무엇을 도와드릴까요", "안녕하세요 " * 8),
    "hit_max": asr(4, "네 알겠습니다", "네 알겠습니다", hit_max=True, n_new_tokens=16),
    "too_long": asr(5, "네 네", "네 알겠습니다"),
    "too_short": asr(6, "네 알겠습니다 고객님", "네 알"),
    "wrong_script": asr(7, "안녕하세요", "hello"),
    "echo": asr(8, "안녕하세요", "lang:ko 안녕하세요"),
}


def test_every_failure_is_found_in_its_row() -> None:
    rows = [row | {"domain": "call"} for row in FAILING.values()] + [asr(9, "네 알겠습니다", "네 알겠습니다")]
    failures = task(rows)["failures"]
    assert set(failures) == set(FAILING)
    for name, row in FAILING.items():
        assert row["id"] in [found["id"] for found in failures[name]["rows"]], name
        assert f"asr-{9:04d}" not in [found["id"] for found in failures[name]["rows"]]
        assert failures[name]["domains"] == {"call": failures[name]["n"]}
    details = {name: {row["id"]: row["detail"] for row in failures[name]["rows"]} for name in failures}
    assert details["hit_max"] == {"asr-0004": "16 tokens"}
    assert details["wrong_script"]["asr-0007"] == "latin"
    assert details["too_short"] == {"asr-0006": "0.22 times as long"}


def test_answers_that_are_nearly_right() -> None:
    rows = [
        tqa(0, "복용하세요", "복용하지 마세요"),
        tqa(1, "하루 0.5mg 드세요", "하루 5mg 드세요"),
        tqa(2, "5mg", "0.5mg"),
        tqa(3, "서울", "대한민국의 수도는 서울입니다"),
        tqa(4, "고혈압 환자는 소금을 줄여야 합니다", "고혈압 환자는 소금 줄여야 합니다"),
        tqa(5, "서울", "서울"),
        tqa(6, "약을 3번 드세요", "전혀 다른 대답"),
        tqa(7, "", "하루 한 번 복용하십시오", references=["하지 마세요", "하루 한 번 복용하세요"]),
    ]
    found = task(rows)["checks"]
    assert {name: sorted(ids(value["rows"])) for name, value in found.items()} == {
        "negation": [0],
        "numbers": [1, 2],
        "near_miss": [0, 1, 4],
        "buried": [3],
    }
    assert found["negation"]["rows"][0]["detail"] == "only in the prediction"
    assert found["numbers"]["rows"][0]["detail"] == "0.5 mg → 5 mg"


def test_transcripts_are_checked_for_numbers_and_negation_too() -> None:
    found = task([asr(0, "약을 두 번 드시지 마세요", "약을 세 번 드세요"), asr(1, "네", "아니요")])["checks"]
    assert {name: ids(value["rows"]) for name, value in found.items()} == {"negation": [0], "numbers": [0]}


def test_the_closest_reference_is_shown() -> None:
    (row,) = task([tqa(0, "", "서울특별시", references=["부산", "서울특별시입니다"])])["worst"]
    assert row["reference"] == "서울특별시입니다" and row["references"] == ["부산", "서울특별시입니다"]
    assert "".join(piece[1] for piece in row["alignment"]) == "서울특별시입니다"


def test_warnings_come_with_examples() -> None:
    rows = [asr(n, "…" if n < 2 else "네", None if n > 36 else "네", hit_max=n == 5) for n in range(40)]
    lines = analyze(result("night", rows))["warnings"]
    assert [line.split(" ")[1] for line in lines] == ["3", "2", "1", "only"]
    assert "asr-0037, asr-0038, asr-0039" in lines[0] and "asr-0000, asr-0001" in lines[1]
    good = [asr(n, "네", "네", speaker=f"s{n}") for n in range(40)]
    assert analyze(result("night", good))["warnings"] == []


def test_the_headline_has_the_intervals_of_the_evaluation_or_makes_them() -> None:
    evaluation = result(
        "night",
        [asr(n, "가나다라", "가나다", speaker=f"s{n % 5}") for n in range(30)] + [asr(99, "가", "나")],
    )
    made = analyze(evaluation)["headline"]
    expected = intervals(evaluation.records, evaluation.metrics)
    assert made[0] == {"task": "asr", "metric": "cer", "value": 31 / 121, "interval": expected["asr"]["cer"]}
    evaluation.metrics["intervals"] = {"asr": {"cer": [0.1, 0.2]}, "macro": [0.3, 0.4]}
    known = {(row["task"], row["metric"]): row["interval"] for row in analyze(evaluation)["headline"]}
    assert (
        known["asr", "cer"] == [0.1, 0.2]
        and known["all", "macro"] == [0.3, 0.4]
        and known["asr", "wer"] is None
    )


def test_texts_are_compared_under_the_rules_of_the_evaluation() -> None:
    rows = [asr(0, "CT 촬영.", "ct 촬영")]
    metrics = score_records(rows, "raw/1") | {"provenance": {}}
    (row,) = analyze(EvalResult("night", Path(), rows, metrics))["tasks"]["asr"]["worst"]
    assert row["errors"] == 3 and row["alignment"][0] == ("replace", "CT ", "ct ")


def test_records_without_scores_are_refused_in_a_line() -> None:
    evaluation = result("night", [asr(0, "가", "나")])
    for metrics in ({"flags": []}, {"edits": 1, "ref_len": 1}):
        evaluation.records[0]["metrics"] = metrics
        with pytest.raises(UserError, match=r"asr 'asr-0000' has no cer or no flags .*rescore"):
            analyze(evaluation)
