"""Comparisons: the numbers of known data, what is refused, how often chance is called a difference, the page."""

from __future__ import annotations

import json
import math
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import counted, record, result

from voxtral_dist.comparison import compare, unique_names, write_page
from voxtral_dist.comparison_page import aligned_parts
from voxtral_dist.differences import judge
from voxtral_dist.errors import UserError
from voxtral_dist.predictions import EvalResult

LENGTHS = (10, 12, 8, 15, 9, 20, 11, 7, 14, 10, 13, 6)
ERRORS_A = (2, 3, 0, 4, 1, 5, 2, 1, 3, 2, 4, 0)
ERRORS_B = (1, 2, 1, 3, 1, 3, 2, 0, 3, 1, 2, 0)
SPEAKERS = tuple(f"v{n // 3}" for n in range(12))


def rows_of(comparison: dict[str, Any], place: int = 0) -> dict[tuple[str, str], dict[str, Any]]:
    """The tested rows of one comparison by task and metric."""
    return {(row["task"], row["metric"]): row for row in comparison["against"][place]["rows"]}


def three_tasks(name: str, transcript: str, answer: str | None, n: int = 24, **provenance: Any) -> EvalResult:
    """n samples of each task, in two languages and domains, with one transcript and one answer to all."""
    kinds: list[dict[str, Any]] = [{"language": "ko", "domain": "talk"}, {"language": "en", "domain": "news"}]
    asr = [record("asr", k, "가나다 라마", transcript, speaker=f"s{k}", **kinds[k % 2]) for k in range(n)]
    qa = [record(task, k, "서울역", answer, **kinds[k % 2]) for task in ("sqa", "tqa") for k in range(n)]
    return result(name, [*asr, *qa], **provenance)


def test_toy_set_has_the_reference_values() -> None:
    """Values by numpy and by enumeration: corpus rates 0.2 and 0.140741, p 0.125 by speaker, 224/4096 by utterance."""
    a, b = (counted(name, e, LENGTHS, SPEAKERS) for name, e in (("a", ERRORS_A), ("b", ERRORS_B)))
    row = rows_of(compare([a, b]))["asr", "cer"]
    assert (row["a"], row["b"], row["difference"]) == pytest.approx((0.2, 0.140741, -0.059259), abs=1e-6)
    assert row["p"] == 0.125 and row["exact"] and row["clusters"] == 4 and "only 4 clusters" in row["warning"]
    assert row["verdict"] == "no difference shown" and row["undecidable"]
    assert row["mapsswe"] == pytest.approx([2.601775, 0.009274], abs=1e-6) and row["mcnemar"] is None
    a, b = (counted(name, e, LENGTHS) for name, e in (("a", ERRORS_A), ("b", ERRORS_B)))
    row = rows_of(compare([a, b]))["asr", "cer"]
    assert row["p"] == 224 / 4096 and row["clusters"] == 12 and not row["undecidable"]
    assert (row["low"], row["high"]) == pytest.approx((-0.094203, -0.016667), abs=1e-6)
    assert row["probability_of_improvement"] == 0.9951


def test_a_result_against_itself_shows_no_difference() -> None:
    one = three_tasks("run", "가나 라마", "서울")
    comparison = compare([one, one])
    assert comparison["results"] == ["run", "run (2)"] and comparison["tests"] == 9
    for row in comparison["against"][0]["rows"]:
        assert (row["difference"], row["low"], row["high"]) == (0.0, 0.0, 0.0) and row["p"] == row[
            "p_holm"
        ] == 1.0
        assert row["verdict"] == "no difference shown" and row["probability_of_improvement"] == 0.0
    macro = comparison["against"][0]["macro"]
    assert (macro["difference"], macro["low"], macro["high"]) == (0.0, 0.0, 0.0)
    assert comparison["against"][0]["outcomes"]["asr"] == {"better": 0, "same": 24, "worse": 0}
    assert comparison["against"][0]["changed"]["sqa"] == {"better": [], "worse": []}


def test_better_and_worse_follow_the_direction_of_each_metric() -> None:
    bad, good = three_tasks("bad", "가나", "부산항"), three_tasks("good", "가나다 라마", "서울역")
    for verdict, other in (
        ("better", compare([bad, good], trials=999)),
        ("worse", compare([good, bad], trials=999)),
    ):
        assert {row["verdict"] for row in other["against"][0]["rows"]} == {verdict}
        assert {row["probability_of_improvement"] for row in other["against"][0]["rows"]} == {
            float(verdict == "better")
        }
    found = rows_of(compare([bad, good], trials=999))
    assert list(found)[:4] == [("asr", "cer"), ("asr", "wer"), ("asr", "swer"), ("sqa", "rouge_l_f1")]
    assert found["asr", "cer"]["difference"] < 0 < found["sqa", "em"]["difference"]
    assert found["sqa", "em"]["mcnemar"] == pytest.approx(2 / 2**24) and found["sqa", "em"]["mapsswe"] is None


def test_values_are_those_of_the_evaluations() -> None:
    a, b = three_tasks("a", "가나 라마", "서울"), three_tasks("b", "가나다 라", None)
    comparison = compare([a, b], trials=400)
    for (task, metric), row in rows_of(comparison).items():
        expected = [one.metrics["tasks"][task][metric] for one in (a, b)]
        assert [row["a"], row["b"]] == pytest.approx(expected, abs=1e-12)
    macro = comparison["against"][0]["macro"]
    assert (macro["a"], macro["b"]) == pytest.approx((a.metrics["macro"], b.metrics["macro"]))
    assert (
        macro["low"] <= macro["difference"] <= macro["high"] < 0
        and macro["probability_of_improvement"] == 0.0
    )


def test_groups_are_described_and_not_tested() -> None:
    a, b = three_tasks("a", "가나 라마", "서울"), three_tasks("b", "가나다 라마", "서울")
    half = [one for one in b.records if one["domain"] == "talk"]
    b = result("b", [*half, *(one for one in a.records if one["domain"] == "news")])
    groups = compare([a, b], trials=400)["against"][0]["groups"]
    found = {(row["value"], row["task"], row["metric"]): row for row in groups["domain"]}
    assert (
        found["news", "asr", "cer"]["difference"] == 0.0 and found["talk", "asr", "cer"]["difference"] == -0.2
    )
    assert found["talk", "asr", "cer"]["n"] == 12 and ("news", "asr", "swer") not in found
    assert not any({"p", "p_holm", "verdict"} & row.keys() for rows in groups.values() for row in rows)
    same = result("same", [{**one, "domain": "talk", "language": "ko"} for one in a.records])
    assert compare([same, same], trials=400)["against"][0]["groups"] == {"language": [], "domain": []}


def test_samples_that_changed_most_come_first() -> None:
    texts = ["가나다 라", "가나다", "가나다 라마", "가"]
    a = result("a", [record("asr", n, "가나다 라마", "가나다") for n in range(4)])
    b = result("b", [record("asr", n, "가나다 라마", text) for n, text in enumerate(texts)])
    other = compare([a, b], trials=400)["against"][0]
    assert other["outcomes"] == {"asr": {"better": 2, "same": 1, "worse": 1}}
    assert [one["id"] for one in other["changed"]["asr"]["better"]] == ["asr-0002", "asr-0000"]
    (worse,) = other["changed"]["asr"]["worse"]
    assert worse["predictions"] == ["가나다", "가"] and worse["counts"] == [2.0, 4.0]


def test_undefined_metrics_stay_undefined() -> None:
    a, b = (result(name, [record("asr", n, "...", "") for n in range(3)]) for name in "ab")
    comparison = compare([a, b], trials=400)
    assert {row["verdict"] for row in comparison["against"][0]["rows"]} == {"undefined"} and comparison[
        "tests"
    ] == 0
    assert comparison["against"][0]["macro"]["a"] is None
    json.dumps(comparison, allow_nan=False)


def without(rows: list[dict[str, Any]], ids: Sequence[str]) -> list[dict[str, Any]]:
    return [row for row in rows if row["id"] not in ids]


def edited(field: str, value: Any) -> Callable[[EvalResult], EvalResult]:
    """Another value of a field in the first two samples of TQA."""

    def edit(one: EvalResult) -> EvalResult:
        chosen = ("tqa-0000", "tqa-0001")
        return replace(one, records=[{**r, field: value} if r["id"] in chosen else r for r in one.records])

    return edit


def provenance(**values: Any) -> Callable[[EvalResult], EvalResult]:
    return lambda one: replace(one, metrics={**one.metrics, "provenance": values})


REFUSED: list[tuple[Callable[[EvalResult], EvalResult], str]] = [
    (
        lambda one: replace(one, records=without(one.records, ["asr-0003", "sqa-0004"])),
        "other lacks 2 samples (asr/asr-0003 first) of base;",
    ),
    (
        lambda one: replace(one, records=[*one.records, record("tqa", 99, "가", "가")]),
        "base lacks 1 sample (tqa/tqa-0099) of other;",
    ),
    (
        edited("references", ["부산"]),
        "other has another references than base in 2 samples (tqa/tqa-0000 first);",
    ),
    (edited("prompt", "왜?"), "other has another prompt than base in 2 samples (tqa/tqa-0000 first);"),
    (edited("language", "fr"), "other has another language than base in 2 samples (tqa/tqa-0000 first);"),
    (
        lambda one: replace(one, metrics={**one.metrics, "normalizer": "ko-std/2"}),
        "other was scored under ko-std/2, base under ko-std/1;",
    ),
    (provenance(max_new_tokens=32), "other was decoded with max_new_tokens 32, base with 16;"),
    (provenance(max_len=64), "other was decoded with max_len 64, base with 128;"),
    (provenance(sqa_question="spoken"), "other was decoded with sqa_question 'spoken', base with 'written';"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_compared_is_refused(change: Callable[[EvalResult], EvalResult], message: str) -> None:
    settings = {"max_new_tokens": 16, "max_len": 128, "sqa_question": "written"}
    base = three_tasks("base", "가", "나", n=6, **settings)
    other = three_tasks("other", "가", "나", n=6, **settings)
    with pytest.raises(UserError) as refusal:
        compare([base, other, change(other)], trials=400)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


def test_only_settings_that_both_name_must_agree() -> None:
    base, other = (
        three_tasks("base", "가", "나", n=6, max_new_tokens=16),
        three_tasks("other", "가", "나", n=6),
    )
    assert compare([base, other], trials=400)["settings"] == {"max_new_tokens": 16}
    with pytest.raises(UserError, match="needs two evaluations, 1 given"):
        compare([base])


def test_samples_are_matched_by_id_in_whatever_order() -> None:
    a, b = (counted(name, e, LENGTHS) for name, e in (("a", ERRORS_A), ("b", ERRORS_B)))
    assert compare([a, replace(b, records=b.records[::-1])], trials=400) == compare([a, b], trials=400)


def test_too_few_trials_for_any_verdict_are_refused() -> None:
    bad, good = three_tasks("bad", "가나", "부산항"), three_tasks("good", "가나다 라마", "서울역")
    with pytest.raises(UserError, match=r"^100 trials cannot show .* among 9 tests.*at least 360$"):
        compare([bad, good], trials=100)
    assert {row["verdict"] for row in compare([bad, good], trials=360)["against"][0]["rows"]} == {"better"}


def test_equal_names_are_told_apart() -> None:
    one = counted("seed-0/final", [1], [2])
    assert unique_names([one, one, replace(one, name="x"), one]) == [
        *("seed-0/final", "seed-0/final (2)", "x", "seed-0/final (3)")
    ]


def world(
    seed: int,
    factors: Sequence[float] = (1.0, 1.0),
    *,
    speakers: int = 30,
    named: bool = True,
    own: float = 0.6,
) -> list[EvalResult]:
    """Arms on the same 4 sentences of each speaker.

    Sentences differ in difficulty, for all arms alike; each arm has besides luck of its own with each speaker. Arms of
    one factor draw their errors from one distribution, as seeds of one training do.

    Args:
        seed: of the world.
        factors: of each arm's error rate.
        speakers: how many.
        named: whether the records say whose they are.
        own: deviation of the luck, in logits.
    """
    rng = np.random.default_rng(seed)
    speaker = np.repeat(np.arange(speakers), 4)
    lengths = rng.integers(5, 25, len(speaker))
    difficulty = rng.normal(-2, 1, len(speaker)) + rng.normal(0, 0.5, speakers)[speaker]
    names = [f"s{n}" for n in speaker] if named else None
    arms = []
    for number, factor in enumerate(factors):
        rate = factor / (1 + np.exp(-difficulty - rng.normal(0, own, speakers)[speaker]))
        errors = rng.binomial(lengths, rate)
        words = rng.binomial(errors, 0.7)
        arms.append(counted(f"arm {number}", errors.tolist(), lengths.tolist(), names, words.tolist()))
    return arms


def most_by_chance(n: int, rate: float = 0.05, tail: float = 0.001) -> int:
    """Successes in n that a binomial of this rate exceeds with less than ``tail``."""
    mass, k = (1 - rate) ** n, 0
    while mass < 1 - tail:
        k += 1
        mass += math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
    return k


def outcomes_of(worlds: int, trials: int, *args: Any, **about: Any) -> tuple[int, int, int]:
    """In how many worlds some metric has the verdict "better", the verdict "worse", an uncorrected p below 0.05."""
    better = worse = raw = 0
    for seed in range(worlds):
        comparison = compare(world(seed, *args, **about), trials=trials, seed=seed)
        rows = [row for other in comparison["against"] for row in other["rows"]]
        better += any(row["verdict"] == "better" for row in rows)
        worse += any(row["verdict"] == "worse" for row in rows)
        raw += any(row["p"] < 0.05 for row in rows)
    return better, worse, raw


def test_two_seeds_of_one_arm_are_not_called_different_too_often() -> None:
    better, worse, raw = outcomes_of(400, 99)
    assert 4 <= better + worse <= most_by_chance(400) and raw <= most_by_chance(400, 0.1)


def test_sentences_of_a_speaker_are_not_independent() -> None:
    """What the test above would say if every sentence counted for itself."""
    better, worse, _ = outcomes_of(100, 199, named=False, own=1.0)
    assert better + worse > most_by_chance(100)


def test_a_real_difference_is_found_mostly() -> None:
    better, worse, _ = outcomes_of(60, 199, (1.0, 0.8), speakers=60, own=0.2)
    assert better >= 48 and worse == 0


@pytest.mark.slow
def test_holm_holds_the_error_of_a_whole_page() -> None:
    """Six seeds of one arm against the first: 10 tests, and some difference is claimed on at most 5 % of pages."""
    better, worse, raw = outcomes_of(300, 499, (1.0,) * 6)
    assert better + worse <= most_by_chance(300) < most_by_chance(300, 0.15) < raw


def test_all_tests_of_a_call_are_corrected_together() -> None:
    bad, good = three_tasks("bad", "가나", "부산항"), three_tasks("good", "가나다 라마", "서울역")
    comparison = compare([bad, good, good], trials=999)
    lowest = min((row for other in comparison["against"] for row in other["rows"]), key=lambda row: row["p"])
    assert comparison["tests"] == 18 and lowest["p_holm"] == pytest.approx(18 * lowest["p"])


def test_judging_corrects_over_all_rows_together() -> None:
    rows = [
        {"p": p, "difference": d, "lower_is_better": True, "clusters": 30}
        for p, d in ((0.01, -1.0), (0.04, -1.0), (0.03, 1.0), (0.005, 1.0), (None, None))
    ]
    judge(rows)
    assert [row["p_holm"] for row in rows[:4]] == pytest.approx([0.03, 0.06, 0.06, 0.02]) and rows[4][
        "p_holm"
    ] is None
    assert [row["verdict"] for row in rows] == [
        *("better", "no difference shown", "no difference shown", "worse", "undefined")
    ]


def test_macro_resamples_a_speaker_with_all_tasks() -> None:
    """Where a speaker's transcripts gain what the answers lose, only a draw of whole speakers knows that it cancels."""
    rng, sides = np.random.default_rng(0), {}
    luck = rng.integers(0, 2, 40)
    for name, flipped in (("a", 0), ("b", 1)):
        right = [int(x) ^ flipped for x in luck]
        asr = [record("asr", n, "가", "가" if r else "나", speaker=f"s{n}") for n, r in enumerate(right)]
        sqa = [record("sqa", n, "가", "나" if r else "가", speaker=f"s{n}") for n, r in enumerate(right)]
        sides[name] = result(name, [*asr, *sqa])
    macro = compare([sides["a"], sides["b"]], trials=400)["against"][0]["macro"]
    assert macro["clusters"] == 40 and (macro["low"], macro["high"]) == pytest.approx((0.0, 0.0), abs=1e-12)


def test_predictions_are_aligned_with_the_closest_reference() -> None:
    assert aligned_parts(["서울역", "부산항"], "부산함") == [("same", "부산"), ("del", "항"), ("ins", "함")]
    assert aligned_parts(["서울역"], None) == [("del", "서울역")]
    assert aligned_parts(["서울역"], "This This") == [("ins", "This This")]
    assert (
        aligned_parts(["e\u0301te"], "\u00e9te")
        == aligned_parts(["\u00e9te"], "e\u0301te")
        == [("same", "\u00e9te")]
    )


class Page(HTMLParser):
    """Collects the tags, addresses and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert('x')</script><img src=//evil.example/x onerror=alert(1)>&amp;{{7*7}}"


def test_page_shows_hostile_text_as_text_and_loads_nothing(tmp_path: Path) -> None:
    names = {"language": "ko", "domain": HOSTILE, "prompt": HOSTILE, "audio_path": "/data/secret/x.flac"}
    sides = []
    for name, said in ((f"a {HOSTILE}", HOSTILE + "가"), (f"b {HOSTILE}", None)):
        rows = [
            record("sqa", n, HOSTILE, said, **{**names, "domain": HOSTILE if n % 2 else "x"})
            for n in range(20)
        ]
        rows += [record("tqa", n, "가", "가" if said else HOSTILE, **names) for n in range(20)]
        rows[0]["id"] = HOSTILE
        sides.append(result(name, rows, model_id="/models/secret/base"))
    path = tmp_path / "comparison.html"
    extra = {"arms": {HOSTILE: {HOSTILE: HOSTILE, "train_shards": "/data/secret/shards"}}}
    write_page(compare(sides, trials=400), path, extra=extra, audio=lambda one: b"fLaC" + one["id"].encode())
    html = path.read_text("utf-8")
    page = Page(html)
    assert not page.tags & {"script", "img", "iframe", "link", "object", "base"} and "audio" in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    addresses = [value for name, value in page.attributes if name in ("src", "href", "data", "action")]
    assert addresses and all(value.startswith(("#", "data:audio/flac;base64,")) for value in addresses)
    assert (
        "secret" not in html
        and str(tmp_path) not in html
        and "{{7*7}}" in page.text
        and "49" not in page.text
    )
    assert page.text.count("<script>") > 20
    stored = path.with_suffix(".json").read_text("utf-8")
    assert "secret/base" not in stored and "audio_path" not in stored
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}


def test_page_says_what_the_numbers_say(tmp_path: Path) -> None:
    a, b = three_tasks("old", "가나 라마", "서울"), three_tasks("new", "가나다 라마", "서울")
    comparison = compare([a, b], trials=999)
    write_page(comparison, tmp_path / "comparison.html")
    text = " ".join(Page((tmp_path / "comparison.html").read_text("utf-8")).text.split())
    assert "new against old" in text and "-0.2000 [-0.2000, -0.2000]" in text and "better" in text
    assert (
        "no difference shown" in text
        and "another seed" in text
        and "equal" not in text.replace("not mean equal", "")
    )
    assert "Transfer between tasks" not in text and "Forgetting" not in text and "Arms" not in text
    assert json.loads((tmp_path / "comparison.json").read_text("utf-8")) == json.loads(json.dumps(comparison))


def test_nothing_needs_torch() -> None:
    code = "import sys, voxtral_dist.comparison, voxtral_dist.transfer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
