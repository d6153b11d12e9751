"""Text rules: each by example, against a step-by-step transcription, and as properties of random text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from voxtral_dist.text_norm import (
    compression_ratio,
    has_hangul,
    korquad_normalize,
    loops,
    max_repeat,
    mixed_tokens,
    normalize,
    respace,
    without_spaces,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=300)

DIFFICULT = (
    "가각힣한ㄱㅏㅋㅎ\u1100\u1161\u11a8\u11ff\ua960\ud7b0\uffa1\uffc2\u3164"  # Hangul in every form
    "\u200b\ufeff\u200d\u202e\u00ad\u2028\u0000\u0085\u00a0\u3000\t\n "  # invisible or blank
    "aAéE\u0301\u0345\u0307\u0130ßẞΣςﬁ漢\uf900かｶﾞ"  # letters that change under NFKC or case
    "0123９①²½፩㎏℃.,:/-~%_…()《》「」'\"$＋．，／～"  # digits, marks, symbols
)
texts = st.one_of(st.text(alphabet=DIFFICULT, max_size=24), st.text(max_size=24))
words = st.text(alphabet="가나다 ", max_size=14).map(lambda text: " ".join(text.split()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u1112\u1161\u11ab글", "한글"),
        ("ㅋㅋㅋ ㅎㅏㄴ", "ㅋㅋㅋ ㅎㅏㄴ"),
        ("１２０㎎ ＣＴ", "120mg ct"),
        ("안\u200b녕\ufeff", "안녕"),
        ("10,000원, 1,234,567 1,23 1,2345", "10000원 1234567 1 23 1 2345"),
        ("3.5도 120/80 10:30 3-4 3~4 v1.a .5 5.", "3.5도 120/80 10:30 3-4 3~4 v1 a 5 5"),
        ("70% 50 %", "70% 50 %"),
        ("(응) [뭐] {네}", "응 뭐 네"),
        ("a\tb\nc\u00a0d\u3000e  ", "a b c d e"),
        ("1.", "1"),
        (".1", "1"),
        ("…!?", ""),
        ("", ""),
    ],
)
def test_each_rule_of_the_normaliser(text: str, expected: str) -> None:
    assert normalize(text) == expected


def transcription(text: str) -> str:
    """``ko-std/1`` written out step by step, slowly."""
    nfc, nfkc = (lambda s: unicodedata.normalize("NFC", s)), (lambda s: unicodedata.normalize("NFKC", s))
    jamo = [range(0x1100, 0x1200), range(0x3131, 0x318F), range(0xFFA0, 0xFFDD)]
    text = nfc("".join(c if any(ord(c) in part for part in jamo) else nfkc(c) for c in nfc(text)))
    text = nfc("".join(c for c in text if unicodedata.category(c) != "Cf").lower())
    text = re.sub(r"(?<=\d),(?=\d\d\d(?!\d))", "", text)
    padded, out = f" {text} ", ""
    for before, char, after in zip(padded, text, padded[2:], strict=False):
        kind = unicodedata.category(char)[0]
        kept = char == "%" or (char in ".:/-~" and before.isdigit() and after.isdigit())
        out += " " if kind in "ZC" or (kind in "PS" and not kept) else char
    return " ".join(out.split())


@given(texts)
@repeatable
def test_normaliser_follows_the_steps(text: str) -> None:
    assert normalize(text) == transcription(text)


@given(texts)
@repeatable
@example("1,\u200b000")
def test_normaliser_is_idempotent(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@given(texts)
@repeatable
def test_composition_of_the_input_changes_nothing(text: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    rules: list[Callable[[str], object]] = [normalize, mixed_tokens, korquad_normalize, has_hangul]
    for rule in rules:
        assert rule(composed) == rule(decomposed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("서울입니다.", ["서", "울", "입", "니", "다"]),
        ("용량은 0.5mg, 120/80 Covid-19", ["용", "량", "은", "0.5mg", "120/80", "covid-19"]),
        ("10,000원 50% don't a_b", ["10,000", "원", "50", "don", "t", "a", "b"]),
        ("漢字 かな カナ ㅋㅋ", ["漢", "字", "か", "な", "カ", "ナ", "ㅋ", "ㅋ"]),
        ("CT촬영3회 1592년", ["ct", "촬", "영", "3", "회", "1592", "년"]),
        ("１２０", ["１２０"]),
        ("a/b v1.a 50%의 1.5", ["a", "b", "v1", "a", "50", "의", "1.5"]),
        ("!…", []),
    ],
)
def test_mixed_tokens(text: str, expected: list[str]) -> None:
    assert mixed_tokens(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("《춘향전》  'ABC'-D", "춘향전 abc d"),
        ("(서울)<시>", "서울 시"),
        ("a,b.c_d", "abcd"),
        ("네。", "네。"),
        ("ΑΣ-Α", "αςα"),
    ],
)
def test_korquad_normalize(text: str, expected: str) -> None:
    assert korquad_normalize(text) == expected


def test_without_spaces_and_has_hangul() -> None:
    assert without_spaces(" 가 나\t다\u3000라\n") == "가나다라"
    assert has_hangul("CT 촬영") and has_hangul("ㅋ") and not has_hangul("漢字 kana 12")


def etri(reference: str, hypothesis: str) -> str:
    """ETRI's space normalisation with the whole table of costs; the characters carry their blanks."""

    def units(text: str) -> list[str]:
        return [
            mark + char
            for word in text.split()
            for mark, char in zip("_" + " " * len(word), word, strict=False)
        ]

    ref, hyp = units(reference), units(hypothesis)
    cost = [[h + r if not h * r else 0 for r in range(len(ref) + 1)] for h in range(len(hyp) + 1)]
    for h in range(1, len(hyp) + 1):
        for r in range(1, len(ref) + 1):
            diagonal = cost[h - 1][r - 1] + (hyp[h - 1][1] != ref[r - 1][1])
            cost[h][r] = min(diagonal, cost[h - 1][r] + 1, cost[h][r - 1] + 1)
    h, r, out = len(hyp), len(ref), ""
    while h:
        insert, delete = cost[h - 1][r] + 1, cost[h][r - 1] + 1 if r else float("inf")
        same = r > 0 and hyp[h - 1][1] == ref[r - 1][1]
        if r and cost[h - 1][r - 1] + (not same) <= min(insert, delete):
            h, r = h - 1, r - 1
            out = (ref[r] if same else hyp[h]) + out
        elif insert < delete:
            h -= 1
            out = hyp[h] + out
        else:
            r -= 1
    return out.replace(" ", "").replace("_", " ").strip()


@given(words, words)
@settings(repeatable, max_examples=1500)
def test_respacing_follows_etri(reference: str, hypothesis: str) -> None:
    respaced = respace(reference, hypothesis)
    assert respaced == etri(reference, hypothesis)
    assert without_spaces(respaced) == without_spaces(hypothesis)


@given(words)
@repeatable
def test_respacing_restores_lost_blanks(reference: str) -> None:
    assert respace(reference, without_spaces(reference)) == reference
    assert respace(reference, " ".join(without_spaces(reference))) == reference


@pytest.mark.parametrize(
    ("text", "min_count", "expected"),
    [
        ("", 2, 0),
        ("가나다", 2, 0),
        ("가나가나가나", 2, 6),
        ("가나가나가나", 4, 0),
        ("네네네네", 4, 4),
        ("하나 둘 셋 하나 둘 셋 하나 둘 셋", 2, len("하나 둘 셋 하나 둘 셋 하나 둘 셋")),
        ("열두글자나되는아주긴낱말 열두글자나되는아주긴낱말", 2, 25),
        ("아홉글자는너무길다" * 2, 2, 0),
    ],
)
def test_max_repeat(text: str, min_count: int, expected: int) -> None:
    assert max_repeat(text, min_count) == expected


def test_a_shorter_loop_is_not_hidden_by_a_longer_span_of_fewer_repetitions() -> None:
    few, many = "하나둘셋넷다섯여" * 3, "네" * 21
    assert max_repeat(f"{few} {many}") == len(few)
    assert max_repeat(f"{few} {many}", 4) == len(many)


PLAIN = "안녕하세요 고객님 무엇을 도와드릴까요 지난달 요금이 평소보다 많이 나와서 확인 부탁드립니다"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("그 그 그러니까 어제 갔어요", False),
        ("네 " * 7, False),
        (" ".join("가나다라마바사아자차카타파하거너더러머버"), False),
        (f"{PLAIN} {'네' * 19}", False),
        (f"{PLAIN} {'네' * 20}", True),
        (f"{PLAIN} {'열한글자인낱말입니다요 ' * 3}", False),
        (f"{PLAIN} {'열한글자인낱말입니다요 ' * 4}", True),
        ("네 알겠습니다 " * 4, True),
        ("그래서 어제 병원에 다녀왔는데 의사 선생님이 괜찮다고 하셨어요 " * 5, True),
        ("", False),
    ],
)
def test_loops(text: str, expected: bool) -> None:
    assert loops(text) is expected


def test_long_loops_of_long_phrases_are_found_by_compression_alone() -> None:
    text = "그래서 어제 병원에 다녀왔는데 의사 선생님이 괜찮다고 하셨고 약도 안 먹어도 된대요 " * 5
    assert max_repeat(text, 4) == 0
    assert compression_ratio(text) > 2.4 > compression_ratio(PLAIN)
    assert loops(text)
