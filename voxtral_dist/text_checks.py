"""What two texts say differently, where an overlap of characters cannot see it: scripts, numbers, negation.

``복용하세요`` and ``복용하지 마세요`` have a ROUGE-L of 0.83, and ``0.5mg`` for ``5mg`` costs a long sentence next to
nothing. The rules are word lists and patterns for Korean and English: they point at rows that a person should read.
A number is seen when it is written in digits, or as a Korean or English numeral with a unit behind it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from decimal import Decimal
from functools import lru_cache

from voxtral_dist.text_norm import normalize, without_spaces

SCRIPTS_OF = {
    "ko": {"hangul"},
    "en": {"latin"},
    "ja": {"kana", "han"},
    "zh": {"han"},
    "ru": {"cyrillic"},
    "ar": {"arabic"},
    "hi": {"devanagari"},
    "th": {"thai"},
    **{code: {"latin"} for code in ("de", "es", "fr", "it", "nl", "pt")},
}
"""Scripts that a language is written in; of other languages only the references tell."""

_MERGED = {"CJK": "han", "HIRAGANA": "kana", "KATAKANA": "kana"}


@lru_cache(maxsize=1 << 16)
def _script(char: str) -> str:
    """Script of a letter by its Unicode name, "" for anything else."""
    name = re.split("[ -]", unicodedata.name(char, ""))[0] if char.isalpha() else ""
    return _MERGED.get(name, name.lower())


def scripts(text: str) -> Counter[str]:
    """Letters of each script: ``hangul``, ``latin``, ``han``, ``kana``, ``cyrillic`` and so on."""
    return Counter(filter(None, map(_script, unicodedata.normalize("NFKC", text))))


def wrong_script(references: Sequence[str], prediction: str, language: str = "") -> str:
    """The script that most letters of a prediction are in although neither a reference nor the language uses it.

    Returns:
        its name; "" where there is no such script or nothing tells what to expect.
    """
    expected = SCRIPTS_OF.get(language, set()).union(*map(scripts, references))
    found = scripts(prediction)
    strange = Counter({name: count for name, count in found.items() if name not in expected})
    if not expected or 2 * strange.total() <= found.total():
        return ""
    return strange.most_common(1)[0][0]


_UNITS = {
    "mg": "mg 밀리그램 밀리그람 milligram milligrams",
    "mcg": "mcg ug μg 마이크로그램 microgram micrograms",
    "kg": "kg 킬로그램 킬로 kilogram kilograms kilo kilos",
    "g": "g 그램 그람 gram grams",
    "ml": "ml cc 밀리리터 시시 milliliter milliliters millilitre millilitres",
    "l": "l 리터 liter liters litre litres",
    "mm": "mm 밀리미터 millimeter millimeters",
    "cm": "cm 센티미터 센티 centimeter centimeters",
    "km": "km 킬로미터 kilometer kilometers",
    "m": "m 미터 meter meters",
    "mmHg": "mmhg 수은주밀리미터",
    "kcal": "kcal 킬로칼로리 칼로리 calories",
    "%": "% 퍼센트 프로 percent",
    "°": "도 °c ° 도씨 degree degrees",
    "times": "회 번 차례 time times",
    "번째": "번째",
    "years": "년 year years",
    "months": "개월 달 month months",
    "월": "월",
    "weeks": "주일 주 week weeks",
    "days": "일 day days",
    "hours": "시간 hour hours",
    "시": "시",
    "minutes": "분 minute minutes min",
    "seconds": "초 second seconds sec",
    "years old": "세 살",
    "개": "개",
    "명": "명 people",
    "마리": "마리",
    **{unit: unit for unit in "알 정 캡슐 포 병 잔 장 대 권 층 호".split()},
    "won": "원 won",
    "dollars": "달러 dollar dollars",
}
_UNIT_OF = {word: unit for unit, words in _UNITS.items() for word in words.split()}
_COUNTERS = "번째 번 차례 시간 시 개월 개 명 달 잔 살 알 마리".split()
"""Units counted with native numerals (한, 두, 세 …)."""

_ONES = dict(zip("영공일이삼사오육칠팔구", (0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
_SMALL, _LARGE = {"십": 10, "백": 100, "천": 1000}, {"만": 10**4, "억": 10**8, "조": 10**12}
_NATIVE_TENS = dict(
    zip("열 스물 스무 서른 마흔 쉰 예순 일흔 여든 아흔".split(), (1, 2, *range(2, 10)), strict=True)
)
_NATIVE_ONES = {
    **dict(zip("하나 둘 셋 넷 다섯 여섯 일곱 여덟 아홉".split(), range(1, 10), strict=True)),
    **dict(zip("한 두 세 네".split(), range(1, 5), strict=True)),
}
_ENGLISH = {
    word: value
    for value, word in enumerate("one two three four five six seven eight nine ten eleven twelve".split(), 1)
}
_FREQUENCY = {"once": 1, "twice": 2}


def _any(words: Collection[str]) -> str:
    """A pattern for any of the words, the longest first; one of Latin letters does not end inside a longer word."""
    ordered = sorted(words, key=len, reverse=True)
    return "|".join(
        re.escape(word) + ("(?![a-z])" if word[-1].isascii() and word.isalpha() else "") for word in ordered
    )


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_UNIT = _any(_UNIT_OF)
_NUMBER = re.compile(
    rf"(?P<digits>(?:{_DIGITS}[십백천만억조]+\s?)*{_DIGITS}[십백천만억조]*)(?:\s?(?P<unit>{_UNIT}))?"
    rf"|(?<![가-힣])(?P<sino>[영공일이삼사오육칠팔구십백천만억조]+)(?P<blank>\s?)(?P<sino_unit>{_UNIT})"
    rf"|(?<![가-힣])(?!한번)(?P<tens>{_any(_NATIVE_TENS)})?(?P<ones>{_any(_NATIVE_ONES)})?(?<=[가-힣])"
    rf"\s?(?P<counter>{_any(_COUNTERS)})"
    rf"|\b(?P<english>{_any(_ENGLISH)})[ -](?P<english_unit>{_UNIT})"
    rf"|\b(?P<frequency>{_any(_FREQUENCY)})\b"
)
_PART = re.compile(rf"{_DIGITS}|\S")


def _value(text: str) -> Decimal:
    """The number that digits and the characters 일 … 구, 십 … 조 make: ``3만 5천`` is 35000."""
    whole = section = number = Decimal(0)
    for part in _PART.findall(text):
        if part in _SMALL:
            section, number = section + (number or 1) * _SMALL[part], Decimal(0)
        elif part in _LARGE:
            whole, section, number = whole + (section + number or 1) * _LARGE[part], Decimal(0), Decimal(0)
        elif part in _ONES:
            number = number * 10 + _ONES[part]
        else:
            number = Decimal(part.replace(",", ""))
    return whole + section + number


def numbers(text: str) -> list[tuple[Decimal, str]]:
    """The numbers in a text in order, each with its unit, "" without one: ``하루 세 번 0.5mg`` has 3 times, 0.5 mg."""
    return list(_numbers(unicodedata.normalize("NFKC", text).lower()))


def _numbers(text: str) -> Iterator[tuple[Decimal, str]]:
    for found in _NUMBER.finditer(text):
        if found["digits"]:
            yield _value(found["digits"]), _UNIT_OF.get(found["unit"] or "", "")
        elif found["sino"]:
            if _is_numeral(found["sino"], found["blank"], found["sino_unit"]):
                yield _value(found["sino"]), _UNIT_OF[found["sino_unit"]]
        elif found["english"]:
            yield Decimal(_ENGLISH[found["english"]]), _UNIT_OF[found["english_unit"]]
        elif found["frequency"]:
            yield Decimal(_FREQUENCY[found["frequency"]]), "times"
        else:
            tens, ones = _NATIVE_TENS.get(found["tens"] or "", 0), _NATIVE_ONES.get(found["ones"] or "", 0)
            yield Decimal(10 * tens + ones), _UNIT_OF[found["counter"]]


def _is_numeral(sino: str, blank: str, unit: str) -> bool:
    """Whether these syllables are a number: one alone is often a word, as in 이번, 사원, 이 시간."""
    return len(sino) > 1 or len(unit) > 2 or (len(unit) > 1 and not blank)


def differing_numbers(reference: str, prediction: str) -> tuple[list[str], list[str]]:
    """Numbers that only the reference has, and those that only the prediction has, as ``0.5 mg``.

    Equal values match when one side leaves the unit out.
    """
    ref, hyp = set(numbers(reference)), set(numbers(prediction))
    missing, extra = ref - hyp, hyp - ref
    for value, unit in sorted(missing):
        partner = next(((v, u) for v, u in sorted(extra) if v == value and not (u and unit)), None)
        if partner:
            missing.discard((value, unit))
            extra.discard(partner)
    return _shown(missing), _shown(extra)


def _shown(found: set[tuple[Decimal, str]]) -> list[str]:
    return [f"{value.normalize():f} {unit}".rstrip() for value, unit in sorted(found)]


_NO_NEGATION = re.compile(
    r"않으면\s*안|않을\s*수\s*없|없지\s*않|못지\s*않|틀림없|끊임없|불가피|불가리아|잘못|연못"
)
"""Two negations that make none, and words that hold the syllables of one."""

_NEGATION = re.compile(
    r"[지치]\s*(?:는|도|를|조차)?\s*(?:않|말|마[라세시십]|마(?![가-힣]))"
    r"|(?<!\S)[안못](?=\s|[되돼된됩됐하해했할합한먹])|못[하해했할합한]"
    r"|없|아니|아닌|아닙|아닐|아님|금지|금물|불가|삼가|삼갈|피하[세십]|피해야|피할"
    r"|\b(?:no|not|never|none|nobody|nothing|neither|nor|without|cannot|avoid)\b|n['’]t\b"
)


def negated(text: str) -> bool:
    """Whether a Korean or English text holds a negation or a ban: 안, -지 마, 없, 금지, not, never and the like."""
    plain = _NO_NEGATION.sub(" ", unicodedata.normalize("NFC", text).lower())
    return _NEGATION.search(plain) is not None


def buried(reference: str, prediction: str) -> bool:
    """Whether the whole reference stands in a prediction that is at least twice as long; particles may follow it."""
    ref, hyp = normalize(reference), normalize(prediction)
    if not ref or len(hyp) < 2 * len(ref):
        return False
    inside = rf"(?<!\w)(?<!\d[.:/~-]){re.escape(ref)}(?![^\W가-힣]|[.:/~-]\d)"
    return re.search(inside, hyp) is not None


MIN_ECHO = 4
"""Characters of a line of the prompt, without blanks, from which its repetition is no accident."""

_TRANSCRIPT_PROMPT = re.compile(r"\blang:[a-z]{2}\b|\[/?(?:INST|TRANSCRIBE|BEGIN_AUDIO|AUDIO)\]")


def echoes(prompt: str, references: Sequence[str], prediction: str) -> bool:
    """Whether a prediction repeats a line of its prompt, or the marks of the prompt, that no reference holds."""
    hyp, refs = (
        without_spaces(normalize(prediction)),
        [without_spaces(normalize(text)) for text in references],
    )
    lines = (without_spaces(normalize(line)) for line in prompt.splitlines())
    repeated = (line for line in lines if len(line) >= MIN_ECHO and line in hyp)
    marks = _TRANSCRIPT_PROMPT.search(prediction) is not None
    return marks or any(not any(line in ref for ref in refs) for line in repeated)
