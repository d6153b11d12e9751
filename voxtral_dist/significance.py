"""Whether two systems differ on the same samples: paired tests over clusters, from per-sample counts.

A corpus metric is sum(numerator) / sum(denominator); every test recomputes it. Samples of one speaker or one document
are not independent, so clusters are resampled and swapped, not samples. Where there are few clusters the bootstrap
is too sure of itself (on 4 speakers its interval excludes 0 while the exact test says p = 0.125): below
:data:`FEW_CLUSTERS` the permutation test is exact and :attr:`Paired.warning` says to trust it alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEW_CLUSTERS = 20
"""Below this the bootstrap is not to be trusted, and all sign vectors are enumerated."""

CHUNK = 2_000_000
"""Resampled entries held at once: about 50 MB."""

TIE = 1e-9
"""Share of the largest possible statistic by which sums of one value may differ in floating point."""

Labels = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Paired:
    """System A against system B on the same samples.

    Attributes:
        difference: of the corpus metric, A - B.
        low, high: 95 % percentile interval of the paired bootstrap (Bisani & Ney 2004).
        probability_of_improvement: share of the resamples in which B is better than A.
        p_value: two-sided, of swapping A and B per cluster.
        exact: whether ``p_value`` is from all sign vectors; otherwise from a random draw of them.
        clusters: how many there are.
        warning: what to make of few clusters, else "".
    """

    difference: float
    low: float
    high: float
    probability_of_improvement: float
    p_value: float
    exact: bool
    clusters: int
    warning: str


def cluster_sums(values: Labels, clusters: Labels | None) -> np.ndarray:
    """``values`` [n, ...] summed within clusters: float64 [k, ...], clusters in the order of their labels.

    Args:
        values: one row per sample.
        clusters: a label per sample, equal ones belong together; None: every sample is its own cluster.

    Raises:
        ValueError: there are more of one than of the other.
    """
    rows = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return rows
    if len(clusters) != len(rows):
        raise ValueError(f"{len(clusters)} clusters for {len(rows)} samples")
    _, codes = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((codes.max(initial=-1) + 1, *rows.shape[1:]))
    np.add.at(sums, codes, rows)
    return sums


def _resampled_sums(sums: np.ndarray, trials: int, seed: int) -> Iterator[np.ndarray]:
    """Sums of ``len(sums)`` rows of [k, m] drawn with replacement, [b, m] at a time, ``trials`` in all.

    The draws are those of ``default_rng(seed).integers(0, k, (trials, k))``, however they are cut into chunks.
    """
    rng, k = np.random.default_rng(seed), len(sums)
    at_once = max(1, CHUNK // k)
    for done in range(0, trials, at_once):
        size = min(at_once, trials - done)
        drawn = rng.integers(0, k, (size, k), dtype=np.int32)
        drawn += np.arange(0, size * k, k, dtype=np.int32)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * k).reshape(size, k) @ sums


def bootstrap_rates(
    numerators: Labels, denominators: Labels, clusters: Labels | None = None, *, trials: int, seed: int
) -> np.ndarray:
    """sum(numerator) / sum(denominator) of each resample of the clusters.

    Args:
        numerators, denominators: [n], or [n, m] for m metrics of the same samples, which share the resamples.
        clusters: see :func:`cluster_sums`.
        trials: resamples B.
        seed: of the draw.

    Returns:
        float64 [B] or [B, m]; NaN where a resample has no reference unit.
    """
    num, den = cluster_sums(numerators, clusters), cluster_sums(denominators, clusters)
    both = np.concatenate([num.reshape(len(num), -1), den.reshape(len(den), -1)], axis=1)
    sums = np.concatenate(list(_resampled_sums(both, trials, seed)))
    top, bottom = np.split(sums, 2, axis=1)
    rates = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
    return rates.reshape(trials, *num.shape[1:])


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """The middle ``level`` of resampled values; None where no resample has one."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    num: Labels,
    den: Labels,
    clusters: Labels | None = None,
    *,
    trials: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile interval of sum(num) / sum(den) by resampling clusters.

    Args:
        num, den: of each sample, [n].
        clusters: see :func:`cluster_sums`.
        trials: resamples.
        seed: of the draw.
        level: coverage. It is only nominal, and too high, where there are fewer than :data:`FEW_CLUSTERS` clusters.

    Returns:
        None where the metric is undefined, or where a single cluster says nothing about others.
    """
    if len(cluster_sums(den, clusters)) < 2 or np.sum(den) <= 0:
        return None
    return percentile_interval(bootstrap_rates(num, den, clusters, trials=trials, seed=seed), level)


def paired(
    num_a: Labels,
    num_b: Labels,
    den: Labels,
    clusters: Labels | None = None,
    *,
    lower_is_better: bool,
    trials: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Compare A with B, whose numerators stand over the same denominators.

    Args:
        num_a, num_b: of each sample, [n].
        den: of each sample, [n].
        clusters: see :func:`cluster_sums`.
        lower_is_better: whether the metric is an error rate.
        trials: resamples, and sign vectors where not all are tried.
        seed: of both draws.

    Raises:
        ValueError: the denominators sum to nothing, or the lengths differ.
    """
    change = np.asarray(num_a, dtype=np.float64) - np.asarray(num_b, dtype=np.float64)
    if len(change) != len(den) or np.sum(den) <= 0:
        raise ValueError(f"{len(change)} samples and {len(den)} denominators that sum to {np.sum(den)}")
    rates = bootstrap_rates(change, den, clusters, trials=trials, seed=seed)
    rates = rates[~np.isnan(rates)]
    low, high = np.quantile(rates, [0.025, 0.975])
    per_cluster = cluster_sums(change, clusters)
    p_value, exact = _swap_test(per_cluster, trials, seed)
    return Paired(
        difference=float(change.sum() / np.sum(den)),
        low=float(low),
        high=float(high),
        probability_of_improvement=float(np.mean(rates > 0 if lower_is_better else rates < 0)),
        p_value=p_value,
        exact=exact,
        clusters=len(per_cluster),
        warning=few_clusters(len(per_cluster)),
    )


def few_clusters(clusters: int) -> str:
    """What to make of this many clusters: "" where there are enough of them."""
    if clusters >= FEW_CLUSTERS:
        return ""
    return (
        f"only {clusters} cluster{'s' * (clusters != 1)}: the bootstrap interval is too narrow, trust the exact test; "
        f"its p cannot be below {2.0 ** (1 - clusters):.3g}"
    )


def _swap_test(differences: np.ndarray, trials: int, seed: int) -> tuple[float, bool]:
    """Two-sided p of |sum s d| >= |sum d| over sign vectors s, and whether all of them were tried.

    Clusters without a difference do not matter and are left out. A draw counts itself: p = (1 + hits) / (1 + trials).
    """
    d = differences[differences != 0]
    least = abs(d.sum()) - TIE * np.abs(d).sum()
    if len(d) < FEW_CLUSTERS:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= least)), True
    rng, at_once, hits = np.random.default_rng(seed), max(1, CHUNK // len(d)), 0
    for done in range(0, trials, at_once):
        swapped = rng.integers(0, 2, (min(at_once, trials - done), len(d)), dtype=np.int8)
        hits += int(np.count_nonzero(np.abs(d.sum() - 2 * (swapped @ d)) >= least))
    return (1 + hits) / (1 + trials), False


def mapsswe(errors_a: Labels, errors_b: Labels) -> tuple[float, float]:
    """z and two-sided p of the matched-pairs test of Gillick & Cox (1989), as NIST's ``sc_stats`` computes it.

    z = mean(d) / (sd(d) / sqrt(n)) with the sample deviation of d = A - B per segment. With utterances for segments,
    as here, it is an approximation: it knows nothing of speakers.

    Returns:
        (0, 1) where A and B differ nowhere or there are fewer than two segments; z is infinite where all differ alike.
    """
    d = np.asarray(errors_a, dtype=np.float64) - np.asarray(errors_b, dtype=np.float64)
    if len(d) < 2 or not d.any():
        return 0.0, 1.0
    deviation = d.std(ddof=1)
    z = d.mean() / (deviation / math.sqrt(len(d))) if deviation else math.copysign(math.inf, d[0])
    return float(z), math.erfc(abs(z) / math.sqrt(2))


def mcnemar_exact(b: int, c: int) -> float:
    """Exact two-sided McNemar p: the binomial test of min(b, c) in b + c at one half; 1.0 without a discordant pair.

    Args:
        b: samples that A alone has right.
        c: samples that B alone has right.
    """
    n, term, tail = b + c, 1, 1
    for k in range(min(b, c)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p values, in the order given."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
