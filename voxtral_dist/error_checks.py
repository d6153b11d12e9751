"""Rows that fail in a known way, and rows whose text is nearly right but may mean something else.

A check takes a row and says in a few words what is wrong with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from voxtral_dist import text_checks
from voxtral_dist.error_rows import Row
from voxtral_dist.scoring import TOO_LONG
from voxtral_dist.text_norm import without_spaces

Check = Callable[[Row], str | None]
"""What is wrong with a row in a few words, maybe none; None where nothing is."""

TOO_SHORT = 0.5
"""Share of its reference's characters below which a text has lost a part."""

NEAR_MISS = 0.8
"""ROUGE-L of an answer from which a missed exact match is a near miss."""

SIMILAR = 0.5
"""ROUGE-L from which two texts say the same thing but for a number or a negation."""


def _flag(name: str) -> Check:
    return lambda row: "" if name in row.record["metrics"]["flags"] else None


def _times(row: Row, reference: str) -> float:
    """Characters of the prediction over those of a reference, of at least one."""
    ref = without_spaces(row.normalizer(reference, row.record["language"]))
    return len(without_spaces(row.hyp_norm)) / max(1, len(ref))


def _too_long(row: Row) -> str | None:
    times = min(_times(row, reference) for reference in row.record["references"])
    return f"{times:.1f} times as long" if times > TOO_LONG else None


def _too_short(row: Row) -> str | None:
    times = _times(row, row.reference)
    return f"{times:.2f} times as long" if row.hyp_norm and times < TOO_SHORT else None


def _hit_max(row: Row) -> str | None:
    tokens = row.record.get("n_new_tokens")
    return (f"{tokens} tokens" if tokens else "") if row.record.get("hit_max") else None


def _wrong_script(row: Row) -> str | None:
    record = row.record
    return text_checks.wrong_script(record["references"], row.prediction, record["language"]) or None


def _echo(row: Row) -> str | None:
    return "" if text_checks.echoes(row.record["prompt"], row.record["references"], row.prediction) else None


FAILURES: dict[str, Check] = {
    "missing": _flag("missing"),
    "empty": _flag("empty_hyp"),
    "hallucination": _flag("hallucination"),
    "loop": _flag("loop"),
    "hit_max": _hit_max,
    "too_long": _too_long,
    "too_short": _too_short,
    "wrong_script": _wrong_script,
    "echo": _echo,
}


def _near_miss(row: Row) -> str | None:
    return "" if not row.record["metrics"]["em"] and row.overlap >= NEAR_MISS else None


def _numbers(row: Row) -> str | None:
    missing, extra = text_checks.differing_numbers(row.reference, row.prediction)
    similar = row.overlap >= SIMILAR
    if not ((missing and extra) or (similar and (missing or extra))):
        return None
    return f"{', '.join(missing) or 'none'} → {', '.join(extra) or 'none'}"


def _negation(row: Row) -> str | None:
    ref, hyp = text_checks.negated(row.reference), text_checks.negated(row.prediction)
    if ref == hyp or row.overlap < SIMILAR:
        return None
    return "only in the reference" if ref else "only in the prediction"


def _buried(row: Row) -> str | None:
    return "" if text_checks.buried(row.reference, row.prediction) else None


CHECKS: dict[str, Check] = {"negation": _negation, "numbers": _numbers}
"""What may change the meaning of a text that is otherwise right."""

ANSWER_CHECKS: dict[str, Check] = {**CHECKS, "near_miss": _near_miss, "buried": _buried}


def failures(rows: Sequence[Row], most: int) -> dict[str, dict[str, Any]]:
    """The rows that each of :data:`FAILURES` finds, those with the most errors first, at most ``most`` of each."""
    return {name: _found(rows, check, most, lambda row: -row.errors) for name, check in FAILURES.items()}


def checks(rows: Sequence[Row], most: int) -> dict[str, dict[str, Any]]:
    """The rows that each of :data:`CHECKS` finds, or :data:`ANSWER_CHECKS`, the most similar texts first."""
    asked = CHECKS if rows[0].transcript else ANSWER_CHECKS
    return {name: _found(rows, check, most, lambda row: -row.overlap) for name, check in asked.items()}


def _found(rows: Sequence[Row], check: Check, most: int, order: Callable[[Row], float]) -> dict[str, Any]:
    hits = [(row, detail) for row in rows if (detail := check(row)) is not None]
    listed = sorted(hits, key=lambda hit: order(hit[0]))[:most]
    return {
        "n": len(hits),
        "share": len(hits) / len(rows),
        "domains": dict(sorted(Counter(row.record["domain"] for row, _ in hits).items())),
        "rows": [
            {
                "id": row.record["id"],
                "domain": row.record["domain"],
                "reference": row.reference,
                "prediction": row.record["prediction"],
                "detail": detail,
            }
            for row, detail in listed
        ],
    }
