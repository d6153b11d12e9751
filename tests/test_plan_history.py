"""A run that goes on: the same draws after any stop, and with changed weights, N or data nothing lost or doubled."""

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxtral_dist.errors import UserError
from voxtral_dist.mix import split_draws
from voxtral_dist.plan import GlobalPlan, TaskStream
from voxtral_dist.plan_history import PlanSettings, TaskSource, continue_history, describe, first_history
from voxtral_dist.shares import equal_cost_shares
from voxtral_dist.stages import Stage

Shards = list[int]


def source(tag: int, shards: Shards) -> TaskSource:
    names = [f"{tag}-{number}-{size}" for number, size in enumerate(shards)]
    return TaskSource("abcdefgh"[tag], tag, shards, names, np.empty(0, np.int64))


def start(
    tasks: list[Shards], weights: tuple[int, ...], n: int, draws: int
) -> tuple[GlobalPlan, dict[str, Any]]:
    sources = [source(tag, shards) for tag, shards in enumerate(tasks)]
    plan_settings = PlanSettings((Stage("", Fraction(1), weights),), n, draws)
    segments, generations, _ = first_history(sources, plan_settings)
    plan = GlobalPlan(tuple(s.stream(generations[s.name]) for s in sources), tuple(segments), 5, draws)
    return plan, describe(plan, plan_settings, generations)


def go_on(
    saved: dict[str, Any], step: int, tasks: list[Shards], weights: tuple[int, ...], n: int, draws: int,
    allow: tuple[str, ...] = ("weights", "global_batch", "data"),
) -> tuple[GlobalPlan, dict[str, Any]]:  # fmt: skip
    sources = [source(tag, shards) for tag, shards in enumerate(tasks)]
    plan_settings = PlanSettings((Stage("", Fraction(1), weights),), n, draws)
    segments, generations, _ = continue_history(saved, step, sources, plan_settings, allow)
    plan = GlobalPlan(tuple(s.stream(generations[s.name]) for s in sources), tuple(segments), 5, draws)
    return plan, describe(plan, plan_settings, generations)


def consumed(plan: GlobalPlan, first: int, last: int) -> list[tuple[int, int]]:
    steps = [plan.step(index) for index in range(first, last)]
    return [pair for step in steps for pair in zip(step.tasks.tolist(), step.examples.tolist(), strict=True)]


task_lists = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=4)


@given(task_lists, st.integers(1, 20), st.data())
@settings(deadline=None, max_examples=60)
def test_any_history_consumes_each_task_epoch_once(tasks: list[Shards], n: int, data: st.DataObject) -> None:
    """Weights, N and data change at random stops: every task's own draws stay whole epochs of what was there."""
    weights = tuple(data.draw(st.integers(1, 9)) for _ in tasks)
    plan, saved = start(tasks, weights, n, 10_000)
    drawn, step = [], 0
    populations: list[list[Shards]] = [[list(shards)] for shards in tasks]
    for _ in range(data.draw(st.integers(0, 4))):
        stop = step + data.draw(st.integers(0, 12))
        drawn += consumed(plan, step, stop)
        step = stop
        weights = data.draw(st.sampled_from([weights, tuple(w + 1 for w in reversed(weights))]))
        n = data.draw(st.sampled_from([n, n + 3]))
        grow = data.draw(st.integers(-1, len(tasks) - 1))
        if grow >= 0:
            tasks = [[*shards, 4] if number == grow else shards for number, shards in enumerate(tasks)]
            populations[grow].append(tasks[grow])
        plan, saved = go_on(saved, step, tasks, weights, n, 10_000)
        assert plan.draws_after(step) == len(drawn)
    drawn += consumed(plan, step, step + 15)
    for number in range(len(tasks)):
        mine = Counter(example for task, example in drawn if task == number)
        oldest = sum(populations[number][0])
        counts = [mine[example] for example in range(oldest)]
        assert max(counts) - min(counts) <= 1, "an example of the first shards was lost or doubled"
        assert all(mine[example] <= min(counts) + 1 for example in mine)


@given(task_lists, st.integers(1, 16), st.integers(0, 30), st.integers(0, 30))
@settings(deadline=None, max_examples=60)
def test_a_stop_changes_nothing(tasks: list[Shards], n: int, first_stop: int, second_stop: int) -> None:
    weights = tuple(range(1, len(tasks) + 1))
    plan, saved = start(tasks, weights, n, 10_000)
    again, saved_again = go_on(saved, first_stop, tasks, weights, n, 10_000, allow=())
    last, _ = go_on(saved_again, first_stop + second_stop, tasks, weights, n, 10_000, allow=())
    assert saved_again == saved
    assert consumed(last, 0, 40) == consumed(plan, 0, 40) == consumed(again, 0, 40)
    assert last.digest(3, 8) == plan.digest(3, 8)


def stage_weights(tasks: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Weights of a stage; a task of weight 0 sleeps in it."""
    return st.lists(st.integers(0, 9), min_size=tasks, max_size=tasks).filter(any).map(tuple)


def computed(plan: GlobalPlan, index: int, world_size: int) -> Counter[tuple[int, int]]:
    """What the ranks of a step compute together."""
    step = plan.step(index)
    shares = equal_cost_shares(step, 1 + step.examples % 7, world_size, plan.seed)
    pairs = list(zip(step.tasks.tolist(), step.examples.tolist(), strict=True))
    return Counter(pairs[draw] for share in shares for draw in share.tolist())


@given(task_lists, st.integers(1, 20), st.booleans(), st.data())
@settings(deadline=None, max_examples=60)
def test_kills_and_world_sizes_lose_and_double_nothing(
    tasks: list[Shards], n: int, changes: bool, data: st.DataObject
) -> None:
    """Each life of the run goes on from the last checkpoint, on other ranks and at times with other weights.

    A life that is killed before its first checkpoint leaves no trace. Expected is what :mod:`plan_history` has no
    part in: each task's own draws from the first one on, as many as the splits of the stages that count say.
    """
    weights = data.draw(stage_weights(len(tasks)))
    undisturbed, saved = start(tasks, weights, n, 10_000)
    checkpoint, stages = 0, [(0, weights)]
    kept: dict[int, Counter[tuple[int, int]]] = {}
    for _ in range(data.draw(st.integers(1, 6))):
        weights = (
            data.draw(st.sampled_from([weights, data.draw(stage_weights(len(tasks)))]))
            if changes
            else weights
        )
        plan, described = go_on(
            saved, checkpoint, tasks, weights, n, 10_000, allow=("weights",) if changes else ()
        )
        world_size, interval = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 5))
        killed = checkpoint + data.draw(st.integers(0, 12))
        life = {index: computed(plan, index, world_size) for index in range(checkpoint, killed)}
        written = killed // interval * interval
        if written > checkpoint:
            kept |= {index: pairs for index, pairs in life.items() if index < written}
            stages += [(checkpoint, weights)] if weights != stages[-1][1] else []
            checkpoint, saved = written, described
    edges = [*(first for first, _ in stages), checkpoint]
    own = sum(np.array(split_draws((b - a) * n, w)) for (a, w), b in zip(stages, edges[1:], strict=True))
    expected = Counter(
        (number, example)
        for number, shards in enumerate(tasks)
        for example in TaskStream.of(number, shards).draws(5, 0, int(own[number])).tolist()
    )
    assert sum(kept.values(), Counter()) == expected
    if not changes:
        assert all(pairs == Counter(consumed(undisturbed, i, i + 1)) for i, pairs in kept.items())


@given(task_lists, st.integers(1, 20), st.data())
@settings(deadline=None, max_examples=60)
def test_a_task_that_sleeps_for_a_stage_goes_on_where_it_was(
    tasks: list[Shards], n: int, data: st.DataObject
) -> None:
    weights = data.draw(stage_weights(len(tasks)))
    plan, saved = start(tasks, weights, n, 10_000)
    step = 0
    drawn: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 6))):
        stop = step + data.draw(st.integers(0, 10))
        stage = consumed(plan, step, stop)
        assert not {task for task, _ in stage if not weights[task]}, "a sleeping task was drawn"
        drawn, step, weights = drawn + stage, stop, data.draw(stage_weights(len(tasks)))
        plan, saved = go_on(saved, step, tasks, weights, n, 10_000, allow=("weights",))
    assert consumed(plan, 0, step) == drawn, "the last plan tells the past differently"
    for number, shards in enumerate(tasks):
        mine, size = [example for task, example in drawn if task == number], sum(shards)
        for first in range(0, len(mine), size):
            epoch = mine[first : first + size]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size))


def test_a_finished_run_with_a_short_last_step_takes_new_data() -> None:
    """10 draws in steps of 4: the last step held 2, and still does when the run goes on with 10 more examples."""
    plan, saved = start([[10]], (1,), 4, 10)
    before = consumed(plan, 0, 3)
    longer, _ = go_on(saved, 3, [[10, 10]], (1,), 4, 30)
    assert consumed(longer, 0, 3) == before and [len(longer.step(i)) for i in range(4)] == [4, 4, 2, 4]
    assert longer.draws_after(3) == 10 and longer.num_steps == 8
    drawn = [example for _, example in consumed(longer, 3, 8)]
    assert sorted(drawn) == list(range(20)), "the new shard enters at the next own epoch, which begins here"


def test_the_mix_stays_exact_after_a_change() -> None:
    plan, saved = start([[1000], [1000]], (1, 1), 10, 10_000)
    plan, _ = go_on(saved, 7, [[1000], [1000]], (9, 1), 20, 10_000)
    own = plan.own_draws_after(57)
    assert plan.draws_after(57) == 70 + 50 * 20
    assert abs(own[0] - (35 + 900)) <= 1 and sum(own) == 1070


def test_new_data_enters_at_the_next_own_epoch() -> None:
    plan, saved = start([[10]], (1,), 4, 1000)
    plan, _ = go_on(saved, 3, [[10, 5]], (1,), 4, 1000)
    draws = [example for _, example in consumed(plan, 0, 20)]
    assert max(draws[:20]) < 10, "the second epoch had begun with ten examples"
    assert sorted(draws[20:35]) == list(range(15))


@pytest.mark.parametrize(
    ("tasks", "weights", "n", "words"),
    [
        ([[10]], (1,), 8, "--allow_change global_batch"),
        ([[10, 5]], (1,), 4, "--allow_change data"),
        ([[9]], (1,), 4, "not those this run was made with"),
        ([[5, 10]], (1,), 4, "not those this run was made with"),
    ],
)
def test_a_change_is_refused_with_old_and_new(
    tasks: list[Shards], weights: tuple[int, ...], n: int, words: str
) -> None:
    _, saved = start([[10]], (1,), 4, 1000)
    with pytest.raises(UserError, match=words):
        go_on(saved, 3, tasks, weights, n, 1000, allow=())


def test_changed_weights_are_refused_with_old_and_new() -> None:
    _, saved = start([[10], [10]], (1, 2), 4, 1000)
    with pytest.raises(UserError, match=r"weights \(1, 2\), now it is \(2, 1\).*--allow_change weights"):
        go_on(saved, 3, [[10], [10]], (2, 1), 4, 1000, allow=("data",))


def test_a_shuffled_digest_differs() -> None:
    one, _ = start([[50]], (1,), 4, 1000)
    other, _ = start([[51]], (1,), 4, 1000)
    assert one.digest(0, 8) != other.digest(0, 8)
