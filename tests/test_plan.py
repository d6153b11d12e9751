"""The plan: exact mix, permutations, step contents that do not depend on the ranks, equal-cost shares."""

import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import VoxtralConfig

from voxtral_dist.errors import UserError
from voxtral_dist.micro_batches import Caps, cut
from voxtral_dist.mix import parse_task_caps, parse_weights, split_draws
from voxtral_dist.plan import GlobalPlan, Step, TaskStream
from voxtral_dist.shares import CostModel, equal_cost_shares, share_balance


def small_plan(
    sizes: list[list[int]], weights: list[int] | None = None, n: int = 8, draws: int = 100, seed: int = 0
) -> GlobalPlan:
    streams = tuple(TaskStream.of(tag, shards) for tag, shards in enumerate(sizes))
    return GlobalPlan.single(streams, weights or [1] * len(sizes), seed, n, draws)


def pairs(step: Step) -> list[tuple[int, int]]:
    return sorted(zip(step.tasks.tolist(), step.examples.tolist(), strict=True))


@given(st.integers(0, 10**12), st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any))
@settings(max_examples=500)
@example(5, [5, 1, 1, 5])
def test_mix_is_exact_for_ever(count: int, weights: list[int]) -> None:
    split = split_draws(count, weights)
    awake = sum(weight > 0 for weight in weights)
    bound = {1: 0.5, 2: 1.0, 3: 1.0, 4: 1.25}.get(awake, 1 + math.log(awake) / 2)
    assert sum(split) == count and not any(part for part, w in zip(split, weights, strict=True) if not w)
    error = max(abs(Fraction(count * w, sum(weights)) - part) for part, w in zip(split, weights, strict=True))
    assert error <= bound
    grown = zip(split, split_draws(count + 1, weights), strict=True)
    assert sorted(after - before for before, after in grown)[-2:] in ([1], [0, 1])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any), st.integers(0, 2**63), st.data())
@settings(deadline=None)
def test_every_task_epoch_is_a_permutation(sizes: list[int], seed: int, data: st.DataObject) -> None:
    total = sum(sizes)
    accepted = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total).filter(any)))
    stream = TaskStream.of(1, sizes, np.flatnonzero(~accepted))
    expected = np.flatnonzero(accepted).tolist()
    for epoch in range(3):
        draws = stream.draws(seed, epoch * len(stream), (epoch + 1) * len(stream)).tolist()
        assert sorted(draws) == expected
    cuts = sorted({0, 3 * len(stream), *data.draw(st.lists(st.integers(0, 3 * len(stream)), max_size=5))})
    parts = [stream.draws(seed, a, b) for a, b in pairwise(cuts)]
    assert np.concatenate(parts).tolist() == stream.draws(seed, 0, 3 * len(stream)).tolist()


def test_epochs_differ_and_shards_mix() -> None:
    stream = TaskStream.of(0, [50] * 4)
    first, second = stream.draws(0, 0, 200).tolist(), stream.draws(0, 200, 400).tolist()
    assert first != second and first != sorted(first)
    assert len({example // 50 for example in first[:20]}) > 1


@given(st.integers(1, 64), st.integers(1, 40), st.integers(0, 1000))
@settings(deadline=None)
def test_any_world_size_consumes_the_same_draws(world_size: int, n: int, seed: int) -> None:
    plan = small_plan([[7, 1, 20], [5], [30, 30]], [3, 5, 4], n=n, draws=90, seed=seed)
    costs = np.random.default_rng(seed).integers(1, 1000, 1000)
    consumed = []
    for index in range(plan.num_steps):
        step = plan.step(index)
        shares = equal_cost_shares(step, costs[: len(step)], world_size, seed)
        assert len(shares) == world_size
        assert sorted(np.concatenate(shares).tolist()) == list(range(len(step)))
        consumed += pairs(step)
    whole = GlobalPlan.single(plan.streams, plan.segments[0].weights, seed, 90, 90).step(0)
    assert sorted(consumed) == pairs(whole)


@given(st.integers(2, 64), st.data(), st.integers(0, 1000))
@settings(deadline=None)
def test_fewer_draws_than_ranks_leave_ranks_empty(world_size: int, data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(1, world_size - 1))
    plan = small_plan([[7, 1, 20], [30, 30]], [3, 5], n=n, draws=4 * n, seed=seed)
    for index in range(plan.num_steps):
        step = plan.step(index)
        shares = equal_cost_shares(step, 1 + step.examples, world_size, seed)
        assert sorted(map(len, shares)) == [0] * (world_size - n) + [1] * n
        assert sorted(np.concatenate(shares).tolist()) == list(range(n))


def test_a_step_is_random_access() -> None:
    plan = small_plan([[10, 10], [4]], [2, 1], n=6, draws=600)
    in_order = [pairs(plan.step(index)) for index in range(100)]
    fresh = small_plan([[10, 10], [4]], [2, 1], n=6, draws=600)
    assert [pairs(fresh.step(index)) for index in (99, 3, 57)] == [in_order[99], in_order[3], in_order[57]]


def test_last_step_is_short() -> None:
    plan = small_plan([[100]], n=8, draws=20)
    assert plan.num_steps == 3
    assert [len(plan.step(index)) for index in range(3)] == [8, 8, 4]
    assert plan.draws_after(3) == 20


def test_golden_digest() -> None:
    """The order of a run that was started with an earlier version must never change."""
    plan = small_plan([[100] * 30, [17, 3, 80], [55]], [10, 15, 12], n=64, draws=64 * 50, seed=7)
    digest = hashlib.sha256()
    for index in range(plan.num_steps):
        step = plan.step(index)
        share = equal_cost_shares(step, 1 + step.examples % 97, 8, 7)[3]
        digest.update(step.tasks.astype("<i8").tobytes() + step.examples.astype("<i8").tobytes())
        digest.update(share.astype("<i8").tobytes())
    assert digest.hexdigest() == GOLDEN


GOLDEN = "4421a98045429da80f60f1c2cf36996b8297e709b6cea9cd547937dd160554e5"


def lognormal_costs(n: int) -> list[np.ndarray]:
    """Costs of ``n`` examples per task, with the lengths of read speech, spoken questions and text answers."""
    rng = np.random.default_rng(0)
    seconds = np.clip(rng.lognormal(1.9, 0.65, n), 0.5, 30), np.clip(rng.lognormal(3.1, 0.8, n), 2, 180)
    chunks = [np.ceil(s / 30).astype(np.int64) for s in seconds] + [np.zeros(n, np.int64)]
    answers = np.clip(rng.lognormal(4.6, 0.9, n), 5, 1500) + np.clip(rng.lognormal(4.3, 1.0, n), 10, 2000)
    text = [seconds[0] * 3.5 + 11, np.clip(rng.lognormal(3.3, 0.7, n), 4, 500) + 30, answers]
    tokens = [375 * c + t.astype(np.int64) for c, t in zip(chunks, text, strict=True)]
    return [CostModel().cost(t, c, np.zeros(n, np.int64)) for t, c in zip(tokens, chunks, strict=True)]


def lognormal_steps(n: int, steps: int) -> Iterator[tuple[Step, np.ndarray]]:
    """Steps of ``n`` draws of three tasks, and what each draw costs."""
    costs = np.stack(lognormal_costs(100_000))
    plan = small_plan([[100_000]] * 3, [10, 15, 12], n=n, draws=n * steps)
    for index in range(steps):
        step = plan.step(index)
        yield step, costs[step.tasks, step.examples]


@pytest.mark.parametrize(
    ("world_size", "per_rank", "steps", "least"),
    [(8, 8, 20, 0.99), (8, 32, 20, 0.998), (64, 18, 20, 0.996), (1024, 16, 4, 0.995)],
)
def test_shares_cost_the_same(world_size: int, per_rank: int, steps: int, least: float) -> None:
    balances = [
        share_balance(equal_cost_shares(step, cost, world_size, 0), cost)
        for step, cost in lognormal_steps(world_size * per_rank, steps)
    ]
    assert np.mean(balances) >= least


@pytest.mark.parametrize(("world_size", "per_rank"), [(8, 8), (3, 7)])
def test_ranks_get_the_same_number_of_examples_in_the_long_run(world_size: int, per_rank: int) -> None:
    """In 1,000 steps the ranks' counts differ by less than 5%."""
    counts = np.zeros(world_size, np.int64)
    for step, cost in lognormal_steps(world_size * per_rank, 1000):
        counts += [len(share) for share in equal_cost_shares(step, cost, world_size, 0)]
    assert counts.sum() == 1000 * world_size * per_rank
    assert counts.max() < 1.05 * counts.min()


def test_no_rank_always_gets_the_largest() -> None:
    plan = small_plan([[1000]], n=5, draws=1000)
    costs = np.array([100, 1, 1, 1, 1])
    largest = [
        next(rank for rank, share in enumerate(equal_cost_shares(plan.step(i), costs, 4, 0)) if 0 in share)
        for i in range(200)
    ]
    assert min(np.bincount(largest, minlength=4)) > 25


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50)), max_size=40),
    st.integers(1, 8),
    st.integers(1, 200),
    st.booleans(),
)
def test_micro_batches_keep_their_caps(
    rows: list[tuple[int, int]], most_rows: int, most_tokens: int, packed: bool
) -> None:
    tasks, lengths = (np.array([row[i] for row in rows], np.int64) for i in range(2))
    batches = cut(tasks, lengths, Caps(most_rows, most_tokens, {1: 2}, packed))
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(rows)))
    for batch in batches:
        assert (tasks[batch] == 1).sum() <= 2 and (packed or len(batch) <= most_rows)
        size = lengths[batch].sum() if packed else len(batch) * lengths[batch].max()
        assert len(batch) == 1 or size <= most_tokens
    dearer = cut(tasks, lengths, Caps(most_rows, most_tokens, {1: 2}, packed, overhead=10**6))
    assert len(dearer) <= len(batches)
    assert sorted(i for batch in dearer for i in batch.tolist()) == list(range(len(rows)))


@pytest.mark.parametrize(("overhead", "count"), [(5, 4), (15, 2), (1000, 1)])
def test_padding_is_weighed_against_micro_batches(overhead: int, count: int) -> None:
    lengths = np.array([100, 90, 60, 50])
    assert len(cut(np.zeros(4, np.int64), lengths, Caps(4, 1000, overhead=overhead))) == count


@pytest.mark.parametrize(
    ("text", "weights"),
    [("1.0,1.5,1.2", (10, 15, 12)), ("tqa=2, asr=1,sqa=1", (1, 1, 2)), ("", (1, 2, 3)), ("2,2,2", (1, 1, 1))],
)
def test_weights(text: str, weights: tuple[int, ...]) -> None:
    assert parse_weights(text, ["asr", "sqa", "tqa"], [10, 20, 30]) == weights


@pytest.mark.parametrize(
    "text", ["1,2", "1,2,3,4", "1,-2,3", "1,nan,3", "1,inf,3", "1,0,3", "1,x,3", "asr=1,sqa=2", "asr=1,b=2"]
)
def test_bad_weights_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--task_weights"):
        parse_weights(text, ["asr", "sqa", "tqa"], [1, 1, 1])


def test_task_caps() -> None:
    assert parse_task_caps("asr=4, tqa=8", ["asr", "tqa"]) == {"asr": 4, "tqa": 8}
    for bad in ("asr", "asr=0", "asr=x", "sqa=1"):
        with pytest.raises(UserError, match="--task_batch_sizes"):
            parse_task_caps(bad, ["asr", "tqa"])


def test_cost_model_counts_the_flops_of_the_released_models() -> None:
    """Per token of 4 x 3.133 GFLOP, all but the last MLP: 2.274 + 0.038 TFLOP a chunk (torch's FlopCounter), 0.861
    MFLOP a squared token."""
    mini = CostModel.from_config(VoxtralConfig())
    assert mini.chunk == pytest.approx(1000 * 2.312e12 / 12.533e9, rel=1e-3)
    assert mini.squared_tokens_per_million == pytest.approx(1e9 * 0.861e6 / 12.533e9, rel=1e-3)
    assert mini.label == pytest.approx(CostModel().label, rel=0.01)
    sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split()
    small = dict(zip(sizes, (5120, 32768, 40, 32, 8, 128), strict=True)) | {
        "model_type": "llama",
        "vocab_size": 131072,
    }
    assert CostModel.from_config(VoxtralConfig(text_config=small)).chunk == pytest.approx(27_069, rel=1e-3)
