"""Normalisers by name: what each leaves of a text, in which languages, and what a missing package says."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxtral_dist import normalizers
from voxtral_dist.errors import UserError
from voxtral_dist.normalizers import NORMALIZERS, get_normalizer
from voxtral_dist.text_norm import NORMALIZER, normalize

repeatable = settings(derandomize=True, deadline=None, max_examples=80)
texts = st.text(alphabet="가네 12090.,:/-~%°Ckgml만천ab\u1112\u1161\u3000\u200b", max_size=16)
spoken = get_normalizer("ko-spoken/1")


def test_the_default_is_ko_std_for_every_language() -> None:
    assert next(iter(NORMALIZERS)) == NORMALIZER == "ko-std/1"
    for language in ("", "ko", "en"):
        assert get_normalizer("ko-std/1")("１０,000원, OK!", language) == "10000원 ok"


def test_raw_changes_composition_and_blanks_only() -> None:
    text = unicodedata.normalize("NFD", " 한글,\t10,000원\n OK! ")
    assert get_normalizer("raw/1")(text, "ko") == "한글, 10,000원 OK!"


def test_an_unknown_name_or_version_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"unknown normalizer 'ko-std/2'; there are ko-std/1, raw/1, "):
        get_normalizer("ko-std/2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1592년", "천오백구십이년"),
        ("70%가 50 %", "칠십 퍼센트가 오십 퍼센트"),
        ("0.5mg, 3.05kg을", "영점오 밀리그램 삼점영오 킬로그램을"),
        ("36.5℃ 36.5°C", "삼십육점오도 삼십육점오도"),
        ("5m 5mm 5ml 5msec", "오 미터 오 밀리미터 오 밀리리터 오msec"),
        ("10,000원 1만원 110000 21만", "만원 만원 십일만 이십일만"),
        ("3~4일 3-4일", "삼에서 사일 삼에서 사일"),
        ("010-1234-5678 02-987", "공일공 일이삼사 오육칠팔 공이 구팔칠"),
        ("007 0 100", "공공칠 영 백"),
        ("120/80 10:30", "백이십 팔십 십 삼십"),
        ("2024.1.5", "이천이십사점일점오"),
        ("1천만 5천", "천만 오천"),
        ("100000000 1000000010000", "일억 일조일만"),
        ("12345678901234567", "일이삼사오육칠팔구공일이삼사오육칠"),
        ("3번, 세 번", "삼번 세 번"),
        ("covid-19와", "covid 십구와"),
        ("네, 알겠습니다.", "네 알겠습니다"),
    ],
)
def test_korean_numbers_are_read_aloud(text: str, expected: str) -> None:
    assert spoken(text, "ko") == expected


def number_of(words: str) -> int:
    """A Sino-Korean numeral below 10^16 as a number."""
    total = group = digit = 0
    for char in words:
        if char in "영일이삼사오육칠팔구":
            digit = "영일이삼사오육칠팔구".index(char)
        elif char in "십백천":
            group, digit = group + max(digit, 1) * {"십": 10, "백": 100, "천": 1000}[char], 0
        else:
            total += max(group + digit, 1) * {"만": 10**4, "억": 10**8, "조": 10**12}[char]
            group = digit = 0
    return total + group + digit


@given(st.integers(0, 10**16 - 1) | st.integers(0, 10**6))
@repeatable
def test_every_number_can_be_read_back(number: int) -> None:
    assert number_of(spoken(str(number), "ko")) == number


@given(texts)
@repeatable
def test_the_spoken_form_has_no_digit_is_stable_and_blind_to_composition(text: str) -> None:
    once = spoken(text, "ko")
    assert not any(char in "0123456789" for char in once)
    assert spoken(once, "ko") == once == normalize(once)
    assert spoken(unicodedata.normalize("NFD", text), "ko") == spoken(
        unicodedata.normalize("NFC", text), "ko"
    )


def test_only_korean_texts_are_read_aloud() -> None:
    assert spoken("70% of 12", "en") == spoken("70% of 12", "") == "70% of 12"
    assert spoken("70% 중", "") == "칠십 퍼센트 중"
    assert spoken("70% 중", "en") == "70% 중"


def test_open_asr_english_is_for_english_only_and_keeps_syllables_whole() -> None:
    pytest.importorskip("whisper_normalizer")
    rule = get_normalizer("open-asr-en/1")
    assert rule("Mr. Smith's colour isn't (uh) twenty-one", "en") == "mister smith is color is not 21"
    assert rule("Café in 서울", "en") == "cafe in 서울"
    assert rule(unicodedata.normalize("NFD", "서울"), "en") == "서울"
    for language in ("ko", ""):
        assert rule("서울, (응) colour isn't 10,000", language) == normalize("서울, (응) colour isn't 10,000")


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    monkeypatch.setitem(sys.modules, "whisper_normalizer", None)
    normalizers._whisper_english.cache_clear()
    rule = get_normalizer("open-asr-en/1")
    with pytest.raises(UserError, match=r"pip install .*whisper-normalizer"):
        rule("isn't", "en")
    assert rule("아니", "ko") == "아니"
