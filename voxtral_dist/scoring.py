"""Scores of predictions: CER, WER and sWER of transcripts; ROUGE-L, exact match, F1, BLEU and chrF2 of answers.

``sample_asr`` and ``sample_qa`` score one prediction; the corpus functions pool what they return and count
nothing again. Rates are sums of edits over sums of reference units, never means of rates. A hypothesis of
``None`` stands for a prediction that is missing: it scores as an empty one and is never dropped. An undefined
metric is ``None``. Texts are compared under the rules of :mod:`voxtral_dist.text_norm`. A task whose metric is
one of :data:`ERROR_RATES` is scored as a transcript, every other one as an answer.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jiwer
import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein

from voxtral_dist.ngram_scores import corpus_ngrams
from voxtral_dist.tasks import get_task
from voxtral_dist.text_norm import (
    compression_ratio,
    korquad_normalize,
    loops,
    mixed_tokens,
    normalize,
    respace,
    without_spaces,
)

Metrics = dict[str, Any]
"""Names and JSON values."""

Rule = Callable[[str], str]
"""A normaliser with its language given."""

ERROR_RATES = ("cer", "cer_spaced", "wer", "swer")
"""Metrics of a transcript that can decide, of which less is better; not bounded above."""

SCALES = {"rouge_l_f1": 1, "em": 1, "korquad_em": 1, "korquad_f1": 1, "bleu": 100, "chrf": 100}
"""Metrics of an answer that can decide, of which more is better, with the value of a perfect one."""

TOO_LONG = 2.0
"""A hypothesis of more than this many times its reference's characters is flagged."""


def _length_ratio(refs: Sequence[str], hyp: str) -> float:
    """Characters of the hypothesis over those of the longest reference or 1, blanks not counted."""
    return len(without_spaces(hyp)) / max(1, *(len(without_spaces(ref)) for ref in refs))


def _behaviour(raw: Sequence[str], refs: Sequence[str], hyp: str, missing: bool) -> Metrics:
    """How the model behaved, whatever the task; ``refs`` and ``hyp`` are normalised, ``raw`` are the references.

    ``length_ratio``; ``compression_ratio`` of the hypothesis; ``flags``, what is peculiar about the prediction.
    ``empty_ref``: no reference has text; ``ref_vanished``: one had before normalisation;
    ``hallucination``: ``empty_ref`` and yet a hypothesis; ``empty_hyp``: the reverse, from a prediction that
    is there; ``missing``: no prediction; ``loop``: the hypothesis loops and no reference does; ``too_long``: it
    has more than :data:`TOO_LONG` times the characters of every reference.
    """
    empty_ref, ratio = not any(refs), _length_ratio(refs, hyp)
    found = {
        "empty_ref": empty_ref,
        "ref_vanished": empty_ref and any(text.strip() for text in raw),
        "hallucination": empty_ref and bool(hyp),
        "empty_hyp": not (empty_ref or hyp or missing),
        "missing": missing,
        "loop": loops(hyp) and not any(map(loops, refs)),
        "too_long": ratio > TOO_LONG,
    }
    return {
        "length_ratio": round(ratio, 4),
        "compression_ratio": round(compression_ratio(hyp), 4),
        "flags": [name for name, holds in found.items() if holds],
    }


def sample_asr(reference: str, hypothesis: str | None, rule: Rule = normalize) -> Metrics:
    """Score one transcript.

    Args:
        reference: what was said.
        hypothesis: what was predicted.
        rule: prepares both.

    Returns:
        ``cer``, ``None`` where the reference is empty and the hypothesis is not, since a count is no rate; of
        the texts without blanks ``S``, ``D``, ``I``, their sum ``edits``, and ``ref_len``, all in characters;
        ``spaced_edits`` and ``spaced_len`` with blanks as characters; ``word_edits``, ``swer_edits`` and
        ``word_len`` in words; ``length_ratio``, ``compression_ratio`` and ``flags`` of :func:`_behaviour`.
    """
    ref, hyp = rule(reference), rule(hypothesis or "")
    chars = jiwer.process_characters(without_spaces(ref), without_spaces(hyp))
    edits, ref_len = _edits(chars), len(without_spaces(ref))
    return {
        "cer": edits / ref_len if ref_len else None if edits else 0.0,
        "edits": edits,
        "ref_len": ref_len,
        "S": chars.substitutions,
        "D": chars.deletions,
        "I": chars.insertions,
        "spaced_edits": Levenshtein.distance(ref, hyp),
        "spaced_len": len(ref),
        "word_edits": _edits(jiwer.process_words(ref, hyp)),
        "swer_edits": _edits(jiwer.process_words(ref, respace(ref, hyp))),
        "word_len": len(ref.split()),
        **_behaviour([reference], [ref], hyp, hypothesis is None),
    }


def _edits(counted: jiwer.CharacterOutput | jiwer.WordOutput) -> int:
    return counted.substitutions + counted.deletions + counted.insertions


def _rate(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _flagged(samples: Sequence[Mapping[str, Any]], flag: str) -> int:
    return sum(flag in sample["flags"] for sample in samples)


_ASR_COUNTS = (
    *("edits", "ref_len", "S", "D", "I"),
    *("spaced_edits", "spaced_len", "word_edits", "swer_edits", "word_len"),
)


def pool_asr(samples: Iterable[Mapping[str, Any]]) -> Metrics:
    """Corpus metrics from the results of :func:`sample_asr`.

    Returns:
        ``cer`` (the headline, without blanks), ``cer_spaced``, ``wer``, ``swer``, ``sub_rate``, ``del_rate``,
        ``ins_rate``: edits over reference units, not clipped, ``None`` when every reference is empty;
        ``edits``, ``substitutions``, ``deletions``, ``insertions``, ``ref_len``: characters without blanks;
        ``n``: utterances; ``ser``: the share of them with an edit; ``empty_ref_hallucination_rate``: the share
        with a hypothesis among those with an empty reference; and what :func:`_pool_behaviour` returns.
    """
    rows = list(samples)
    total = {key: sum(row[key] for row in rows) for key in _ASR_COUNTS}
    return {
        "n": len(rows),
        "cer": _rate(total["edits"], total["ref_len"]),
        "cer_spaced": _rate(total["spaced_edits"], total["spaced_len"]),
        "wer": _rate(total["word_edits"], total["word_len"]),
        "swer": _rate(total["swer_edits"], total["word_len"]),
        "edits": total["edits"],
        "ref_len": total["ref_len"],
        "substitutions": total["S"],
        "deletions": total["D"],
        "insertions": total["I"],
        "sub_rate": _rate(total["S"], total["ref_len"]),
        "del_rate": _rate(total["D"], total["ref_len"]),
        "ins_rate": _rate(total["I"], total["ref_len"]),
        "ser": _rate(sum(row["edits"] > 0 for row in rows), len(rows)),
        "empty_ref_hallucination_rate": _rate(_flagged(rows, "hallucination"), _flagged(rows, "empty_ref")),
        **_pool_behaviour(rows),
    }


def _pool_behaviour(rows: Sequence[Mapping[str, Any]]) -> Metrics:
    """``loop_rate``, ``too_long_rate``, ``empty_rate``: the share of samples with a loop, a hypothesis that is too
    long, an empty one for a reference with text; ``max_compression_ratio``: of the hypotheses; ``missing``: how many
    predictions were not there."""
    flags = {"loop_rate": "loop", "too_long_rate": "too_long", "empty_rate": "empty_hyp"}
    return {
        **{name: _rate(_flagged(rows, flag), len(rows)) for name, flag in flags.items()},
        "max_compression_ratio": max((row["compression_ratio"] for row in rows), default=None),
        "missing": _flagged(rows, "missing"),
    }


def score_asr(references: Sequence[str], hypotheses: Sequence[str | None]) -> Metrics:
    """Corpus metrics of transcripts, see :func:`pool_asr`.

    Raises:
        ValueError: there are more of one than of the other.
    """
    return pool_asr(sample_asr(ref, hyp) for ref, hyp in zip(references, hypotheses, strict=True))


def rouge_l_f1(reference: str, hypothesis: str) -> float:
    """ROUGE-L F1 = 2 LCS / (|r| + |h|) over ``mixed/1`` tokens; 1.0 when neither side has a token."""
    ref, hyp = mixed_tokens(reference), mixed_tokens(hypothesis)
    if not ref and not hyp:
        return 1.0
    return 2 * LCSseq.similarity(ref, hyp) / (len(ref) + len(hyp))


def _character_f1(reference: str, hypothesis: str) -> float:
    """F1 of the two multisets of characters, blind to order and blanks; 1.0 when both are empty.

    KorQuAD v1.0's F1 but for the last rule: its script gives 0 to two empty answers, which match exactly.
    """
    ref, hyp = Counter(without_spaces(reference)), Counter(without_spaces(hypothesis))
    if not ref and not hyp:
        return 1.0
    return 2 * (ref & hyp).total() / (ref.total() + hyp.total())


def sample_qa(references: Sequence[str], hypothesis: str | None, rule: Rule = normalize) -> Metrics:
    """Score one answer: each metric is its own best over the references, of which there is at least one.

    Args:
        references: the accepted answers.
        hypothesis: what was predicted.
        rule: prepares both for ``em`` and the flags; the other metrics have rules of their own.

    Returns:
        ``rouge_l_f1``, ``em`` (equality under ``rule``), ``korquad_em``, ``korquad_f1``: each in [0, 1];
        ``length_ratio``, ``compression_ratio`` and ``flags`` of :func:`_behaviour`.
    """
    hyp = hypothesis or ""
    refs, norm_hyp = [rule(ref) for ref in references], rule(hyp)
    korquad_refs, korquad_hyp = [korquad_normalize(ref) for ref in references], korquad_normalize(hyp)
    return {
        "rouge_l_f1": max(rouge_l_f1(ref, hyp) for ref in references),
        "em": int(norm_hyp in refs),
        "korquad_em": int(korquad_hyp in korquad_refs),
        "korquad_f1": max(_character_f1(ref, korquad_hyp) for ref in korquad_refs),
        **_behaviour(references, refs, norm_hyp, hypothesis is None),
    }


def pool_qa(samples: Iterable[Mapping[str, Any]]) -> Metrics:
    """Corpus metrics from the results of :func:`sample_qa`: means over the ``n`` samples, and what
    :func:`_pool_behaviour` returns."""
    rows = list(samples)
    names = ("rouge_l_f1", "em", "korquad_em", "korquad_f1")
    return {
        "n": len(rows),
        **{name: _rate(sum(row[name] for row in rows), len(rows)) for name in names},
        **_pool_behaviour(rows),
    }


def score_qa(references: Sequence[Sequence[str]], hypotheses: Sequence[str | None]) -> Metrics:
    """Corpus metrics of answers, see :func:`pool_qa` and :func:`~voxtral_dist.ngram_scores.corpus_ngrams`.

    Raises:
        ValueError: there are more of one than of the other.
    """
    samples = [sample_qa(refs, hyp) for refs, hyp in zip(references, hypotheses, strict=True)]
    return pool_qa(samples) | corpus_ngrams(references, hypotheses)


def scores_beside(metric: str) -> tuple[str, ...]:
    """The metrics that a task with this deciding one has and that could decide too."""
    return ERROR_RATES if metric in ERROR_RATES else tuple(SCALES)


def goodness(metric: str, value: Any) -> Any:
    """A metric, or an array of its values, on [0, 1], higher is better: 1 - min(1, rate), or value / scale."""
    return 1.0 - np.minimum(1.0, value) if metric in ERROR_RATES else value / SCALES[metric]


def task_score(task_name: str, metrics: Mapping[str, Any]) -> float | None:
    """The :func:`goodness` of the task's deciding metric; ``None`` where it is undefined.

    Raises:
        UserError: there is no such task.
    """
    metric = get_task(task_name).metric
    return None if metrics[metric] is None else float(goodness(metric, metrics[metric]))


def aggregate(metrics: Mapping[str, Mapping[str, Any]]) -> Metrics:
    """Summaries over tasks, from the corpus metrics of each.

    Returns:
        ``scores``: :func:`task_score` by task; ``undefined``: the tasks without one, and if there are any, or
        no task at all, the rest is ``None``; ``macro``: the plain mean; ``weighted``: the mean weighted by
        ``n`` samples; ``balance``: lowest over highest, 1 when all are 0; ``gap``: highest less lowest;
        ``std``: of the population; ``jain``: (sum s)^2 / (k sum s^2) (Jain et al. 1984), 1 when all are 0.
    """
    scores = {name: task_score(name, values) for name, values in metrics.items()}
    known = [score for score in scores.values() if score is not None]
    result: Metrics = {"scores": scores, "undefined": [name for name in scores if scores[name] is None]}
    if len(known) < len(scores) or not known:
        return result | dict.fromkeys(("macro", "weighted", "balance", "gap", "std", "jain"))
    sizes = [values["n"] for values in metrics.values()]
    low, high = min(known), max(known)
    return result | {
        "macro": statistics.fmean(known),
        "weighted": sum(n * score for n, score in zip(sizes, known, strict=True)) / sum(sizes),
        "balance": low / high if high else 1.0,
        "gap": high - low,
        "std": statistics.pstdev(known),
        "jain": sum(known) ** 2 / (len(known) * sum(score**2 for score in known)) if high else 1.0,
    }
