"""The rules that point at texts which are nearly alike and mean something else, on sentences that people write."""

from __future__ import annotations

from decimal import Decimal

import pytest

from voxtral_dist.text_checks import (
    buried,
    differing_numbers,
    echoes,
    negated,
    numbers,
    scripts,
    wrong_script,
)


def test_scripts_are_counted_by_letter() -> None:
    assert scripts("안녕 hello Ａ 你好 こんカ чи 12!?") == {
        "hangul": 2,
        "latin": 6,
        "han": 2,
        "kana": 3,
        "cyrillic": 2,
    }


@pytest.mark.parametrize(
    ("references", "prediction", "language", "found"),
    [
        (["삼 팔"], "This This", "ko", "latin"),
        (["안녕하세요"], "你好", "", "han"),
        (["엠알아이"], "MRI", "ko", "latin"),
        (["MRI"], "엠알아이", "ko", ""),
        (["CT 촬영"], "MRI scan", "ko", ""),
        (["안녕하세요 고객님"], "안녕하세요 VIP 고객님", "ko", ""),
        (["hello", "안녕"], "안녕", "en", ""),
        (["hello"], "привет hi", "en", "cyrillic"),
        (["120"], "hundred", "", ""),
        (["안녕"], "", "ko", ""),
    ],
)
def test_a_script_that_nobody_uses(references: list[str], prediction: str, language: str, found: str) -> None:
    assert wrong_script(references, prediction, language) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("하루 세 번 0.5mg을", [("3", "times"), ("0.5", "mg")]),
        ("십오 밀리그램을 삼십분마다", [("15", "mg"), ("30", "minutes")]),
        ("3만 5천원, 10,000원", [("35000", "won"), ("10000", "won")]),
        ("천오백구십이년, 이공이사년", [("1592", "years"), ("2024", "years")]),
        ("스물세 살, 열두 개, 두 시간", [("23", "years old"), ("12", "개"), ("2", "hours")]),
        ("혈압 120/80mmHg, 50%", [("120", ""), ("80", "mmHg"), ("50", "%")]),
        ("three times a day, twice on 2 days", [("3", "times"), ("2", "times"), ("2", "days")]),
        ("５㎎ ３℃", [("5", "mg"), ("3", "°")]),
        ("10 men in 5 minutes", [("10", ""), ("5", "minutes")]),
        ("이번 사원이 이 시간에 한번 구분했다", []),
    ],
)
def test_numbers_have_values_and_units(text: str, found: list[tuple[str, str]]) -> None:
    assert numbers(text) == [(Decimal(value), unit) for value, unit in found]


@pytest.mark.parametrize(
    ("reference", "prediction", "missing", "extra"),
    [
        ("용량은 0.5mg입니다", "용량은 5mg입니다", ["0.5 mg"], ["5 mg"]),
        ("5mg", "5g", ["5 mg"], ["5 g"]),
        ("하루 세 번", "하루 3회", [], []),
        ("10,000원", "만원은 10000원", [], []),
        ("3", "3회입니다", [], []),
        ("삼십 분 뒤", "뒤", ["30 minutes"], []),
        ("무게", "무게 2,000.50 kg", [], ["2000.5 kg"]),
    ],
)
def test_numbers_that_only_one_side_has(
    reference: str, prediction: str, missing: list[str], extra: list[str]
) -> None:
    assert differing_numbers(reference, prediction) == (missing, extra)


def test_a_looping_number_takes_no_time() -> None:
    assert len(numbers("1" * 20_000 + "일" * 20_000 + "3만 " * 5_000)) < 5_001


@pytest.mark.parametrize(
    "text",
    [
        *(
            "복용하지 마세요",
            "복용하지마",
            "드시지 마십시오",
            "하지 말고",
            "먹으면 안 됩니다",
            "안돼요",
            "먹지 않아요",
        ),
        *(
            "적절치 않습니다",
            "못합니다",
            "먹지 못한다",
            "약이 없습니다",
            "감기가 아닙니다",
            "복용 금지",
            "술은 피하세요",
        ),
        *("Do not take it", "DON’T", "can't", "never", "without food", "no"),
    ],
)
def test_a_negation_is_seen(text: str) -> None:
    assert negated(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "복용하세요",
            "안녕하세요",
            "안전하게 드세요",
            "방 안에서",
            "불안해요",
            "하지만 드세요",
            "마지막으로",
        ),
        *("반드시 먹지 않으면 안 됩니다", "잘못 먹었습니다", "먹지 않을 수 없다", "돼지 마을", "불가피하다"),
        *("I know", "nothingness and notes", "another", ""),
    ],
)
def test_what_only_looks_like_a_negation(text: str) -> None:
    assert not negated(text)


@pytest.mark.parametrize(
    ("reference", "prediction", "inside"),
    [
        ("서울", "대한민국의 수도는 서울입니다", True),
        ("서울", "서울입니다", True),
        ("서울시", "서울시는", False),
        ("3", "값은 3입니다", True),
        ("3", "값은 30입니다", False),
        ("5", "값은 5.5 정도", False),
        ("the", "other thesis", False),
        ("Paris", "It is Paris, of course", True),
        ("", "무엇이든", False),
    ],
)
def test_an_answer_buried_in_a_longer_one(reference: str, prediction: str, inside: bool) -> None:
    assert buried(reference, prediction) is inside


@pytest.mark.parametrize(
    ("prompt", "references", "prediction", "echo"),
    [
        ("가장 큰 수는?\n삼 삼", ["삼"], "가장 큰 수는 삼입니다", True),
        ("가장 큰 수는?\n삼 삼", ["삼"], "삼 삼", False),
        ("Repeat: good day\nnow", ["repeat good day"], "repeat good day", False),
        ("", ["안녕"], "lang:ko 안녕", True),
        ("", ["안녕"], "[TRANSCRIBE]안녕", True),
        ("", ["안녕"], "안녕", False),
    ],
)
def test_an_answer_that_repeats_its_prompt(
    prompt: str, references: list[str], prediction: str, echo: bool
) -> None:
    assert echoes(prompt, references, prediction) is echo
