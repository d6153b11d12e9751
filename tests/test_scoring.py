"""Scoring: edges, flags, pooling, BLEU, chrF2, task scores and aggregates; the golden cases are in test_golden.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
import unicodedata
from collections.abc import Callable
from typing import Any

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from test_golden import korquad_oracle, rouge_oracle

from voxtral_dist.early_stopping import check_metric, score_of
from voxtral_dist.errors import UserError
from voxtral_dist.ngram_scores import bleu_tokenizer, corpus_bleu, corpus_chrf
from voxtral_dist.scoring import (
    ERROR_RATES,
    SCALES,
    aggregate,
    pool_asr,
    pool_qa,
    rouge_l_f1,
    sample_asr,
    sample_qa,
    score_asr,
    score_qa,
    task_score,
)
from voxtral_dist.tasks import TASKS
from voxtral_dist.text_norm import compression_ratio, mixed_tokens, normalize, respace, without_spaces

HAS_MECAB = importlib.util.find_spec("mecab_ko") is not None
Args = dict[str, Any]


@pytest.mark.parametrize(
    ("pair", "cer", "counts", "flags"),
    [
        (("", ""), 0.0, (0, 0), ["empty_ref"]),
        (("", "네 네"), None, (2, 0), ["empty_ref", "hallucination"]),
        (("가나다", ""), 1.0, (3, 3), ["empty_hyp"]),
        (("가나다", "…"), 1.0, (3, 3), ["empty_hyp"]),
        (("…", ""), 0.0, (0, 0), ["empty_ref", "ref_vanished"]),
        (("…", "?"), 0.0, (0, 0), ["empty_ref", "ref_vanished"]),
        (("…", "네"), None, (1, 0), ["empty_ref", "ref_vanished", "hallucination"]),
        (("가나다", None), 1.0, (3, 3), ["missing"]),
        (("", None), 0.0, (0, 0), ["empty_ref", "missing"]),
        (("네", "네" * 40), 39.0, (39, 1), ["loop", "too_long"]),
        (("가나", "가나 다라"), 1.0, (2, 2), []),
        (("가나", "가나 다라 마"), 1.5, (3, 2), ["too_long"]),
        (("", "네 네 네"), None, (3, 0), ["empty_ref", "hallucination", "too_long"]),
        (("네" * 40, "네" * 40), 0.0, (0, 40), []),
        (("그 그 그러니까", "그 그 그러니까"), 0.0, (0, 6), []),
    ],
)
def test_edges_of_asr(
    pair: tuple[str, str | None], cer: float | None, counts: tuple[int, int], flags: list[str]
) -> None:
    row = sample_asr(*pair)
    assert (row["cer"], (row["edits"], row["ref_len"]), row["flags"]) == (cer, counts, flags)
    assert row["edits"] == row["S"] + row["D"] + row["I"]


def test_a_corpus_without_reference_text_has_counts_and_no_rate() -> None:
    result = score_asr(["", "…"], ["네 네", ""])
    rates = ("cer", "cer_spaced", "wer", "swer", "ins_rate", "del_rate", "sub_rate")
    assert [result[name] for name in rates] == [None] * 7
    assert (result["insertions"], result["n"], result["ser"]) == (2, 2, 0.5)
    assert result["empty_ref_hallucination_rate"] == 0.5
    assert (
        score_asr([], [])["cer"] is None and score_asr(["네"], ["네"])["empty_ref_hallucination_rate"] is None
    )


def test_insertions_on_an_empty_reference_and_missing_predictions_stay_in_the_corpus() -> None:
    result = score_asr(["", "가나다", "라마바"], ["네", "가나다", None])
    assert (result["cer"], result["edits"], result["ref_len"], result["missing"]) == (4 / 6, 4, 6, 1)
    assert (result["ins_rate"], result["del_rate"], result["sub_rate"], result["ser"]) == (
        1 / 6,
        0.5,
        0.0,
        2 / 3,
    )


def test_a_prediction_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score_asr(["가", "나"], ["가"])
    with pytest.raises(ValueError, match="longer"):
        score_qa([["가"]], ["가", "나"])


def seconds_for_100_pairs(score: Callable[[list[Any], list[str]], Args], ref: Any, hyp: str) -> float:
    """Processor time, the least of three attempts at 10 pairs, times 10."""
    times = []
    for _ in range(3):
        start = time.process_time()
        assert score([ref] * 10, [hyp] * 10)["loop_rate"] == 1.0
        times.append(time.process_time() - start)
    return 10 * min(times)


def test_4000_characters_of_loop_are_flagged_and_cost_little() -> None:
    """2 s for 100; pairs of two long texts take 1.3 s on an idle core and are allowed 4 on a crowded one."""
    loop = ("네 알겠습니다. " * 500)[:4000]
    syllables = "".join(chr(0xAC00 + 37 * index % 11172) for index in range(4000))
    assert seconds_for_100_pairs(score_asr, "네 고객님 확인해 드리겠습니다", loop) < 2
    assert seconds_for_100_pairs(score_qa, ["네 고객님 확인해 드리겠습니다"], loop) < 2
    assert seconds_for_100_pairs(score_asr, syllables, loop) < 4
    assert seconds_for_100_pairs(score_qa, [syllables], loop) < 4


def test_rates_of_odd_behaviour_are_shares_of_samples() -> None:
    references, hypotheses = ["네"] * 8, ["네" * 40, "네", "네 네 네", "", None, None, "네", "네"]
    expected = {"loop_rate": 0.125, "too_long_rate": 0.25, "empty_rate": 0.125, "missing": 2}
    for result in (score_asr(references, hypotheses), score_qa([[text] for text in references], hypotheses)):
        assert result.items() >= expected.items()
        assert result["max_compression_ratio"] == pytest.approx(compression_ratio("네" * 40), abs=1e-4)
    assert score_asr([], [])["max_compression_ratio"] is None and score_qa([], [])["too_long_rate"] is None


def test_the_length_ratio_counts_no_blanks_and_takes_the_longest_reference() -> None:
    assert sample_asr("가 나", "가 나 다 라 마")["length_ratio"] == 2.5
    assert sample_asr("", "네 네")["length_ratio"] == 2.0 and sample_asr("네", None)["length_ratio"] == 0.0
    row = sample_qa(["가", "가나다라"], "가나다라마바")
    assert row["length_ratio"] == 1.5 and row["flags"] == []


def test_the_rule_given_prepares_transcripts_and_exact_match() -> None:
    assert (
        sample_asr("가, 나", "가 나", str.strip)["edits"] == 1 and sample_asr("가, 나", "가 나")["edits"] == 0
    )
    answer = sample_qa(["서울!"], "서울", str.strip)
    assert (answer["em"], answer["korquad_em"], answer["rouge_l_f1"]) == (0, 1, 1.0)
    assert sample_qa(["…"], "", str.strip)["flags"] == ["empty_hyp"]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "score", "flags"),
    [
        ("", "", 1.0, ["empty_ref"]),
        ("", "네", 0.0, ["empty_ref", "hallucination"]),
        ("네", "", 0.0, ["empty_hyp"]),
        ("네", None, 0.0, ["missing"]),
        ("...", "?!", 1.0, ["empty_ref", "ref_vanished"]),
        ("서울", unicodedata.normalize("NFD", "서울"), 1.0, []),
    ],
)
def test_edges_of_qa(reference: str, hypothesis: str | None, score: float, flags: list[str]) -> None:
    metrics = dict.fromkeys(("rouge_l_f1", "em", "korquad_em", "korquad_f1"), score)
    row = sample_qa([reference], hypothesis)
    assert row.items() >= {**metrics, "flags": flags}.items()
    assert set(row) - set(metrics) == {"flags", "length_ratio", "compression_ratio"}


def test_each_qa_metric_takes_its_own_best_reference() -> None:
    row = sample_qa(["울서", "서울시청"], "서울")
    assert row["korquad_f1"] == 1.0 and row["rouge_l_f1"] == pytest.approx(4 / 6)
    best = dict(rouge_l_f1=1.0, em=1, korquad_em=1, korquad_f1=1.0, flags=[])
    assert sample_qa(["부산", "서울!"], "서울").items() >= best.items()
    assert sample_qa(["네" * 40, "네"], "네" * 40)["flags"] == []


def test_qa_means_are_over_samples() -> None:
    result = score_qa([["서울"], ["부산", "대구"], ["가"]], ["서울", "대구", None])
    assert (result["n"], result["missing"], result["loop_rate"]) == (3, 1, 0.0)
    assert [result[name] for name in ("rouge_l_f1", "em", "korquad_em", "korquad_f1")] == [2 / 3] * 4
    empty = score_qa([], [])
    assert (empty["n"], empty["rouge_l_f1"], empty["bleu"]) == (0, None, None)


def test_bleu_names_its_tokenizer_by_the_references() -> None:
    korean = "ko-mecab" if HAS_MECAB else "char"
    assert bleu_tokenizer([["서울입니다"], ["CT 촬영"], ["yes"]]) == korean
    assert bleu_tokenizer([["서울"], ["yes"]]) == "13a"


def test_bleu_takes_several_references_and_composition_does_not_matter() -> None:
    refs = [["a b c d e f", "g h i j k l"], ["the cat sat on the mat"]]
    hyps = ["g h i j k l", "the cat sat on a mat"]
    expected = BLEU(tokenize="13a").corpus_score(hyps, [["a b c d e f", refs[1][0]], ["g h i j k l", ""]])
    result = score_qa(refs, hyps)
    assert result["bleu"] == pytest.approx(expected.score)
    assert result["bleu_tokenizer"] == "13a" and "tok:13a" in result["bleu_signature"]
    sentence = "고혈압 환자는 소금 섭취를 줄여야 합니다."
    decomposed = unicodedata.normalize("NFD", sentence)
    assert corpus_bleu([[sentence]], [decomposed], "char")["bleu"] == pytest.approx(100)


def test_bleu_is_undefined_for_short_references() -> None:
    three, four = ["a b c"], ["a b c d"]
    assert corpus_bleu([three, three, four], ["a b c d"] * 3, "13a")["bleu"] is None
    assert corpus_bleu([three, four, four], ["a b c d"] * 3, "13a")["bleu"] > 0
    assert corpus_bleu([four], [None], "13a")["bleu"] == 0.0


def test_chrf_is_defined_for_short_answers_and_composition_does_not_matter() -> None:
    result = score_qa([["서울"], ["부산", "대구"]], [unicodedata.normalize("NFD", "서울"), "대구"])
    assert result["chrf"] == pytest.approx(100) and "nw:0" in result["chrf_signature"]
    refs, hyps = [["서울역", "서울"], ["부산 시청"]], ["서울", "부산시"]
    assert corpus_chrf(refs, hyps)["chrf"] == pytest.approx(
        CHRF().corpus_score(hyps, [["서울역", "부산 시청"], ["서울", ""]]).score
    )
    assert corpus_chrf([["서울"]], [None])["chrf"] == 0.0 and corpus_chrf([], [])["chrf"] is None


def test_the_interval_of_bleu_is_sacrebleus_within_the_scale() -> None:
    refs, hyps = [["a b c d e"], ["f g h i j"], ["k l m n o"]], ["a b c d e", "f g h i k", "k l m n o"]
    score = BLEU(tokenize="13a").corpus_score(hyps, [[ref[0] for ref in refs]], n_bootstrap=200)
    low, high = corpus_bleu(refs, hyps, "13a", trials=200)["bleu_interval"]
    assert low == pytest.approx(score._mean - score._ci) and high == 100.0 < score._mean + score._ci
    assert "bleu_interval" not in corpus_bleu(refs, hyps, "13a")


def test_task_scores() -> None:
    assert task_score("asr", {"cer": 0.25}) == 0.75
    assert task_score("asr", {"cer": 9.0}) == 0.0
    assert task_score("asr", {"cer": None}) is None
    assert task_score("tqa", {"rouge_l_f1": 0.5, "cer": 0.1}) == 0.5
    with pytest.raises(UserError, match="unknown task 'xyz'"):
        task_score("xyz", {"cer": 0.0})


def with_metric(monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    """A fourth task that this metric decides."""
    monkeypatch.setitem(TASKS, "new", dataclasses.replace(TASKS["sqa"], name="new", metric=metric))


@pytest.mark.parametrize("metric", [*ERROR_RATES, *SCALES])
def test_any_known_metric_can_decide_a_task(monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    with_metric(monkeypatch, metric)
    worst, half, best = {"bleu": (0, 50, 100), "chrf": (0, 50, 100)}.get(metric, (0.0, 0.5, 1.0))
    if metric in ERROR_RATES:
        worst, best = 7.5, 0.0
    scores = [task_score("new", {metric: value}) for value in (worst, half, best, None)]
    assert scores == [0.0, 0.5, 1.0, None]
    beside = score_asr(["네"], ["네"]) if metric in ERROR_RATES else score_qa([["a b c d"]], ["a b c d"])
    assert task_score("new", beside) == pytest.approx(1.0)
    assert aggregate({"new": beside})["macro"] == pytest.approx(1.0)
    check_metric(f"new.{metric}", {"new": metric})
    assert score_of({"tasks": {"new": {metric: half}}}, f"new.{metric}") == half * (
        -1 if metric in ERROR_RATES else 1
    )


def test_the_best_checkpoint_is_chosen_by_a_score_its_task_has() -> None:
    headlines = {"asr": "cer", "tqa": "rouge_l_f1"}
    for name in ("macro", "weighted", "asr.wer", "tqa.chrf"):
        check_metric(name, headlines)
    for name in ("asr.em", "tqa.cer", "sqa.em", "wer"):
        with pytest.raises(UserError, match=f"--best_metric {name}: no such score"):
            check_metric(name, headlines)


def test_every_task_is_decided_by_a_known_metric() -> None:
    assert {task.metric for task in TASKS.values()} <= {*ERROR_RATES, *SCALES}


def test_aggregates_of_undefined_and_of_worthless_tasks() -> None:
    fine, none = {"rouge_l_f1": 0.5, "n": 3}, {"cer": None, "n": 2}
    result = aggregate({"sqa": fine, "asr": none})
    assert result["scores"] == {"sqa": 0.5, "asr": None} and result["undefined"] == ["asr"]
    assert [result[key] for key in ("macro", "weighted", "balance", "gap", "std", "jain")] == [None] * 6
    assert aggregate({})["macro"] is None
    zero = {"rouge_l_f1": 0.0, "n": 3}
    assert aggregate({"sqa": zero, "tqa": zero})["balance"] == 1.0
    assert aggregate({"sqa": zero, "tqa": fine})["balance"] == 0.0
    assert aggregate({"sqa": zero, "tqa": fine})["std"] == 0.25


repeatable = settings(derandomize=True, deadline=None, max_examples=150)
text = st.text(alphabet="가나다네 각ab 1 ,.%…\u1100\u1161\u200b\u3000", max_size=12)
maybe = st.one_of(st.none(), text)


@given(st.lists(st.tuples(text, maybe), max_size=6))
@repeatable
def test_corpus_counts_are_the_sums_of_the_samples(pairs: list[tuple[str, str | None]]) -> None:
    refs, hyps = [ref for ref, _ in pairs], [hyp for _, hyp in pairs]
    rows = json.loads(json.dumps([sample_asr(ref, hyp) for ref, hyp in pairs]))
    result = score_asr(refs, hyps)
    assert result == pool_asr(rows)
    assert result["edits"] == sum(row["edits"] for row in rows)
    assert result["edits"] == result["substitutions"] + result["deletions"] + result["insertions"]
    answers = score_qa([[ref] for ref in refs], hyps)
    assert answers.items() >= pool_qa([sample_qa([ref], hyp) for ref, hyp in pairs]).items()


@given(st.lists(st.tuples(text, text), min_size=1, max_size=6))
@repeatable
def test_rates_agree_with_jiwer(pairs: list[tuple[str, str]]) -> None:
    refs, hyps = [normalize(ref) for ref, _ in pairs], [normalize(hyp) for _, hyp in pairs]
    if not any(refs):
        return
    result = score_asr(*zip(*pairs, strict=True))
    assert result["cer"] == pytest.approx(
        jiwer.cer([*map(without_spaces, refs)], [*map(without_spaces, hyps)])
    )
    assert result["cer_spaced"] == pytest.approx(jiwer.cer(refs, hyps))
    assert result["wer"] == pytest.approx(jiwer.wer(refs, hyps))
    assert result["swer"] == pytest.approx(jiwer.wer(refs, [*map(respace, refs, hyps)]))


@given(text, text)
@repeatable
def test_rouge_and_korquad_agree_with_their_oracles(ref: str, hyp: str) -> None:
    if mixed_tokens(ref) or mixed_tokens(hyp):
        assert rouge_l_f1(ref, hyp) == pytest.approx(rouge_oracle(ref, hyp))
    ref, hyp = (unicodedata.normalize("NFC", side) for side in (ref, hyp))
    em, f1 = korquad_oracle(ref, hyp)
    row = sample_qa([ref], hyp)
    assert row["korquad_em"] == em
    assert row["korquad_f1"] == pytest.approx(f1) or (em, f1, row["korquad_f1"]) == (True, 0.0, 1.0)
