"""The page of an error analysis: hostile texts, diffs, and how much sound it holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from evaluations import result
from test_error_analysis import asr, tqa

from voxtral_dist import error_page
from voxtral_dist.error_analysis import analyze
from voxtral_dist.error_rows import align
from voxtral_dist.predictions import EvalResult

TAGS = ("equal", "replace", "delete", "insert")
HOSTILE = "<script>alert('x')</script>\"'&\u202egnihton\u0007\x00<b>"


def hostile() -> EvalResult:
    fields = ("speaker", "domain", "language", "document", "prompt")
    every = {name: f"{name}{HOSTILE}" for name in fields} | {"id": f"id{HOSTILE}"}
    rows = [asr(n, f"가 {HOSTILE} {n}", f"나 {HOSTILE}", **every | {"id": f"{n}{HOSTILE}"}) for n in range(6)]
    rows += [
        asr(6, "가", "나", audio_path="/secret/voice.wav", error="/secret/voice.wav: cut off", domain="x")
    ]
    rows += [
        tqa(n, f"가나다 {HOSTILE}", f"가나 {HOSTILE}", **every | {"id": f"{n}{HOSTILE}"}) for n in range(6)
    ]
    rows += [asr(n, "가", None, id=f"{n}{HOSTILE}", domain=f"{n}{HOSTILE}") for n in (7, 8)]
    return result(f"run{HOSTILE}", rows)


def test_hostile_text_is_shown_and_does_nothing() -> None:
    analysis = analyze(hostile())
    html = error_page.build(analysis)
    assert "<script" not in html and "&lt;script&gt;alert(&#39;x&#39;)" in html
    assert not re.search("[\u202e\x00\x07]", html) and "⟨U+202E⟩" in html
    tags = re.findall(r"<(\w+)", html)
    assert tags.count("b") == html.count("</b>"), "no tag of a text is one of the page"
    assert "/secret" not in html and "/secret" not in json.dumps(analysis)


def test_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    error_page.write(analyze(result("night", [asr(0, "가", "나\ud800")])), tmp_path / "errors.html")
    assert "⟨U+D800⟩" in (tmp_path / "errors.html").read_text("utf-8")
    assert (tmp_path / "errors.html").stat().st_mode & 0o777 == 0o600


def test_a_diff_is_marked_by_signs_and_cut() -> None:
    pieces = align("가 나다 라", "가 마다라바")
    assert error_page.diff(pieces) == (
        '<bdi>가 <span class="swap"><del>나</del>→<ins>마</ins></span>다 라<ins>+바</ins></bdi>'
    )
    assert error_page.diff([("delete", "나 ", "")]) == "<bdi><del>−나</del> </bdi>"
    tags = ("<i>", "<u>")
    assert not {"<i>", "<u>"} & set(
        re.findall("<.>", "".join(error_page.diff([(tag, *tags)]) for tag in TAGS))
    )
    assert len(error_page.diff([("equal", "가" * 400, "가" * 400), ("insert", "", "나" * 4000)])) < 600
    assert "3500 more" in error_page.shown("가" * 4000) and len(error_page.shown("가" * 4000)) < 600


def many(count: int, seconds: float = 1.0) -> dict[str, Any]:
    return analyze(
        result("night", [asr(n, "가나다라", "가나다", duration=seconds) for n in range(count)]), samples=count
    )


def test_a_sound_is_in_the_page_once_and_sounds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def audio(sample: Any) -> bytes:
        asked.append(sample["id"])
        return b"fLaC" + sample["id"].encode()

    html = error_page.build(many(40), audio)
    assert html.count("<audio") == 40 == len(set(asked)) == len(asked) and html.count("listen above") == 80
    anchors = re.findall(r'id="(sample-\d+)"', html)
    assert len(anchors) == 40 == len(set(anchors)) and set(re.findall(r'href="#(sample-\d+)"', html)) == set(
        anchors
    )
    html = error_page.build(many(100), audio)
    assert html.count("<audio") == 60 and "40 rows are without sound" in html
    monkeypatch.setattr(error_page, "MOST_CLIP_BYTES", 100)
    html = error_page.build(many(10), audio)
    assert html.count("<audio") == 6 and "page is full" in html, "12 bytes each, 16 in base64"


def test_rows_whose_sound_is_not_there_are_counted() -> None:
    assert "The sound of 5 rows was not found" in error_page.build(many(5))
    assert "The sound of 5 rows was not found" in error_page.build(many(5), lambda _: None)
    assert "without sound" not in (page := error_page.build(many(5, seconds=0.0))) and "not found" not in page


def test_worst_and_random_lists_are_folded_after_ten() -> None:
    html = error_page.build(many(30))
    assert "20 more of the worst, 20 more at random" in html
    assert html.count("<article") == 90


def test_an_evaluation_without_any_reference_is_shown() -> None:
    analysis = analyze(result("night", [asr(0, "", "환청"), asr(1, "", "")]))
    assert analysis["tasks"]["asr"]["groups"]["reference_characters"][0]["value"] is None
    assert "n/a" in error_page.build(analysis)
