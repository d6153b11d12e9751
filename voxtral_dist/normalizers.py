"""Named, versioned text normalisers. Two scores compare only where the name is the same, so every result carries it.

    ko-std/1        the default, for every language: see text_norm.py
    raw/1           composed (NFC), blanks collapsed, nothing else
    ko-spoken/1     ko-std/1, then the numbers, % and units of Korean texts as they are read aloud
    open-asr-en/1   Whisper's English normaliser for texts whose language is "en", ko-std/1 for the others

A changed rule is a new version. A rule takes a text and its language, an ISO 639-1 code or "".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from voxtral_dist.errors import UserError
from voxtral_dist.text_norm import NORMALIZER, has_hangul, nfc, normalize

Normalizer = Callable[[str, str], str]
"""(text, language) -> text."""


def ko_std(text: str, language: str) -> str:
    """``ko-std/1``."""
    return normalize(text)


def raw(text: str, language: str) -> str:
    """``raw/1``: one form of composition and single blanks, else what is written."""
    return " ".join(nfc(text).split())


_DIGITS = "영일이삼사오육칠팔구"
_POWERS, _MYRIADS = ("천", "백", "십", ""), ("", "만", "억", "조")
_UNITS = {
    **{"%": "퍼센트", "kg": "킬로그램", "mg": "밀리그램", "g": "그램", "ml": "밀리리터", "l": "리터"},
    **{"km": "킬로미터", "cm": "센티미터", "mm": "밀리미터", "m": "미터"},
}
_CELSIUS = re.compile(r"°[cC]|℃")
_UNIT = re.compile(rf"(?<=[0-9]) ?({'|'.join(sorted(_UNITS, key=len, reverse=True))})(?![a-z])")
_PHONE = re.compile(r"(?<![0-9-])(?:0[0-9]+-[0-9]+|[0-9]+-[0-9]+-[0-9]+)(?:-[0-9]+)*(?![0-9-])")
_RANGE = re.compile(r"(?<=[0-9])[~-](?=[0-9])")
_SILENT_ONE = re.compile(r"(?<!\S)1(?=[백천만])")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)*")


def ko_spoken(text: str, language: str) -> str:
    """``ko-spoken/1``: ``ko-std/1``, and in Korean texts, or texts with Hangul and without a language, in this order:

    1. ``%`` and metric units behind a number become words of their own ("70%" -> "칠십 퍼센트"), °C becomes 도;
    2. telephone numbers, which have two hyphens or begin with 0, are read digit by digit with 공 for 0;
    3. ``~`` and ``-`` between numbers become 에서;
    4. numbers are read in Sino-Korean ("1592년" -> "천오백구십이년", "0.5" -> "영점오"), digit by digit with 공 where
       they begin with 0 or have more than 16 digits; ``:`` and ``/`` between them become blanks.

    Native numerals (세 번, 열두 시) are not guessed: "3번" and "세 번" stay different.
    """
    if not (language == "ko" or (not language and has_hangul(text))):
        return normalize(text)
    text = normalize(_CELSIUS.sub("도", text))
    text = _UNIT.sub(lambda found: f" {_UNITS[found[1]]}", text)
    text = _PHONE.sub(lambda found: " ".join(map(_spell, found[0].split("-"))), text)
    text = _SILENT_ONE.sub("", _RANGE.sub("에서 ", text))
    text = _NUMBER.sub(lambda found: _read(*found[0].split(".")), text)
    return normalize(text)


def _spell(digits: str, zero: str = "공") -> str:
    return "".join(zero if digit == "0" else _DIGITS[int(digit)] for digit in digits)


def _read(whole: str, *fractions: str) -> str:
    """A number with any count of points: the part before them as a number, the others digit by digit."""
    if len(whole) > 4 * len(_MYRIADS) or (whole[0] == "0" and len(whole) > 1):
        head = _spell(whole)
    else:
        head = _sino_korean(int(whole))
    return "점".join([head, *(_spell(digits, "영") for digits in fractions)])


def _sino_korean(number: int) -> str:
    """A number below 10^16 in words: 일 is silent before 천, 백, 십 and before a leading 만."""
    words = []
    for place, myriad in enumerate(_MYRIADS):
        group = number // 10_000**place % 10_000
        if group:
            silent = myriad == "만" and number < 20_000
            words.append(("" if silent else _below_myriad(group)) + myriad)
    return "".join(reversed(words)) or _DIGITS[0]


def _below_myriad(number: int) -> str:
    pairs = zip(f"{number:04d}", _POWERS, strict=True)
    return "".join(
        ("" if digit == "1" and power else _DIGITS[int(digit)]) + power
        for digit, power in pairs
        if digit != "0"
    )


def open_asr_en(text: str, language: str) -> str:
    """``open-asr-en/1``: the English normaliser of Whisper, as the Open ASR Leaderboard took it, where the language is
    ``en``. It returns Hangul as single jamo (NFD), so its result is composed again; other languages never see it.

    Raises:
        UserError: the package ``whisper-normalizer``, which holds it, is not installed.
    """
    return nfc(_whisper_english()(nfc(text))) if language == "en" else normalize(text)


@cache
def _whisper_english() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise UserError(
            "normalizer open-asr-en/1 needs a package that is not installed; "
            "run: python -m pip install 'voxtral-dist[english]' or whisper-normalizer"
        ) from None
    rule: Callable[[str], str] = EnglishTextNormalizer()
    return rule


NORMALIZERS: dict[str, Normalizer] = {
    NORMALIZER: ko_std,
    "raw/1": raw,
    "ko-spoken/1": ko_spoken,
    "open-asr-en/1": open_asr_en,
}
"""Every normaliser by name and version."""


def get_normalizer(name: str) -> Normalizer:
    """The normaliser called ``name``.

    Raises:
        UserError: there is none of that name and version; lists those there are.
    """
    if name not in NORMALIZERS:
        raise UserError(f"unknown normalizer {name!r}; there are {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]
