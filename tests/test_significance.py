"""Paired tests over clusters: resamples by their definition, chunks, ties, few clusters; goldens in test_golden.py."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from voxtral_dist import significance
from voxtral_dist.significance import (
    bootstrap_interval,
    bootstrap_rates,
    holm,
    mapsswe,
    mcnemar_exact,
    paired,
)


def counts(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors of A, of B and reference lengths of n samples."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 6, n), rng.integers(0, 5, n), rng.integers(5, 30, n)


@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_resamples_are_one_draw_of_indices_however_they_are_cut(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    errors, _, lengths = counts(23)
    drawn = np.random.default_rng(5).integers(0, 23, (40, 23))
    expected = errors[drawn].sum(axis=1) / lengths[drawn].sum(axis=1)
    monkeypatch.setattr(significance, "CHUNK", chunk)
    np.testing.assert_allclose(bootstrap_rates(errors, lengths, trials=40, seed=5), expected, rtol=1e-12)
    both = np.stack([errors, lengths], axis=1), np.stack([lengths, lengths], axis=1)
    rates = bootstrap_rates(*both, trials=40, seed=5)
    np.testing.assert_allclose(rates, np.stack([expected, np.ones(40)], axis=1), rtol=1e-12)


def test_clusters_are_resampled_whole_whatever_the_order_of_the_rows() -> None:
    errors, _, lengths = counts(30)
    labels = [f"speaker:{number % 7}" for number in range(30)]
    sums = [[values[number::7].sum() for number in range(7)] for values in (errors, lengths)]
    expected = bootstrap_rates(*sums, trials=50, seed=1)
    np.testing.assert_allclose(bootstrap_rates(errors, lengths, labels, trials=50, seed=1), expected)
    shuffled = np.random.default_rng(9).permutation(30)
    again = errors[shuffled], lengths[shuffled], [labels[number] for number in shuffled]
    np.testing.assert_allclose(bootstrap_rates(*again, trials=50, seed=1), expected)
    with pytest.raises(ValueError, match="2 clusters for 30 samples"):
        bootstrap_rates(errors, lengths, [1, 2], trials=5, seed=1)


def test_the_interval_is_that_of_the_normal_law_for_a_large_sample() -> None:
    hits, ones = np.arange(800) % 4 == 0, np.ones(800)
    low, high = bootstrap_interval(hits, ones) or (0, 0)
    margin = 1.96 * math.sqrt(0.25 * 0.75 / 800)
    assert (low, high) == pytest.approx((0.25 - margin, 0.25 + margin), abs=0.002)
    wider = bootstrap_interval(hits, ones, level=0.99) or (0, 0)
    assert wider[0] < low and wider[1] > high
    blocks = bootstrap_interval(np.sort(hits), ones, np.arange(800) // 20) or (0, 0)
    assert blocks[1] - blocks[0] > 3 * (high - low)


def test_an_undefined_interval_is_none() -> None:
    assert bootstrap_interval([], []) is None
    assert bootstrap_interval([1, 2], [0, 0]) is None
    assert bootstrap_interval([1, 2], [3, 4], ["a", "a"]) is None
    assert bootstrap_interval([1, 2], [3, 4], ["a", "b"]) is not None


def test_resamples_without_a_reference_unit_do_not_count() -> None:
    rates = bootstrap_rates([1, 1], [0, 4], trials=200, seed=0)
    assert np.isnan(rates).any() and set(rates[~np.isnan(rates)]) == {0.25, 0.5}
    assert bootstrap_interval([1, 1], [0, 4]) == (0.25, 0.5)
    result = paired([1, 1], [0, 0], [0, 4], lower_is_better=True)
    assert (result.low, result.high, result.probability_of_improvement) == (0.25, 0.5, 1.0)


def test_a_test_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="sum to 0"):
        paired([1], [0], [0], lower_is_better=True)
    with pytest.raises(ValueError, match="2 samples and 1 denominators"):
        paired([1, 2], [0, 1], [3], lower_is_better=True)


def test_turning_a_and_b_round_turns_the_difference_and_no_more() -> None:
    a, b, lengths = counts(60)
    there = paired(a, b, lengths, lower_is_better=True, trials=500)
    back = paired(b, a, lengths, lower_is_better=True, trials=500)
    assert there.difference == -back.difference == pytest.approx((a - b).sum() / lengths.sum())
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.p_value == back.p_value
    assert there.low < there.difference < there.high


def test_the_improvement_is_of_b_over_a_in_the_metrics_own_direction() -> None:
    worse, better, one = np.ones(40), np.zeros(40), np.ones(40)
    assert paired(worse, better, one, lower_is_better=True, trials=50).probability_of_improvement == 1.0
    assert paired(worse, better, one, lower_is_better=False, trials=50).probability_of_improvement == 0.0
    assert paired(better, worse, one, lower_is_better=False, trials=50).probability_of_improvement == 1.0
    assert paired(worse, worse, one, lower_is_better=True, trials=50).probability_of_improvement == 0.0


def enumerated(change: Any) -> float:
    signs = np.array(list(itertools.product((1, -1), repeat=len(change))))
    return float(np.mean(np.abs(signs @ np.array(change)) >= abs(sum(change))))


def test_sums_that_are_equal_but_for_rounding_are_ties() -> None:
    whole = [1, 2, -3, 4, 5, 6, -7, 1, 2]
    tenths = [value / 10 for value in whole]
    result = paired(tenths, [0] * 9, [1] * 9, lower_is_better=False, trials=10)
    assert result.exact and result.p_value == enumerated(whole)
    assert paired(whole, [0] * 9, [1] * 9, lower_is_better=False, trials=10).p_value == enumerated(whole)


def test_clusters_without_a_difference_change_no_p_and_keep_it_exact() -> None:
    change = [3, -1, 2, 2, 5]
    few = paired(change, [0] * 5, [9] * 5, lower_is_better=True, trials=10)
    many = paired(change + [0] * 500, [0] * 505, [9] * 505, lower_is_better=True, trials=10)
    assert few.p_value == many.p_value == enumerated(change) and few.exact and many.exact
    assert few.warning and not many.warning
    same = paired([1, 2], [1, 2], [9, 9], lower_is_better=True, trials=10)
    assert (same.p_value, same.exact, same.difference) == (1.0, True, 0.0)


def test_a_draw_of_sign_vectors_comes_near_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    b = rng.integers(1, 9, 20)
    a = b + rng.choice([-3, -2, 1, 2, 3], 20)
    drawn = paired(a, b, [20] * 20, lower_is_better=True, seed=1)
    monkeypatch.setattr(significance, "FEW_CLUSTERS", 21)
    exact = paired(a, b, [20] * 20, lower_is_better=True, trials=10)
    assert exact.exact and not drawn.exact
    error = math.sqrt(exact.p_value * (1 - exact.p_value) / 10_000)
    assert abs(drawn.p_value - exact.p_value) < 4 * error + 1e-4


def test_a_drawn_p_counts_itself_and_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = paired([9] * 50, [0] * 50, [9] * 50, lower_is_better=True, trials=99)
    assert (clear.p_value, clear.exact) == (0.01, False)
    a, b, lengths = counts(80)
    whole = paired(a, b, lengths, lower_is_better=True, trials=300)
    monkeypatch.setattr(significance, "CHUNK", 1000)
    assert paired(a, b, lengths, lower_is_better=True, trials=300).p_value == pytest.approx(
        whole.p_value, abs=0.1
    )


@pytest.mark.parametrize(("clusters", "floor"), [(4, "0.125"), (1, "1"), (19, "3.81e-06"), (20, "")])
def test_few_clusters_are_warned_of(clusters: int, floor: str) -> None:
    a, b, lengths = counts(60)
    result = paired(a, b, lengths, np.arange(60) % clusters, lower_is_better=True, trials=50)
    assert result.clusters == clusters
    if floor:
        assert result.exact and f"only {clusters} cluster" in result.warning
        assert "trust the exact test" in result.warning and f"below {floor}" in result.warning
    else:
        assert result.warning == ""


def test_segments_that_do_not_spread_have_no_usual_z() -> None:
    assert mapsswe([], []) == mapsswe([3], [1]) == mapsswe([1, 2, 3], [1, 2, 3]) == (0.0, 1.0)
    assert mapsswe([1, 2], [2, 3]) == (-math.inf, 0.0)
    z, p = mapsswe([5, 1, 4, 0], [1, 1, 1, 1])
    back = mapsswe([1, 1, 1, 1], [5, 1, 4, 0])
    assert (z, p) == (-back[0], back[1]) and z > 0


def test_mcnemar_of_few_and_of_many_pairs() -> None:
    assert mcnemar_exact(0, 0) == mcnemar_exact(4, 4) == mcnemar_exact(5, 4) == 1.0
    assert mcnemar_exact(0, 5) == mcnemar_exact(5, 0) == 2 / 32
    assert mcnemar_exact(20_000, 20_500) == pytest.approx(
        math.erfc((500 - 1) / math.sqrt(40_500) / math.sqrt(2)), rel=1e-3
    )


def test_holm_steps_down_and_keeps_the_order() -> None:
    assert holm([]) == [] and holm([0.3]) == [0.3]
    assert holm([0.9, 0.01, 0.6]) == pytest.approx([1.0, 0.03, 1.0])
    assert holm([0.02, 0.02]) == [0.04, 0.04]


def test_a_hundred_thousand_rows_take_little_memory() -> None:
    a, b, lengths = counts(100_000)
    tracemalloc.start()
    paired(a, b, lengths, lower_is_better=True, trials=60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
