"""The curriculum: what it may say, where its edges fall, what the learning rate does there, how it is resumed."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxtral_dist.errors import UserError
from voxtral_dist.plan import GlobalPlan
from voxtral_dist.plan_history import PlanSettings, TaskSource, continue_history, describe, first_history
from voxtral_dist.schedule import Schedule
from voxtral_dist.stages import Stage, parse_stages

TASKS = ["asr", "sqa", "tqa"]
ROOT = Path(__file__).resolve().parents[1]
SHORT = "text:0.2:tqa=1; listen:0.3:asr=2,tqa=1; all:0.5:1.0,1.5,1.2"


def sources() -> list[TaskSource]:
    none = np.empty(0, np.int64)
    return [TaskSource(name, tag, [50, 7], [f"{tag}a", f"{tag}b"], none) for tag, name in enumerate(TASKS)]


def plan_of(plan_settings: PlanSettings) -> GlobalPlan:
    segments, generations, total = first_history(sources(), plan_settings)
    streams = tuple(source.stream(generations[source.name]) for source in sources())
    return GlobalPlan(streams, tuple(segments), 0, total)


def test_file_and_flag_say_the_same() -> None:
    expected = (
        Stage("text", Fraction(1, 5), (0, 0, 1)),
        Stage("listen", Fraction(1, 2), (2, 0, 1)),
        Stage("all", Fraction(1), (10, 15, 12)),
    )
    assert parse_stages(SHORT, TASKS, ()) == expected
    assert parse_stages(str(ROOT / "launch/stages.example.yaml"), TASKS, ()) == expected
    assert parse_stages("", TASKS, (1, 2, 3)) == (Stage("", Fraction(1), (1, 2, 3)),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:0.5:asr=1", "add up to 0.5"),
        ("a:0.5:asr=1; a:0.5:tqa=1", "a name of its own"),
        ("a:0:asr=1; b:1:tqa=1", r"share 0 of stage a is not in \(0, 1\]"),
        ("a:x:asr=1; b:1:tqa=1", "share x of stage a"),
        ("a:1:mt=1", "no training data for 'mt'"),
        ("a:1", "is not NAME:SHARE:WEIGHTS"),
        ("missing.yaml", "missing.yaml cannot be read"),
    ],
)
def test_bad_stages_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_stages(text, TASKS, ())


@pytest.mark.parametrize("text", ["stages: 3", "steps: []", "stages: [{name: a, share: 1}]", "stages: [a]"])
def test_bad_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=r"--stages .*s\.yaml"):
        parse_stages(str(tmp_path / "s.yaml"), TASKS, ())


def test_edges_are_rounded_to_steps_and_sleepers_sleep() -> None:
    plan = plan_of(PlanSettings(parse_stages(SHORT, TASKS, ()), 8, 400))
    assert [(s.start_step, s.start_draw, s.stage) for s in plan.segments] == [
        (0, 0, 0),
        (10, 80, 1),
        (25, 200, 2),
    ]
    assert {int(task) for i in range(10) for task in plan.step(i).tasks} == {2}
    assert {int(task) for i in range(10, 25) for task in plan.step(i).tasks} == {0, 2}
    assert {int(task) for i in range(25, 50) for task in plan.step(i).tasks} == {0, 1, 2}
    assert plan.own_draws_after(25) == (80, 0, 120)
    assert plan.stage_draws(12) == (80, 200) and plan.stage_draws(30) == (200, 400)


def test_a_stage_without_a_step_is_refused() -> None:
    with pytest.raises(UserError, match="stage all is shorter than a step"):
        plan_of(PlanSettings(parse_stages("text:0.9:tqa=1; all:0.1:1,1,1", TASKS, ()), 4, 7))
    with pytest.raises(UserError, match="stage text is shorter than a step"):
        plan_of(PlanSettings(parse_stages("text:0.01:tqa=1; all:0.99:1,1,1", TASKS, ()), 8, 100))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 16), st.integers(0, 60), st.data())
@settings(deadline=None, max_examples=60)
def test_resuming_in_any_stage_changes_nothing(
    parts: list[int], n: int, step: int, data: st.DataObject
) -> None:
    weights = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any).map(tuple)
    ends = np.cumsum(parts).tolist()
    stages = tuple(
        Stage(str(number), Fraction(end, ends[-1]), data.draw(weights)) for number, end in enumerate(ends)
    )
    plan_settings = PlanSettings(stages, n, 0, max_steps=10 * ends[-1])
    plan = plan_of(plan_settings)
    assert plan.num_steps == 10 * ends[-1]
    assert [s.start_step for s in plan.segments] == [0, *(10 * end for end in ends[:-1])]
    _, generations, _ = first_history(sources(), plan_settings)
    saved = describe(plan, plan_settings, generations)
    step = min(step, plan.num_steps)
    segments, again, total = continue_history(saved, step, sources(), plan_settings, ())
    assert (tuple(segments), again, total) == (plan.segments, generations, plan.total_draws)


def test_changed_stages_are_refused_with_both_and_can_be_allowed() -> None:
    before = PlanSettings(parse_stages(SHORT, TASKS, ()), 8, 400)
    _, generations, _ = first_history(sources(), before)
    saved = describe(plan_of(before), before, generations)
    after = PlanSettings(parse_stages("text:0.2:tqa=1; all:0.8:1,1,1", TASKS, ()), 8, 400)
    with pytest.raises(UserError, match=r"stages text until 1/5 .*, now it is .*--allow_change weights"):
        continue_history(saved, 12, sources(), after, ())
    segments, _, _ = continue_history(saved, 12, sources(), after, ("weights",))
    assert [(s.start_step, s.weights) for s in segments] == [
        (0, (0, 0, 1)), (10, (2, 0, 1)), (12, (1, 1, 1)),
    ]  # fmt: skip
    assert segments[-1].offsets == segments[1].own_draws(96)
    bigger = PlanSettings(before.stages, 16, 400)
    segments, _, _ = continue_history(saved, 12, sources(), bigger, ("global_batch",))
    assert [(s.start_step, s.start_draw) for s in segments] == [(0, 0), (10, 80), (12, 96), (18, 192)]


def test_learning_rate_over_run_and_stages() -> None:
    plan = plan_of(PlanSettings(parse_stages(SHORT, TASKS, ()), 8, 400))
    run = Schedule(1.0, 0.1, False, 4)
    rates = [run.rate(plan, step) for step in range(50)]
    assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.9)
    assert max(rates) == pytest.approx(1.0, abs=0.01) and rates[-1] < 0.001
    plain = Schedule(1.0, 0.1)
    back = [rates[step] / plain.rate(plan, step) for step in range(50)]
    assert back[9:15] == pytest.approx([1, 0.2, 0.4, 0.6, 0.8, 1]) and back[25] == pytest.approx(0.2)
    per_stage = [Schedule(1.0, 0.1, True).rate(plan, step) for step in range(50)]
    assert per_stage[9] < 0.05 and per_stage[24] < 0.02 and per_stage[49] < 0.01
    assert max(per_stage[10:25]) > 0.97 and max(per_stage[25:]) > 0.97
