"""The likeness of the tasks' gradients: right, the same on any number of ranks, and without a trace in the training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_runs import TASKS, Demo, alone, last, lines, steps, tensors
from harness import run_ranks
from test_engine import digest, make_training, moments

from voxtral_dist import distributed
from voxtral_dist import model as modeling
from voxtral_dist.audio import AudioSpec
from voxtral_dist.collator import Collator
from voxtral_dist.command_line import parse
from voxtral_dist.config import TrainConfig
from voxtral_dist.ds_config import EngineSettings
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import UserError
from voxtral_dist.eval_data import EvalData
from voxtral_dist.gradient_conflict import gradient_conflict, similarity
from voxtral_dist.task_data import open_tasks
from voxtral_dist.tokenizer import TekkenVocabulary

PAIRS = ("asr_sqa", "asr_tqa", "sqa_tqa")
DROPOUT = 0.5  # on in training, so that it shows where it is not off


def open_data(model_dir: str, folders: list[str]) -> EvalData:
    spec = AudioSpec.from_config(modeling.read_config(model_dir))
    collator = Collator(TekkenVocabulary.load(model_dir), spec)
    return EvalData(open_tasks(folders, collator), collator, 128)


def reference(model_dir: str, data: EvalData) -> dict[str, torch.Tensor]:
    """Per task the gradient of the mean target token's loss by one backward pass over all rows at once."""
    out = {}
    for name in TASKS:
        training = make_training(model_dir, dropout=DROPOUT).eval()
        (batch,) = data.loss_batches([name], 0, 1, 100, 16)
        result = training(batch)
        (result.loss / result.task_tokens.sum()).backward()
        trained = [p for p in training.parameters() if p.requires_grad]
        out[name] = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]
        )
    return out


def state(engine: TrainEngine) -> list[Any]:
    """Everything that the next step depends on."""
    gradients = [p.grad is None for _, p in engine.named_parameters]
    return [digest(engine), moments(engine), torch.get_rng_state().sum().item(), all(gradients)]


def story(rank: int, model_dir: str, folders: list[str]) -> dict[str, Any]:
    """The likeness before, between and after two steps, and those steps without it."""
    data, names = open_data(model_dir, folders), list(TASKS)
    out: dict[str, Any] = {}
    for asked in (False, True):
        training = make_training(model_dir, dropout=DROPOUT)
        if asked:  # recomputed layers give the same bits
            modeling.checkpoint_layers(training.voxtral)
        engine = TrainEngine(training, EngineSettings(max_grad_norm=0.0))
        for number in range(2):
            batches = list(data.loss_batches(names, rank, distributed.world_size(), 4, 4))
            before = state(engine)
            if asked:
                calls: list[int] = []
                layer = training.voxtral.model.language_model.layers[0].self_attn
                handle = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
                out[f"values {number}"] = gradient_conflict(engine, data, names)
                handle.remove()
                out["calls"] = len(calls)
                out["untouched"] = state(engine) == before and not training.training
                out["eval mode"] = not any(module.training for module in training.modules())
            engine.train_step(batches, 1e-2)
        out[f"end {asked}"] = state(engine)[:2]
    twin = copy.copy(data.tasks[0])
    twin.name = "sqa"
    data.tasks[1] = twin
    out["twins"] = gradient_conflict(engine, data, ["asr", "sqa"])
    out["one"] = gradient_conflict(engine, data, ["asr"])
    out["no dev data"] = gradient_conflict(engine, EvalData(data.tasks[:1], data.collator, 128), names)
    return out


@pytest.fixture(scope="module")
def folders(demo: Demo) -> list[str]:
    return [str(demo.folder / "shards" / task / "dev") for task in TASKS]


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["one rank", "two ranks"]
)
def told(request: pytest.FixtureRequest, demo: Demo, folders: list[str]) -> list[dict[str, Any]]:
    return run_ranks(story, request.param, str(demo.model), folders)


def test_the_likeness_is_that_of_the_whole_gradients(
    told: list[dict[str, Any]], demo: Demo, folders: list[str]
) -> None:
    gradients = reference(str(demo.model), open_data(str(demo.model), folders))
    expected = {}
    for pair in PAIRS:
        a, b = (gradients[name].double() for name in pair.split("_"))
        expected[f"interference/cosine_{pair}"] = float(a @ b / a.norm() / b.norm())
        expected[f"interference/magnitude_{pair}"] = float(2 * a.norm() * b.norm() / (a @ a + b @ b))
    for rank in told:
        assert rank["values 0"] == pytest.approx(expected, abs=1e-5)
        assert rank["values 1"] != pytest.approx(expected, abs=1e-3), "the weights moved"
    assert told[0] == told[-1]
    cosines = [expected[f"interference/cosine_{pair}"] for pair in PAIRS]
    assert max(cosines) - min(cosines) > 0.05 and max(map(abs, cosines)) < 0.95, "a test that cannot tell"


def test_it_leaves_no_trace(told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert rank["untouched"] and rank["eval mode"]
        assert rank["end True"] == rank["end False"], "another training came out"


def test_layers_are_recomputed_where_training_recomputes_them(told: list[dict[str, Any]]) -> None:
    """Else a model that trains only with --grad_ckpt would not fit: 8 rows of 3 tasks, forward and once more."""
    assert {rank["calls"] for rank in told} == {2 * 24 // len(told)}


def test_identical_tasks_are_alike_and_others_are_left_aside(told: list[dict[str, Any]]) -> None:
    values = {"interference/cosine_asr_sqa": 1.0, "interference/magnitude_asr_sqa": 1.0}
    assert told[0]["twins"] == pytest.approx(values, abs=1e-6)
    assert told[0]["one"] == told[0]["no dev data"] == {}


def test_likeness_of_vectors() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([-4.0, 3.0])
    assert similarity(a, b) == (0.0, 1.0)
    assert similarity(a, -2 * a) == pytest.approx((-1.0, 0.8))
    assert similarity(a, 0 * a) == (None, 0.0)
    assert similarity(0 * a, 0 * a) == (None, None)


def test_it_needs_dev_data() -> None:
    flags = ["--model_id", "m", "--output_dir", "o", "--train_shards", "s", "--grad_conflict_steps", "5"]
    with pytest.raises(UserError, match="--grad_conflict_steps 5 compares the tasks on dev examples"):
        parse(TrainConfig, flags, "train.py")
    assert parse(TrainConfig, [*flags, "--val_shards", "v"], "train.py").grad_conflict_steps == 5


@pytest.mark.slow
def test_a_run_with_the_flag_trains_the_same_bits(demo: Demo, tmp_path: Path) -> None:
    alone(demo.flags(tmp_path / "plain"), tmp_path / "plain")
    alone(demo.flags(tmp_path / "asked", "--grad_conflict_steps", "3"), tmp_path / "asked")
    expected, found = tensors(tmp_path / "plain"), tensors(tmp_path / "asked")
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    tags = {f"interference/{kind}_{pair}" for kind in ("cosine", "magnitude") for pair in PAIRS}
    logged = {line["step"]: line for line in lines(tmp_path / "asked") if tags <= line.keys()}
    assert set(logged) == {3, 6} and len(steps(tmp_path / "asked")) == 8
    assert last(tmp_path / "asked").is_dir()
    assert all(-1 <= line[tag] <= 1 for line in logged.values() for tag in tags)
