"""What can train besides a plain LoRA adapter: its variants, whole weights, a 4-bit base, a start from an adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_runs import Demo, alone
from harness import run_ranks
from safetensors.torch import load_file, save_file
from test_engine import digest, make_collator, moments
from test_gradient import SMOOTHING, SPLITS, make_examples, relative_errors
from test_model import LORA, base, stock_logits, tuned

from voxtral_dist import adapter, checkpoint, command_line, full_tuning, optimizer_state, prepare
from voxtral_dist import model as modeling
from voxtral_dist.batch import DecodeCaps, MicroBatch
from voxtral_dist.collator import Collator
from voxtral_dist.config import TrainConfig
from voxtral_dist.decode import Prompts, decode_stream
from voxtral_dist.ds_config import EngineSettings
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import UserError

MODES = ("projector", "language_model")
VARIANTS: list[dict[str, Any]] = [
    {"rslora": True},
    {"dora": True},
    *({"tune": mode} for mode in MODES),
    {"tune": "projector", "freeze_whisper": False},
]


@pytest.fixture(scope="module")
def words(tiny_model: Path) -> Collator:
    """The tiny model's collator."""
    return make_collator(str(tiny_model))


@pytest.fixture(scope="module")
def batch(words: Collator) -> MicroBatch:
    """Text and audio mixed."""
    rows = make_examples(words.spec)
    return words.train_batch([rows[i] for i in (0, 4, 1, 5)], 0)


# what trains, what is saved


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_saved_form_is_restored(
    tiny_model: Path,
    tmp_path: Path,
    batch: MicroBatch,
    changes: dict[str, Any],
) -> None:
    model = tuned(tiny_model, **changes)
    adapter.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", adapter.WEIGHTS_FILE]
    adapter.check_same_form(tmp_path, replace(LORA, **changes))
    loaded = adapter.load(base(tiny_model), tmp_path)
    expected = stock_logits(model, batch)
    assert torch.equal(stock_logits(loaded, batch), expected)
    assert not torch.allclose(stock_logits(base(tiny_model), batch), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_variants_differ_and_are_on_record(tiny_model: Path, tmp_path: Path, batch: MicroBatch) -> None:
    logits = []
    for number, changes in enumerate(({}, {"rslora": True}, {"dora": True})):
        model = tuned(tiny_model, **changes)
        adapter.save(model, tmp_path / str(number))
        values = json.loads((tmp_path / str(number) / "adapter_config.json").read_text())
        assert (values["use_rslora"], values["use_dora"]) == ("rslora" in changes, "dora" in changes)
        logits.append(stock_logits(model, batch))
    assert not torch.allclose(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])


@pytest.mark.parametrize("mode", MODES)
def test_only_the_named_weights_train(tiny_model: Path, mode: str) -> None:
    model = adapter.attach(modeling.load(str(tiny_model), torch.bfloat16), replace(LORA, tune=mode))
    names = [name.removeprefix("base.") for name in adapter.trainable_names(model)]
    stock = [name for name, _ in base(tiny_model).named_parameters()]
    kept = ("multi_modal_projector.",) + (("language_model.layers.",) if mode == "language_model" else ())
    assert names == [n for n in stock if n.startswith(tuple(f"model.{part}" for part in kept))]
    types = {name.removeprefix("base."): p.dtype for name, p in model.named_parameters()}
    assert all(types[name] == torch.float32 for name in names)
    floats = {name for name, dtype in types.items() if dtype == torch.float32}
    assert floats == {*names, "model.audio_tower.embed_positions.weight"}


@pytest.mark.parametrize("mode", MODES)
def test_full_weights_work_in_a_bf16_model(
    tiny_model: Path,
    tmp_path: Path,
    words: Collator,
    batch: MicroBatch,
    mode: str,
) -> None:
    """float32 layers between bfloat16 ones: training under autocast, decoding without, alike when loaded again."""

    def bf16() -> Any:
        return modeling.load(str(tiny_model), torch.bfloat16)

    model = adapter.attach(bf16(), replace(LORA, tune=mode))
    training = modeling.TrainingModel(model, 3).train()
    with torch.autocast("cpu", torch.bfloat16):
        training(batch).loss.backward()
    for name, parameter in training.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
            parameter.data -= 0.01 * parameter.grad.sign()
    adapter.save(model, tmp_path)
    example = make_examples(words.spec)[3]
    ids = torch.tensor([words.prompt(example.sample, example.n_samples)])
    group = Prompts(ids, [ids.shape[1]], example.mel, words.audio_slots(ids), [6])
    answers = [
        next(decode_stream(one.eval(), [group], DecodeCaps(1, 0), eos_id=2)).tokens
        for one in (model, adapter.load(bf16(), tmp_path), bf16())
    ]
    assert answers[0] == answers[1] != answers[2]


def test_weights_that_do_not_fit_are_refused_whole(tiny_model: Path, tmp_path: Path) -> None:
    adapter.save(tuned(tiny_model, tune="projector"), tmp_path)
    tensors = load_file(tmp_path / adapter.WEIGHTS_FILE)
    first = sorted(tensors)[0]
    before = base(tiny_model).state_dict()
    for change in (lambda t: t.pop(first), lambda t: t.update(extra=torch.zeros(1))):
        damaged = dict(tensors)
        change(damaged)
        save_file(damaged, tmp_path / adapter.WEIGHTS_FILE)
        model = base(tiny_model)
        with pytest.raises(UserError, match="does not fit the model: 1 of"):
            adapter.load(model, tmp_path)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"format": full_tuning.FORMAT, "tune": "head"}))
    with pytest.raises(UserError, match=r"no readable adapter_config\.json"):
        adapter.load(base(tiny_model), tmp_path)


# two ranks: the gradient, and going on


def make_training(model_dir: str, mode: str) -> modeling.TrainingModel:
    return modeling.TrainingModel(tuned(Path(model_dir), tune=mode), 3, SMOOTHING)


def whole_weights(rank: int, model_dir: str, out: str) -> list[dict[str, Any]]:
    """Per mode: the gradient of a step, and the next step with and without a checkpoint in between."""
    collator, seen = make_collator(model_dir), []
    rows = make_examples(collator.spec)
    groups = SPLITS["text | audio"][rank]
    batches = [collator.train_batch([rows[i] for i in group], group[0]) for group in groups]
    for mode in MODES:
        run_dir = Path(out, mode)
        engine = TrainEngine(make_training(model_dir, mode), EngineSettings(max_grad_norm=0.0))
        engine.train_step(batches, 1e-3)
        tensors, _ = optimizer_state.gather(engine)
        if rank == 0:
            gradient = {k.split("/", 1)[1]: v / 0.1 for k, v in tensors.items() if k.startswith("exp_avg/")}
            torch.save(gradient, Path(out, f"{mode}.pt"))
        taken = checkpoint.snapshot(engine, {"step": 1})
        if taken:
            checkpoint.publish(run_dir, taken)
        newest = checkpoint.newest_whole(run_dir)
        assert newest
        engine.train_step(batches, 1e-3)
        other = TrainEngine(make_training(model_dir, mode), EngineSettings(max_grad_norm=0.0))
        checkpoint.load(newest, other)
        other.train_step(batches, 1e-3)
        seen.append(
            {"plain": [digest(engine), *moments(engine)], "restored": [digest(other), *moments(other)]}
        )
    return seen


@pytest.fixture(scope="module")
def two_ranks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    out = tmp_path_factory.mktemp("whole")
    return out, run_ranks(whole_weights, 2, str(tiny_model), str(out))


def reference(model_dir: str, mode: str) -> dict[str, torch.Tensor]:
    """The gradient of the whole step by the stock forward pass, one example after another."""
    training, collator = make_training(model_dir, mode), make_collator(model_dir)
    total, count = torch.zeros(()), 0
    for example in make_examples(collator.spec):
        prompt = collator.prompt(example.sample, example.n_samples)
        target = [*collator.vocabulary.encode(example.sample.target), 2]
        ids = torch.tensor([prompt + target])
        logits = training.model(input_ids=ids, input_features=example.mel, use_cache=False).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits[len(prompt) - 1 : -1], torch.tensor(target), reduction="sum", label_smoothing=SMOOTHING
        )
        count += len(target)
    (total / count).backward()
    return {name: p.grad for name, p in training.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_two_ranks_is_that_of_one_process(
    tiny_model: Path, two_ranks: tuple[Path, list[Any]], mode: str
) -> None:
    expected = reference(str(tiny_model), mode)
    got = torch.load(two_ranks[0] / f"{mode}.pt", weights_only=True)
    assert not any("audio_tower" in name for name in got)
    errors = relative_errors(got, expected)
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])


def test_restored_weights_go_on_bit_for_bit(two_ranks: tuple[Path, list[Any]]) -> None:
    first, second = two_ranks[1]
    assert first == second
    for mode in first:
        assert mode["plain"] == mode["restored"] and mode["plain"][1] == 2


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_finds_the_weights_of_a_checkpoint(
    tiny_model: Path, two_ranks: tuple[Path, list[Any]], mode: str
) -> None:
    folder = checkpoint.find_adapter(two_ranks[0] / mode)
    loaded = adapter.load(base(tiny_model), folder)
    saved = load_file(folder / adapter.WEIGHTS_FILE)
    for name, value in modeling.unwrap(loaded).state_dict().items():
        assert name not in saved or torch.equal(saved[name], value)


# --init_adapter


def settings(tiny_model: Path, out: Path, **changes: Any) -> TrainConfig:
    values = {"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "seed": 9, "bf16": False} | changes
    return TrainConfig(model_id=str(tiny_model), output_dir=str(out), train_shards="x", **values)


def test_training_begins_from_the_given_weights(tiny_model: Path, tmp_path: Path) -> None:
    adapter.save(tuned(tiny_model), tmp_path / "first")
    flags = settings(tiny_model, tmp_path / "run", init_adapter=str(tmp_path / "first"), lora_dropout=0.3)
    training = prepare.training_model(flags, torch.device("cpu"), 3)
    saved = load_file(tmp_path / "first" / adapter.WEIGHTS_FILE)
    held = adapter.snapshot(training.model)[0]
    assert set(held) == set(saved) and all(torch.equal(held[name], value) for name, value in saved.items())
    assert (
        set(adapter.trainable_names(training.model))
        and training.model.peft_config["default"].lora_dropout == 0.3
    )
    identity = prepare.model_identity(flags)
    assert len(identity["init_adapter"]) == 64
    fresh = prepare.model_identity(settings(tiny_model, tmp_path / "run"))
    assert fresh["init_adapter"] == "" and fresh != identity


REFUSED = {
    "--lora_r 8 but 4 there": {"lora_r": 8, "lora_alpha": 16.0},
    "--lora_targets projector but both there": {"lora_targets": "projector"},
    "--lora_dora True but False there": {"lora_dora": True},
    "--lora_alpha 9.0 but 8.0 there": {"lora_alpha": 9.0},
    "--tune projector but lora there": {"tune": "projector"},
    "--freeze_whisper False but True there": {"freeze_whisper": False},
}


@pytest.mark.parametrize("message", REFUSED)
def test_start_from_another_form_is_refused(tiny_model: Path, tmp_path: Path, message: str) -> None:
    adapter.save(tuned(tiny_model), tmp_path / "first")
    flags = settings(tiny_model, tmp_path / "run", init_adapter=str(tmp_path / "first"), **REFUSED[message])
    with pytest.raises(UserError, match=message) as caught:
        prepare.model_identity(flags)
    assert "\n" not in str(caught.value)
    nothing = settings(tiny_model, tmp_path / "run", init_adapter=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"--init_adapter .*nowhere: neither a run directory"):
        prepare.model_identity(nothing)


def test_a_run_with_checkpoints_keeps_its_record(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder may be gone, or hold newer weights, when the same command goes on."""
    run = tmp_path / "run"
    checkpoint.step_dir(run, 1).mkdir(parents=True)
    (run / "identity.json").write_text(json.dumps({"init_adapter": "abc"}))
    flags = settings(tiny_model, run, init_adapter=str(tmp_path / "gone"))
    assert prepare.model_identity(flags)["init_adapter"] == "abc"
    assert prepare.initial_adapter(flags) is None
    with caplog.at_level("INFO", "voxtral_dist"):
        prepare.training_model(flags, torch.device("cpu"), 3)
    assert "gone is ignored: the run goes on from a checkpoint" in caplog.text
    fork = settings(tiny_model, tmp_path / "new", resume=str(checkpoint.step_dir(run, 1)))
    assert prepare.model_identity(fork)["init_adapter"] == "abc"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_train_begin_again_and_evaluate(demo: Demo, tmp_path: Path, mode: str) -> None:
    """A run, a second one that begins from it, and its evaluation by evaluate.py; all say the same about the start."""
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ("--tune", mode, "--max_steps", "2", "--eval_steps", "0")
    alone(demo.flags(first, *flags), first)
    alone(demo.flags(second, *flags, "--init_adapter", str(first)), second)

    def answers(folder: Path) -> str:
        return (folder / "predictions.jsonl").read_text()

    start, end = (answers(first / "eval" / f"step-0000000{step}") for step in (0, 2))
    assert answers(second / "eval" / "step-00000000") == end != start
    path, digest_ = json.loads((second / "environment.json").read_text())["init_adapter"]
    assert (
        path == str(first) and digest_ == json.loads((second / "identity.json").read_text())["init_adapter"]
    )
    data = [word for word in demo.data("shards") if "train" not in word]
    scores = tmp_path / "scores"
    where = ("--lora_dir", str(second / "checkpoints" / "step-00000002"), "--output_dir", str(scores))
    how = ("--per_device_bsz", "4", "--max_len", "128", "--gen_max_new_tokens", "4")
    alone([*data, *where, *how], scores, "evaluate")
    assert answers(scores) == answers(second / "eval" / "step-00000002")


# flags


@pytest.mark.parametrize("name", ["lora_rslora", "lora_dora", "tune", "load_in_4bit"])
def test_identity_covers_the_form(tiny_model: Path, tmp_path: Path, name: str) -> None:
    plain = prepare.model_identity(settings(tiny_model, tmp_path))
    other = settings(tiny_model, tmp_path, **{name: "projector" if name == "tune" else True})
    assert {k for k, v in prepare.model_identity(other).items() if plain[k] != v} == {name}


@pytest.mark.parametrize(
    "flags",
    [
        "--lora_dora --tune projector",
        "--lora_rslora --tune language_model",
        "--load_in_4bit --tune language_model",
    ],
)
def test_contradicting_flags_are_refused(flags: str) -> None:
    needed = "--model_id m --output_dir o --train_shards s".split()
    with pytest.raises(UserError, match=flags.split(maxsplit=1)[0]):
        command_line.parse(TrainConfig, [*needed, *flags.split()], "train.py")


# 4 bits


def dequantised(model: Any) -> Any:
    """The tiny model in float32 with the values that the 4-bit linears of ``model`` stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = base(Path(model.config._name_or_path))
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = plain.get_submodule(name).weight
            weight.data.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state).view_as(weight))
    return plain


def test_gradient_on_a_4bit_base_is_that_of_the_dequantised_one(tiny_model: Path, batch: MicroBatch) -> None:
    """To rounding, relative error 1e-5 in float32; the quantised linears are the language model's alone."""
    pytest.importorskip("bitsandbytes")
    quantised = modeling.load(str(tiny_model), torch.float32, torch.device("cpu"), four_bit=True)
    small = [name for name, m in quantised.named_modules() if type(m).__name__ == "Linear4bit"]
    assert len(small) == 14 and all("language_model.layers" in name for name in small)
    gradients = []
    for one in (quantised, dequantised(quantised)):
        model = adapter.attach(one, LORA)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
        training = modeling.TrainingModel(model, 3).train()
        training(batch).loss.backward()
        gradients.append({n: p.grad for n, p in training.named_parameters() if p.grad is not None})
    assert max(relative_errors(*gradients).values()) < 1e-5
    original = modeling.TrainingModel(tuned(tiny_model), 3).train()
    original(batch).loss.backward()
    other = {n: p.grad for n, p in original.named_parameters() if p.grad is not None}
    assert max(relative_errors(gradients[0], other).values()) > 1e-2, "4 bits change the gradient"


def test_missing_bitsandbytes_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"voxtral-dist\[4bit\]"):
        modeling._four_bit_options(torch.float32, None)
