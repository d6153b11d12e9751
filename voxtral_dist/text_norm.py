"""Text rules of scoring, each under a versioned name: two scores compare only when the names are equal.

``ko-std/1`` (:func:`normalize`) prepares both sides of CER, WER and exact match, for Korean and any other
language. ``mixed/1`` (:func:`mixed_tokens`) cuts ROUGE-L tokens. :func:`korquad_normalize` follows KorQuAD
v1.0. :func:`respace` is the word-spacing correction behind sWER, :func:`loops` finds text that repeats
itself. No rule ever deletes bracketed text.
"""

from __future__ import annotations

import re
import string
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import eq

NORMALIZER = "ko-std/1"
"""Version of :func:`normalize`, written beside every number that rests on it."""

TOKENIZER = "mixed/1"
"""Version of :func:`mixed_tokens`."""


class _CharTable(dict[int, str]):
    """A table for ``str.translate`` that works each character out on first sight."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = self._rule(chr(code))
        return self[code]


def _is_jamo(char: str) -> bool:
    """Whether NFKC must spare ``char``: it would turn jamo that stand alone into parts of syllables."""
    return "\u1100" <= char <= "\u11ff" or "\u3131" <= char <= "\u318e" or "\uffa0" <= char <= "\uffdc"


def _spaced(char: str) -> str:
    """A blank for punctuation, symbols, separators and controls, save the marks that numbers may hold."""
    blank = unicodedata.category(char)[0] in "PSZC" and char not in "%.:/-~"
    return " " if blank else char


_FOLD = _CharTable(lambda char: char if _is_jamo(char) else unicodedata.normalize("NFKC", char))
_VISIBLE = _CharTable(lambda char: "" if unicodedata.category(char) == "Cf" else char)
_SPACED = _CharTable(_spaced)
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER_MARK = re.compile(r"[.:/~-]")


def nfc(text: str) -> str:
    """``text`` composed (Unicode NFC): one character to a Hangul syllable."""
    return unicodedata.normalize("NFC", text)


def _between_digits(mark: re.Match[str]) -> str:
    """The mark itself when a digit stands on both sides, else a blank."""
    text, start, end = mark.string, mark.start(), mark.end()
    return mark[0] if text[max(0, start - 1) : start].isdigit() and text[end : end + 1].isdigit() else " "


def normalize(text: str) -> str:
    """``text`` under ``ko-std/1``: single blanks, NFC, lower case, no punctuation; may become empty.

    In order: NFC; NFKC character by character except jamo; format characters go; lower case; thousands commas
    go; punctuation and symbols become blanks, except ``%`` and, between two digits, ``. : / - ~``; separators
    and controls become blanks; blanks collapse. Idempotent, and blind to how the input was composed.
    """
    text = nfc(nfc(text).translate(_FOLD))
    text = nfc(text.translate(_VISIBLE).lower())
    text = _THOUSANDS_COMMA.sub("", text)
    return " ".join(_NUMBER_MARK.sub(_between_digits, text.translate(_SPACED)).split())


def without_spaces(text: str) -> str:
    """``text`` without any white space, the unit of the headline CER."""
    return "".join(text.split())


_CJK = (
    "\uac00-\ud7a3\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\ud7b0-\ud7ff"  # Hangul
    "\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff\u31f0-\u31ff"  # Han, kana
)
_WORD = rf"[^\W_{_CJK}]+"
_TOKEN = re.compile(rf"[{_CJK}]|{_WORD}(?:[.,:/%-](?=\d){_WORD})*")
_HANGUL = re.compile("[\uac00-\ud7a3\u1100-\u11ff\u3130-\u318f]")


def mixed_tokens(text: str) -> list[str]:
    """Tokens of ``text`` under ``mixed/1``, after NFC and lower-casing; punctuation is no token.

    Each Hangul, Han or kana character is a token, and so is any other run of word characters, which keeps an
    inner ``. , : / % -`` that a digit follows ("0.5mg", "120/80").
    """
    return _TOKEN.findall(nfc(text).lower())


def has_hangul(text: str) -> bool:
    """Whether ``text`` holds a Hangul syllable or jamo."""
    return _HANGUL.search(text) is not None


_KORQUAD_BLANKS = str.maketrans(dict.fromkeys("'\"《》<>〈〉()‘’", " "))
_KORQUAD_DELETED = str.maketrans("", "", string.punctuation)


def korquad_normalize(text: str) -> str:
    """``text`` under the KorQuAD v1.0 rules, after NFC, which the published script leaves out.

    Quotes and brackets become blanks, then lower case, ASCII punctuation goes, blanks collapse. Full-width
    punctuation stays.
    """
    return " ".join(nfc(text).translate(_KORQUAD_BLANKS).lower().translate(_KORQUAD_DELETED).split())


def respace(reference: str, hypothesis: str) -> str:
    """``hypothesis`` with the word spacing of ``reference`` wherever the two align on equal characters.

    ETRI's rule for KsponSpeech: align the characters without blanks at unit cost and trace back from the end;
    prefer match and substitution, then deletion. A matched character opens a word when its partner does;
    inserted and substituted ones keep their own spacing.

    The costs come from the bit-parallel recurrence of Hyyrö (2003), "A bit-vector algorithm for computing
    Levenshtein and Damerau edit distances": O(len(hypothesis)) steps on integers of len(reference) bits.
    """
    ref, hyp = without_spaces(reference), without_spaces(hypothesis)
    ref_starts, hyp_starts = _word_starts(reference), _word_starts(hypothesis)
    costs = _alignment_bits(ref, hyp)
    opens = [index in hyp_starts for index in range(len(hyp))]
    r, h = len(ref) - 1, len(hyp) - 1
    while r >= 0 and h >= 0:
        same_as_diagonal, one_above_left = costs[h]
        if ref[r] == hyp[h]:
            opens[h] = r in ref_starts
            r, h = r - 1, h - 1
        elif not same_as_diagonal >> r & 1:
            r, h = r - 1, h - 1
        elif one_above_left >> r & 1:
            r -= 1
        else:
            h -= 1
    return "".join(f" {char}" if starts else char for char, starts in zip(hyp, opens, strict=True)).strip()


def _word_starts(text: str) -> set[int]:
    """Positions, in ``text`` without blanks, at which a word begins."""
    return set(accumulate(map(len, text.split()), initial=0))


def _alignment_bits(ref: str, hyp: str) -> list[tuple[int, int]]:
    """The edit distance table, one pair of bit sets for each character of ``hyp``.

    With D[h][r] the distance of the first h and r characters, bit r - 1 of pair h - 1 says whether
    D[h][r] == D[h-1][r-1] and whether D[h][r] == D[h][r-1] + 1.
    """
    places: defaultdict[str, int] = defaultdict(int)
    for index, char in enumerate(ref):
        places[char] |= 1 << index
    mask = (1 << len(ref)) - 1
    plus, minus = mask, 0
    rows = []
    for char in hyp:
        equal = places.get(char, 0)
        diagonal = (((equal & plus) + plus) ^ plus | equal | minus) & mask
        up_plus = (minus | mask ^ (diagonal | plus)) << 1 | 1
        up_minus = (diagonal & plus) << 1
        plus, minus = (up_minus | mask ^ (diagonal | up_plus)) & mask, up_plus & diagonal
        rows.append((diagonal, plus))
    return rows


LOOP_RATIO = 2.4
"""Text that zlib shrinks by more than this loops; Whisper's threshold, which holds for Korean too."""

LOOP_SPAN, LOOP_COUNT = 20, 4
"""An n-gram that fills this many characters with this many repetitions in a row is a loop."""

MAX_NGRAM = 8


def compression_ratio(text: str) -> float:
    """Bytes of ``text`` in UTF-8 over its zlib bytes, as Whisper computes it."""
    data = text.encode("utf-8")
    return len(data) / len(zlib.compress(data))


def max_repeat(text: str, min_count: int = 2) -> int:
    """Characters of the longest span that repetitions of one n-gram, of at most 8 units, fill.

    Args:
        text: the text; its units are characters and then words; a span of words is measured with its blanks.
        min_count: repetitions from which a span counts.
    """
    spans = (*_repeats(text, ""), *_repeats(text.split(), " "))
    return max((span for span, count in spans if count >= min_count), default=0)


def _repeats(units: Sequence[str], separator: str) -> Iterator[tuple[int, int]]:
    """Characters and repetitions of every run of units that equal the unit n places on, for each n."""
    for n in range(1, MAX_NGRAM + 1):
        equal = bytes(map(eq, units, units[n:]))
        for run in re.finditer(b"\x01{%d,}" % n, equal):
            covered = units[run.start() : run.end() + n]
            yield len(separator.join(covered)), len(covered) // n


def loops(text: str) -> bool:
    """Whether a normalised text repeats itself as a decoder that is stuck does."""
    return compression_ratio(text) > LOOP_RATIO or max_repeat(text, LOOP_COUNT) >= LOOP_SPAN
