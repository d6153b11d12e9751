"""Engine truth on two real ranks: skipped steps, loss norms, equal replicas, Adam's state across restarts and sizes.

One spawn of two ranks runs the whole story of :func:`two_ranks`; the tests look at what it brought back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, run_ranks
from test_gradient import SMOOTHING, make_examples, relative_errors
from test_model import tuned

from voxtral_dist import model as modeling
from voxtral_dist import optimizer_state
from voxtral_dist.audio import AudioSpec
from voxtral_dist.batch import MicroBatch
from voxtral_dist.collator import Collator, Example
from voxtral_dist.ds_config import EngineSettings, build_ds_config
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import UserError
from voxtral_dist.step_sums import StepResult
from voxtral_dist.tokenizer import TekkenVocabulary

RATE = 1e-3
SHARES = [[[0, 1], [3]], [[7], [2, 6], [4], [5]]]
"""Examples by rank and micro-batch; 7 cannot be read."""
TWO_TASKS = [[[0, 1]], [[2, 6], [5]]]
"""The same without speech recognition, one of the run's three tasks."""
NORMS = {"examples": SHARES, "tasks": TWO_TASKS}
"""Loss norms and the step they are tried on; tests/test_gradient.py looks at tokens."""


def make_training(model_dir: str, **lora: Any) -> modeling.TrainingModel:
    return modeling.TrainingModel(tuned(Path(model_dir), **lora), 3, SMOOTHING)


def make_collator(model_dir: str) -> Collator:
    spec = AudioSpec.from_config(modeling.read_config(model_dir))
    return Collator(TekkenVocabulary.load(model_dir), spec)


def make_step(collator: Collator, loss_norm: str = "tokens") -> list[Example]:
    """Seven good examples, weighted as ``loss_norm`` asks, and one that cannot be read."""
    examples = make_examples(collator.spec)
    lengths = [target_length(collator, e) for e in examples]
    totals = [sum(n for n, e in zip(lengths, examples, strict=True) if e.task == t) for t in range(3)]
    values = {
        "tokens": [1.0 for _ in lengths],
        "examples": [1 / n for n in lengths],
        "tasks": [1 / totals[e.task] for e in examples],
    }[loss_norm]
    weighted = [dataclasses.replace(e, weight=w) for e, w in zip(examples, values, strict=True)]
    return [*weighted, dataclasses.replace(examples[3], weight=0.0, key="7", error="no audio")]


def target_length(collator: Collator, example: Example) -> int:
    return len(collator.vocabulary.encode(example.sample.target)) + 1


def micro_batches(collator: Collator, examples: list[Example], groups: list[list[int]]) -> list[MicroBatch]:
    return [collator.train_batch([examples[i] for i in group], group[0]) for group in groups]


def digest(engine: TrainEngine) -> str:
    """Of every bit of the trained parameters."""
    whole = hashlib.sha256()
    for _, parameter in engine.named_parameters:
        whole.update(parameter.detach().numpy().tobytes())
    return whole.hexdigest()


def moments(engine: TrainEngine) -> list[Any]:
    """Adam's step count and a digest of its moments."""
    tensors, step = optimizer_state.gather(engine)
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(tensors[name].numpy().tobytes())
    return [step, whole.hexdigest()]


class Story:
    """An engine with a log of what each step did to it."""

    def __init__(self, rank: int, model_dir: str, loss_norm: str = "tokens", **lora: Any) -> None:
        self.collator = make_collator(model_dir)
        settings = EngineSettings(max_grad_norm=0.0, loss_norm=loss_norm)
        self.engine = TrainEngine(make_training(model_dir, **lora), settings)
        groups = NORMS.get(loss_norm, SHARES)[rank]
        self.batches = micro_batches(self.collator, make_step(self.collator, loss_norm), groups)
        self.log: dict[str, Any] = {
            "fresh": {"weights": digest(self.engine), "moments": moments(self.engine)}
        }

    def step(self, name: str, batches: list[MicroBatch], **options: Any) -> StepResult:
        result = self.engine.train_step(batches, RATE, **options)
        state = {"weights": digest(self.engine), "moments": moments(self.engine)}
        self.log[name] = {**dataclasses.asdict(result), **state}
        return result


def poisoned(batch: MicroBatch) -> MicroBatch:
    return dataclasses.replace(batch, label_weight=batch.label_weight * float("nan"))


def weights(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.named_parameters}


def put_back(engine: TrainEngine, saved: dict[str, Any]) -> None:
    for name, parameter in engine.named_parameters:
        parameter.data.copy_(saved["weights"][name])
    optimizer_state.restore(engine, saved["moments"], saved["step"])


def two_ranks(rank: int, model_dir: str, out: str) -> dict[str, Any]:
    """Every step the tests ask about, on one rank of two."""
    story = Story(rank, model_dir, dropout=0.2)
    asked: list[int] = []

    def go_on() -> bool:
        asked.append(rank)
        return False

    story.step("empty", [])
    story.step("good", story.batches, stop=go_on)
    story.step("stop", [], stop=lambda: rank == 1)
    story.step("nan loss", [*story.batches, poisoned(story.batches[0])] if rank == 1 else story.batches)
    _, parameter = story.engine.named_parameters[3]
    hook = parameter.register_hook(lambda gradient: gradient * (float("nan") if rank == 0 else 1.0))
    story.step("nan gradient", story.batches)
    hook.remove()
    tensors, step = optimizer_state.gather(story.engine)
    saved = {"weights": weights(story.engine), "moments": tensors, "step": step}
    story.step("next", story.batches)
    other = Story(rank, model_dir, dropout=0.2)
    put_back(other.engine, saved)
    other.log["put back"] = {"weights": digest(other.engine), "moments": moments(other.engine)}
    other.step("next", other.batches)
    deaf = Story(rank, model_dir, targets="projector")
    text, speech = (
        micro_batches(deaf.collator, make_step(deaf.collator), [group]) for group in ([0, 1], [3, 5])
    )
    deaf.step("good", text if rank == 1 else speech)
    deaf.step("nan loss", [poisoned(text[0])] if rank == 1 else speech)
    first = {loss_norm: first_step(rank, model_dir, loss_norm) for loss_norm in NORMS}
    if rank == 0:
        after = {"weights": weights(story.engine), "moments": optimizer_state.gather(story.engine)[0]}
        torch.save({"saved": saved, "after": after, "first": first}, out)
    else:
        optimizer_state.gather(story.engine)
    return {"story": story.log, "restored": other.log, "deaf": deaf.log, "asked": len(asked)}


def first_step(rank: int, model_dir: str, loss_norm: str) -> dict[str, Any]:
    """A fresh engine's first step: its gradient (Adam's first moment is a tenth of it), loss and longest move."""
    story = Story(rank, model_dir, loss_norm=loss_norm)
    before = weights(story.engine)
    result = story.step("only", story.batches)
    tensors, _ = optimizer_state.gather(story.engine)
    gradient = {k.removeprefix("exp_avg/"): v / 0.1 for k, v in tensors.items() if k.startswith("exp_avg/")}
    moved = max(float((p - before[name]).abs().max()) for name, p in story.engine.named_parameters)
    return {"gradient": gradient, "loss": result.loss, "moved": moved}


def one_rank(rank: int, model_dir: str, path: str, out: str) -> dict[str, Any]:
    """The two ranks' state on a single rank, and its next step over all micro-batches."""
    saved = torch.load(path, weights_only=True)["saved"]
    story = Story(rank, model_dir, dropout=0.2)
    put_back(story.engine, saved)
    tensors, step = optimizer_state.gather(story.engine)
    same = all(torch.equal(tensors[name], value) for name, value in saved["moments"].items())
    story.step("next", micro_batches(story.collator, make_step(story.collator), SHARES[0] + SHARES[1]))
    after = {"weights": weights(story.engine), "moments": optimizer_state.gather(story.engine)[0]}
    torch.save(after, out)
    return {"same": same and set(tensors) == set(saved["moments"]), "step": step}


@pytest.fixture(scope="module")
def tale(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both ranks brought back."""
    out = tmp_path_factory.mktemp("engine") / "tale.pt"
    first, second = run_ranks(two_ranks, 2, str(tiny_model), str(out))
    return {"ranks": (first, second), "path": out, **torch.load(out, weights_only=True)}


@pytest.fixture(scope="module")
def story(tale: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's log of the steps."""
    return tale["ranks"][0]["story"]


def test_ranks_agree_bit_for_bit_after_every_step(tale: dict[str, Any]) -> None:
    first, second = tale["ranks"]
    for name in ("story", "restored", "deaf"):
        for step, seen in first[name].items():
            assert repr(seen) == repr(second[name][step]), f"{name}, {step}"  # in text a NaN equals itself


def test_step_counts_what_all_ranks_saw(story: dict[str, Any], tiny_model: Path) -> None:
    collator, good = make_collator(str(tiny_model)), story["good"]
    examples = make_step(collator)
    lengths = [target_length(collator, e) for e in examples]
    batches = micro_batches(collator, examples, SHARES[0] + SHARES[1])
    assert good["applied"] and (good["samples"], good["bad_samples"]) == (8, 1)
    assert good["tokens"] == sum(batch.tokens for batch in batches)
    assert good["positions"] == sum(batch.input_ids.numel() for batch in batches)
    assert good["audio_seconds"] == pytest.approx(1.0 + 3.0 + 0.5 + 1.9 + 1.0)
    readable = [(e.task, n) for e, n in zip(examples, lengths, strict=True) if not e.error]
    assert good["task_tokens"] == [sum(n for t, n in readable if t == task) for task in range(3)]
    assert good["loss"] == pytest.approx(sum(good["task_nll"]) / sum(good["task_tokens"]), rel=1e-6)


def test_step_without_micro_batches_is_harmless(story: dict[str, Any]) -> None:
    empty = story["empty"]
    assert empty["weights"] == story["fresh"]["weights"]
    assert (empty["loss"], empty["grad_norm"], empty["samples"], sum(empty["task_tokens"])) == (0, 0, 0, 0)
    assert story["good"]["weights"] != empty["weights"]


def test_stop_of_one_rank_reaches_all(tale: dict[str, Any]) -> None:
    for rank in tale["ranks"]:
        assert rank["asked"] == 1
        assert [name for name, step in rank["story"].items() if step.get("stop")] == ["stop"]


def test_non_finite_step_is_skipped_everywhere(tale: dict[str, Any], story: dict[str, Any]) -> None:
    """One rank's NaN loss, or NaN gradient behind a finite loss, leaves weights and moments as they were."""
    assert story["nan loss"]["loss"] != story["nan loss"]["loss"]
    assert story["nan gradient"]["loss"] == pytest.approx(story["next"]["loss"])
    for name in ("nan loss", "nan gradient"):
        assert not story[name]["applied"]
        assert story[name]["weights"] == story["stop"]["weights"]
        assert story[name]["moments"] == story["stop"]["moments"]
    assert [rank for rank, _ in story["nan loss"]["suspects"]] == [1]
    assert story["nan loss"]["suspects"][0][1] == ["7"], "the samples of the micro-batch, and no others"
    assert [rank for rank, _ in story["nan gradient"]["suspects"]] == [0]
    assert len(story["nan gradient"]["suspects"][0][1]) == 3, "all samples of the rank"
    assert story["next"]["applied"] and story["next"]["weights"] != story["stop"]["weights"]
    assert len(story["good"]["seconds_by_rank"]) == 2 and min(story["good"]["seconds_by_rank"]) > 0
    assert story["next"]["moments"][0] == story["stop"]["moments"][0] + 1


def test_loss_without_a_gradient_counts(tale: dict[str, Any]) -> None:
    """Where only the projector trains, text has no gradient; its NaN must stop the step all the same."""
    deaf = tale["ranks"][0]["deaf"]
    assert deaf["good"]["applied"] and deaf["good"]["weights"] != deaf["fresh"]["weights"]
    assert deaf["good"]["task_tokens"][2] > 0
    assert not deaf["nan loss"]["applied"] and deaf["nan loss"]["weights"] == deaf["good"]["weights"]
    assert deaf["nan loss"]["moments"] == deaf["good"]["moments"]


def test_restored_state_continues_bit_for_bit(tale: dict[str, Any], story: dict[str, Any]) -> None:
    restored = tale["ranks"][0]["restored"]
    assert restored["fresh"]["moments"] != restored["put back"]["moments"]
    for name, expected in (("put back", "nan gradient"), ("next", "next")):
        assert restored[name]["weights"] == story[expected]["weights"], name
        assert restored[name]["moments"] == story[expected]["moments"], name
    assert restored["next"]["loss"] == story["next"]["loss"]


def test_state_of_two_ranks_continues_on_one(tale: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "after.pt"
    (result,) = run_ranks(one_rank, 1, str(tiny_model), str(tale["path"]), str(out))
    assert result == {"same": True, "step": tale["saved"]["step"]}
    alone = torch.load(out, weights_only=True)
    assert max(relative_errors(alone["moments"], tale["after"]["moments"]).values()) < 1e-5
    moved = max(float((alone["weights"][n] - w).abs().max()) for n, w in tale["after"]["weights"].items())
    assert moved < 0.01 * RATE


def reference(model_dir: str, loss_norm: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient by the stock forward pass: the mean over examples, or over the tasks' means over tokens."""
    training, collator = make_training(model_dir), make_collator(model_dir)
    nll: dict[int, list[torch.Tensor]] = {}
    chosen = [i for rank in NORMS[loss_norm] for group in rank for i in group if i < 7]
    for example in (make_examples(collator.spec)[i] for i in chosen):
        prompt = collator.prompt(example.sample, example.n_samples)
        ids = torch.tensor([[*prompt, *collator.vocabulary.encode(example.sample.target), 2]])
        logits = training.model(input_ids=ids, input_features=example.mel, use_cache=False).logits[0]
        each = torch.nn.functional.cross_entropy(
            logits[len(prompt) - 1 : -1], ids[0, len(prompt) :], reduction="none", label_smoothing=SMOOTHING
        )
        nll.setdefault(example.task, []).append(each)
    loss = {
        "examples": torch.stack([each.mean() for task in nll.values() for each in task]).mean(),
        "tasks": torch.stack([torch.cat(task).mean() for task in nll.values()]).mean(),
    }[loss_norm]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in training.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_norm", NORMS)
def test_loss_norm_gives_the_documented_gradient(
    tale: dict[str, Any], tiny_model: Path, loss_norm: str
) -> None:
    first = tale["first"][loss_norm]
    loss, gradient = reference(str(tiny_model), loss_norm)
    errors = relative_errors(first["gradient"], gradient)
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["moved"] == pytest.approx(RATE, rel=1e-3), "Adam's first step is the learning rate"


# config


def config_of(tmp_path: Path, content: Any, **settings: Any) -> dict[str, Any]:
    """The config built from a user's file."""
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return build_ds_config(EngineSettings(ds_config=str(path), **settings), 1000)


STAGE_1 = {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_clipping_is_always_written(tmp_path: Path, clip: float) -> None:
    built_in = build_ds_config(EngineSettings(max_grad_norm=clip), 1000)
    assert built_in["gradient_clipping"] == clip
    for clipping in ({}, {"gradient_clipping": 0.0}):
        own = config_of(tmp_path, STAGE_1 | clipping, max_grad_norm=clip)
        assert own["gradient_clipping"] == clip and own["zero_optimization"]["stage"] == 1


def test_buckets_hold_every_trained_element(tmp_path: Path) -> None:
    keys = ("reduce_bucket_size", "allgather_bucket_size")
    for elements, size in ((1000, 1000), (1001, 1002)):
        zero = build_ds_config(EngineSettings(), elements)["zero_optimization"]
        assert [zero[key] for key in keys] == [size, size]
    own = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}
    assert [config_of(tmp_path, own)["zero_optimization"][key] for key in keys] == [7, 1000]
    assert "torch_autocast" not in build_ds_config(EngineSettings(), 1000)
    assert build_ds_config(EngineSettings(bf16=True), 1000)["torch_autocast"]["dtype"] == "bfloat16"


CONTRADICTIONS = {
    "gradient_clipping": 1.0,
    "gradient_accumulation_steps": 2,
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": 8,
    "gradient_allreduce_op": "sum",
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "bf16": {"enabled": True},
    "fp16": {"enabled": True},
    "torch_autocast": {"enabled": True},
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_contradicting_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"--ds_config .*ds\.json: .*{key}") as caught:
        config_of(tmp_path, STAGE_1 | {key: CONTRADICTIONS[key]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [{}, *({"zero_optimization": {"stage": stage}} for stage in (0, 3, "2", None))], ids=str
)
def test_other_stages_are_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="needs stage 1 or 2"):
        config_of(tmp_path, content)


@pytest.mark.parametrize("content", ["{", "[]", '{"zero_optimization": 2}', "\udcff"])
def test_what_is_no_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "ds.json").write_bytes(content.encode(errors="surrogateescape"))
    for path in (tmp_path / "ds.json", tmp_path / "nowhere.json"):
        with pytest.raises(UserError, match=f"--ds_config {path} cannot be read as JSON settings"):
            build_ds_config(EngineSettings(ds_config=str(path)), 1000)


def test_preset_equals_the_built_in_settings() -> None:
    path = ROOT / "ds_configs" / "zero2.json"
    if not path.exists():
        pytest.skip("ds_configs/zero2.json is not there")
    for settings in (EngineSettings(), EngineSettings(bf16=True, max_grad_norm=0.3)):
        preset = dataclasses.replace(settings, ds_config=str(path))
        assert build_ds_config(preset, 1001) == build_ds_config(settings, 1001)
