"""The scored rows of one task, how a prediction differs from its reference, and which edits are the most frequent."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rapidfuzz.distance import Levenshtein

from voxtral_dist.errors import UserError
from voxtral_dist.normalizers import Normalizer
from voxtral_dist.record_scores import ratio_of
from voxtral_dist.scoring import ERROR_RATES, rouge_l_f1
from voxtral_dist.text_norm import without_spaces


@dataclass(frozen=True)
class Row:
    """One scored record.

    Attributes:
        record: as in ``predictions.jsonl``.
        metric: what decides its task.
        numerator, denominator: its part of the corpus metric.
        normalizer: the text rules of the evaluation.
    """

    record: Mapping[str, Any]
    metric: str
    numerator: float
    denominator: float
    normalizer: Normalizer

    @property
    def transcript(self) -> bool:
        """Whether it is a transcript; otherwise an answer."""
        return self.metric in ERROR_RATES

    @property
    def errors(self) -> float:
        """Edits of a transcript; what an answer lacks of a full score."""
        return self.numerator if self.transcript else self.denominator - self.numerator

    @property
    def seconds(self) -> float:
        """Duration of its audio, 0 without."""
        return float(self.record.get("duration") or 0.0)

    @property
    def value(self) -> float | None:
        """Its own metric; None where it has no reference unit."""
        return self.numerator / self.denominator if self.denominator else None

    @property
    def badness(self) -> float:
        """Higher is worse: errors for each reference unit, infinite without one."""
        if self.denominator:
            return self.errors / self.denominator
        return math.inf if self.errors else 0.0

    @property
    def prediction(self) -> str:
        """The predicted text, "" for a missing one."""
        return self.record["prediction"] or ""

    @cached_property
    def reference(self) -> str:
        """The reference it comes closest to, the first of several that are equally close."""
        references: list[str] = self.record["references"]
        if len(references) == 1:
            return references[0]
        return max(references, key=lambda text: rouge_l_f1(text, self.prediction))

    @cached_property
    def overlap(self) -> float:
        """ROUGE-L F1 with that reference, for transcripts too."""
        return rouge_l_f1(self.reference, self.prediction)

    @cached_property
    def ref_norm(self) -> str:
        """That reference, normalised."""
        return self.normalizer(self.reference, self.record["language"])

    @cached_property
    def hyp_norm(self) -> str:
        """The prediction, normalised."""
        return self.normalizer(self.prediction, self.record["language"])

    @cached_property
    def ref_chars(self) -> int:
        """Characters of the normalised reference without blanks."""
        return len(without_spaces(self.ref_norm))


def rows_of(records: Iterable[Mapping[str, Any]], metric: str, normalizer: Normalizer) -> list[Row]:
    """The scored records of one task.

    Raises:
        UserError: a record is not scored by this metric.
    """
    rows = []
    for record in records:
        ratio = ratio_of(record, metric)
        if ratio is None or "flags" not in record["metrics"]:
            raise UserError(
                f"{record['task']} {record['id']!r} has no {metric} or no flags among its metrics; score the "
                "evaluation again with python tools/rescore.py"
            )
        rows.append(Row(record, metric, *ratio, normalizer))
    return rows


def align(reference: str, prediction: str) -> list[tuple[str, str, str]]:
    """The pieces of two normalised texts under the alignment that counts edits, without regard to blanks.

    Returns:
        (``equal``, ``replace``, ``delete`` or ``insert``; the piece of the reference; that of the prediction): put
        together again, the pieces are the two texts with their blanks.
    """
    ref_at, hyp_at = _places(reference), _places(prediction)
    return [
        (
            op.tag,
            reference[ref_at[op.src_start] : ref_at[op.src_end]],
            prediction[hyp_at[op.dest_start] : hyp_at[op.dest_end]],
        )
        for op in Levenshtein.opcodes(without_spaces(reference), without_spaces(prediction))
    ]


def _places(text: str) -> list[int]:
    """Where each character that is no blank stands in ``text``, and its end."""
    return [place for place, char in enumerate(text) if char != " "] + [len(text)]


KINDS = {"replace": "substitutions", "delete": "deletions", "insert": "insertions"}


def frequent_edits(
    texts: Iterable[tuple[str, Sequence[str], Sequence[str]]], most: int
) -> dict[str, list[dict[str, Any]]]:
    """The most frequent substitutions, deletions and insertions.

    Args:
        texts: id, reference and prediction of each row, as characters or as words.
        most: how many of each kind.

    Returns:
        by kind, most frequent first: ``reference`` and ``prediction``, the unit on either side or ""; ``count``;
        ``share`` of all edits of the kind; ``rows`` it occurs in; the id of one of them as ``example``.
    """
    counts: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    rows: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    example: dict[tuple[str, str], str] = {}
    for name, reference, prediction in texts:
        for tag, found in _edits(reference, prediction).items():
            counts[tag].update(found)
            rows[tag].update(found.keys())
            for pair in found:
                example.setdefault(pair, name)
    return {
        kind: [
            {
                "reference": pair[0],
                "prediction": pair[1],
                "count": count,
                "share": count / counts[tag].total(),
                "rows": rows[tag][pair],
                "example": example[pair],
            }
            for pair, count in counts[tag].most_common(most)
        ]
        for tag, kind in KINDS.items()
    }


def _edits(reference: Sequence[str], prediction: Sequence[str]) -> dict[str, Counter[tuple[str, str]]]:
    found: dict[str, Counter[tuple[str, str]]] = {tag: Counter() for tag in KINDS}
    for op in Levenshtein.opcodes(reference, prediction):
        ref, hyp = reference[op.src_start : op.src_end], prediction[op.dest_start : op.dest_end]
        if op.tag == "replace":
            found["replace"].update(zip(ref, hyp, strict=True))
        elif op.tag == "delete":
            found["delete"].update((unit, "") for unit in ref)
        elif op.tag == "insert":
            found["insert"].update(("", unit) for unit in hyp)
    return found
