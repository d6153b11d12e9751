"""Scores of prediction records: per task, with confidence intervals, and per language and domain.

A record is one line of ``predictions.jsonl``. Everything here is recomputed from its texts alone, so a laptop without
torch gets the numbers of the evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from voxtral_dist import ngram_scores, scoring, significance
from voxtral_dist.normalizers import get_normalizer
from voxtral_dist.scoring import ERROR_RATES, Metrics
from voxtral_dist.tasks import get_task
from voxtral_dist.text_norm import NORMALIZER

Record = Mapping[str, Any]

RATIOS = {
    "cer": ("edits", "ref_len"),
    "cer_spaced": ("spaced_edits", "spaced_len"),
    "wer": ("word_edits", "word_len"),
    "swer": ("swer_edits", "word_len"),
    **{name: (name, "") for name in ("rouge_l_f1", "em", "korquad_em", "korquad_f1")},
}
"""Fields of a record's ``metrics`` whose sums make a corpus metric: numerator, denominator; "": 1 a record."""

GROUP_FIELDS = ("language", "domain")

TRIALS, NGRAM_TRIALS = 10_000, 1_000
"""Resamples of our bootstrap, and of sacrebleu's."""

DIGITS = 6
"""Decimals of an interval: the last bits of a resampled sum depend on the machine."""


def cluster(record: Record) -> str:
    """What is resampled together with this record: those of its speaker, else of its document, else it alone."""
    for field in ("speaker", "document"):
        if record.get(field):
            return f"{field}:{record[field]}"
    return f"row:{record['task']}/{record['id']}"


def ratio_of(record: Record, metric: str) -> tuple[float, float] | None:
    """Numerator and denominator of one record; their sums over a task make the corpus metric.

    Args:
        record: with ``metrics``.
        metric: a name of :data:`RATIOS`.

    Returns:
        None where the record's task does not have this metric, or it is no ratio of sums (BLEU, chrF2).
    """
    numerator, denominator = RATIOS.get(metric, ("", ""))
    values = record["metrics"]
    if numerator not in values:
        return None
    return float(values[numerator]), float(values[denominator]) if denominator else 1.0


def by_task(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each task, in their order."""
    members: dict[str, list[Record]] = {}
    for record in records:
        members.setdefault(record["task"], []).append(record)
    return members


def score_records(records: Sequence[dict[str, Any]], normalizer: str = NORMALIZER) -> Metrics:
    """Score every record, and the tasks; each record also gets its own ``metrics``.

    Args:
        records: lines of ``predictions.jsonl``.
        normalizer: name of the rule of CER, WER, exact match and the flags.

    Returns:
        ``tasks``: what :func:`task_metrics` returns for each; what :func:`scoring.aggregate` returns of them;
        ``normalizer``.

    Raises:
        UserError: there is no such normaliser or task.
    """
    rule = get_normalizer(normalizer)
    for record in records:
        language = record.get("language", "")

        def prepare(text: str, language: str = language) -> str:
            return rule(text, language)

        if get_task(record["task"]).metric in ERROR_RATES:
            record["metrics"] = scoring.sample_asr(record["references"][0], record["prediction"], prepare)
        else:
            record["metrics"] = scoring.sample_qa(record["references"], record["prediction"], prepare)
    tasks = {name: task_metrics(name, members) for name, members in by_task(records).items()}
    return {"tasks": tasks, **scoring.aggregate(tasks), "normalizer": normalizer}


def task_metrics(task: str, records: Sequence[Record]) -> Metrics:
    """Corpus metrics of records that have their ``metrics``.

    Returns:
        Of a task whose metric is an error rate what :func:`scoring.pool_asr` returns, of another one what
        :func:`scoring.pool_qa` and :func:`ngram_scores.corpus_ngrams` return; and ``hit_max_rate``, the share of
        predictions that ended because they reached the longest allowed, None where it is not recorded.
    """
    samples = [record["metrics"] for record in records]
    if get_task(task).metric in ERROR_RATES:
        pooled = scoring.pool_asr(samples)
    else:
        pooled = scoring.pool_qa(samples) | ngram_scores.corpus_ngrams(*_texts(records))
    ends = [bool(record["hit_max"]) for record in records if record.get("hit_max") is not None]
    return pooled | {"hit_max_rate": sum(ends) / len(ends) if ends else None}


def _texts(records: Sequence[Record]) -> tuple[list[list[str]], list[str | None]]:
    return [record["references"] for record in records], [record["prediction"] for record in records]


def intervals(records: Sequence[Record], metrics: Mapping[str, Any]) -> Metrics:
    """95 % intervals of the corpus metrics by resampling clusters of records; see :mod:`voxtral_dist.significance`.

    The metrics of a task share their resamples. ``macro`` resamples each task on its own. BLEU has
    sacrebleu's own interval, which resamples single records; chrF2 has none.

    Args:
        records: with ``metrics``.
        metrics: what :func:`score_records` returned of them.

    Returns:
        Task -> metric -> [low, high], ``macro`` -> [low, high], ``clusters`` -> task -> how many there are. A metric
        that is undefined, or a task of one cluster, has none; nor has ``macro`` when a task has none.
    """
    result: Metrics = {}
    goodness, counts = [], {}
    for number, (task, members) in enumerate(by_task(records).items()):
        labels = [cluster(record) for record in members]
        counts[task] = len(set(labels))
        rates = _resampled(members, labels, number) if counts[task] > 1 else {}
        ends = {name: significance.percentile_interval(values) for name, values in rates.items()}
        result[task] = {name: _rounded(interval) for name, interval in ends.items() if interval}
        result[task] |= _bleu_interval(members, metrics["tasks"][task])
        decides = get_task(task).metric
        if decides in rates:
            goodness.append(scoring.goodness(decides, rates[decides]))
    macro = None
    if len(goodness) == len(counts) and metrics["macro"] is not None:
        macro = significance.percentile_interval(np.mean(goodness, axis=0))
    return result | {"clusters": counts} | ({"macro": _rounded(macro)} if macro else {})


def _rounded(interval: Sequence[float]) -> list[float]:
    return [round(float(end), DIGITS) for end in interval]


def _resampled(members: Sequence[Record], labels: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Each ratio metric that the task has, in every resample."""
    names = [name for name in RATIOS if ratio_of(members[0], name) is not None]
    pairs = np.array([[ratio_of(record, name) for name in names] for record in members])
    rates = significance.bootstrap_rates(pairs[..., 0], pairs[..., 1], labels, trials=TRIALS, seed=seed)
    return dict(zip(names, rates.T, strict=True))


def _bleu_interval(members: Sequence[Record], metrics: Mapping[str, Any]) -> Metrics:
    """sacrebleu's interval of BLEU, where it is defined: of samples, not clusters."""
    if metrics.get("bleu") is None:
        return {}
    scores = ngram_scores.corpus_bleu(*_texts(members), metrics["bleu_tokenizer"], trials=NGRAM_TRIALS)
    return {"bleu": _rounded(scores["bleu_interval"])}


def groups(records: Sequence[Record]) -> Metrics:
    """The corpus metrics of each language and each domain.

    Args:
        records: with ``metrics``.

    Returns:
        ``language`` and ``domain``, each only if the records have more than one -> value -> task -> what
        :func:`task_metrics` returns.
    """
    result: Metrics = {}
    for field in GROUP_FIELDS:
        values = sorted({str(record.get(field) or "") for record in records})
        if len(values) > 1:
            result[field] = {value: _group(records, field, value) for value in values}
    return result


def _group(records: Sequence[Record], field: str, value: str) -> Metrics:
    members = by_task([record for record in records if (record.get(field) or "") == value])
    return {task: task_metrics(task, part) for task, part in members.items()}
