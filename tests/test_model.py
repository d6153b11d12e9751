"""Model truth: our forward pass, adapter files and greedy decoding against the stock Voxtral."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gradient import make_examples

from voxtral_dist import adapter
from voxtral_dist import model as modeling
from voxtral_dist.adapter import LoraSettings
from voxtral_dist.audio import AudioSpec
from voxtral_dist.batch import DecodeCaps, MicroBatch
from voxtral_dist.collator import Collator, Example
from voxtral_dist.decode import Prompts, decode_stream
from voxtral_dist.errors import UserError
from voxtral_dist.tokenizer import TekkenVocabulary

LORA = LoraSettings(r=4, alpha=8.0, dropout=0.0, targets="both", freeze_whisper=True, seed=1)
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def collator(tiny_model: Path) -> Collator:
    folder = str(tiny_model)
    return Collator(TekkenVocabulary.load(folder), AudioSpec.from_config(modeling.read_config(folder)))


@pytest.fixture(scope="module")
def examples(collator: Collator) -> list[Example]:
    """Text 0-2, audio 3-6: two chunks in row 4."""
    return make_examples(collator.spec)


@pytest.fixture(scope="module")
def batch(collator: Collator, examples: list[Example]) -> MicroBatch:
    """Text and audio mixed."""
    return collator.train_batch([examples[i] for i in (0, 4, 1, 5)], 0)


def base(folder: Path) -> Any:
    return modeling.load(str(folder), torch.float32)


def tuned(folder: Path, **changes: Any) -> Any:
    """The tiny model with an adapter that does something: all that trains is moved off its start."""
    model = adapter.attach(base(folder), replace(LORA, **changes))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "lora_" not in name):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    return model.eval()


@contextmanager
def watched(module: torch.nn.Module) -> Iterator[list[Any]]:
    """Collects (keyword arguments, output) of every call of ``module``."""
    calls: list[Any] = []
    handle = module.register_forward_hook(lambda _, __, kw, out: calls.append((kw, out)), with_kwargs=True)
    yield calls
    handle.remove()


def stock_logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Logits of the stock forward pass [B, L, vocabulary]."""
    with torch.no_grad():
        out = modeling.unwrap(model)(input_ids=batch.input_ids, input_features=batch.audio, use_cache=False)
    return out.logits


# forward


def test_embed_is_the_stock_scatter(tiny_model: Path, batch: MicroBatch) -> None:
    model = base(tiny_model)
    with watched(model.model.language_model) as calls:
        stock_logits(model, batch)
    assert batch.audio is not None
    states = modeling.encode_audio(model, batch.audio)
    ours = modeling.embed(model, batch.input_ids, states, batch.audio_index)
    assert torch.equal(ours, calls[0][0]["inputs_embeds"])
    words = model.get_input_embeddings()(batch.input_ids)
    assert torch.equal(modeling.embed(model, batch.input_ids, None, batch.audio_index[:0]), words)
    assert not torch.equal(ours, words)


def test_embed_refuses_another_number_of_slots(tiny_model: Path, batch: MicroBatch) -> None:
    model = base(tiny_model)
    assert batch.audio is not None
    states = modeling.encode_audio(model, batch.audio)
    with pytest.raises(ValueError, match=r"74 \[AUDIO\] slots for 75 audio embeddings"):
        modeling.embed(model, batch.input_ids, states, batch.audio_index[:-1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_stock_loss(
    tiny_model: Path, collator: Collator, examples: list[Example], smoothing: float
) -> None:
    """Rows weigh 0.25, 0 and 1; one task is absent."""
    rows = [replace(examples[i], weight=w) for i, w in ((0, 0.25), (4, 0.0), (3, 1.0), (1, 1.0))]
    model, loss, nll, tokens = tuned(tiny_model), 0.0, torch.zeros(3), torch.zeros(3)
    for row in rows:
        alone = collator.train_batch([row], 0)
        target = [*collator.vocabulary.encode(row.sample.target), 2]
        logits = stock_logits(model, alone)[0, -len(target) - 1 : -1]
        summed = torch.nn.functional.cross_entropy(
            logits, torch.tensor(target), reduction="sum", label_smoothing=smoothing
        )
        loss += row.weight * float(summed)
        nll[row.task] += summed * (row.weight > 0)
        tokens[row.task] += len(target) * (row.weight > 0)
    result = modeling.TrainingModel(model.requires_grad_(False), 3, smoothing)(collator.train_batch(rows, 0))
    assert float(result.loss) == pytest.approx(loss, rel=1e-5)
    assert result.task_nll.tolist() == pytest.approx(nll.tolist(), rel=1e-5)
    assert result.task_tokens.tolist() == tokens.tolist() and tokens[1] == 0


def test_frozen_encoder_has_no_graph(tiny_model: Path, batch: MicroBatch) -> None:
    training = modeling.TrainingModel(tuned(tiny_model, dropout=0.5), 3).train()
    tower = training.voxtral.model.audio_tower
    assert not any(module.training for module in tower.modules())
    assert training.voxtral.model.language_model.layers[0].training
    with watched(tower) as calls:
        training(batch).loss.backward()
    assert len(calls) == 1 and not calls[0][1].last_hidden_state.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in tower.parameters())
    trained = [name for name, p in training.named_parameters() if p.grad is not None]
    assert trained == adapter.trainable_names(training) and any("projector" in name for name in trained)


def test_checkpointing_changes_no_gradient(tiny_model: Path, batch: MicroBatch) -> None:
    gradients = []
    for checkpointing in (False, True):
        training = modeling.TrainingModel(tuned(tiny_model, dropout=0.3), 3).train()
        core = training.voxtral.model
        if checkpointing:
            modeling.checkpoint_layers(training.voxtral)
        torch.manual_seed(7)
        with watched(core.audio_tower) as heard, watched(core.language_model.layers[0].self_attn) as layer:
            training(batch).loss.backward()
        assert (len(heard), len(layer)) == (1, 2 if checkpointing else 1)
        assert not heard[0][1].last_hidden_state.requires_grad
        gradients.append({n: p.grad for n, p in training.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert set(plain) == set(again)
    assert max(float((again[name] - g).norm() / g.norm()) for name, g in plain.items()) < 1e-6


# adapter


@pytest.mark.parametrize("targets", list(adapter.TARGET_MODULES))
def test_adapter_sits_where_it_should(tiny_model: Path, targets: str) -> None:
    model = adapter.attach(modeling.load(str(tiny_model), torch.bfloat16), replace(LORA, targets=targets))
    layers = [f"language_model.layers.{n}.{x}" for n in range(2) for x in LINEARS]
    projector = [f"multi_modal_projector.linear_{n}" for n in (1, 2)]
    modules = {"language_model": layers, "projector": projector, "both": layers + projector}[targets]
    names = adapter.trainable_names(model)
    expected = [f"base_model.model.model.{m}.lora_{x}.default.weight" for m in modules for x in "AB"]
    assert sorted(names) == sorted(expected) and not any("audio_tower" in name for name in names)
    types = {name: p.dtype for name, p in model.named_parameters()}
    kept = [*names, "base_model.model.model.audio_tower.embed_positions.weight"]
    assert {name for name, dtype in types.items() if dtype == torch.float32} == set(kept)
    assert set(types.values()) == {torch.float32, torch.bfloat16}


CHANGES = [{"targets": t} for t in adapter.TARGET_MODULES] + [{"freeze_whisper": False}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_saved_adapter_gives_identical_logits(
    tiny_model: Path, tmp_path: Path, batch: MicroBatch, changes: dict[str, Any]
) -> None:
    model = tuned(tiny_model, **changes)
    adapter.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", adapter.WEIGHTS_FILE]
    loaded = adapter.load(base(tiny_model), tmp_path)
    expected = stock_logits(model, batch)
    assert torch.equal(stock_logits(loaded, batch), expected)
    assert not torch.allclose(stock_logits(base(tiny_model), batch), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_trained_encoder_learns_and_is_saved(tiny_model: Path, tmp_path: Path, batch: MicroBatch) -> None:
    model = tuned(tiny_model, freeze_whisper=False)
    training = modeling.TrainingModel(model, 3).train()
    training(batch).loss.backward()
    tower = training.voxtral.model.audio_tower
    assert tower.training
    names = [n for n in adapter.trainable_names(model) if "audio_tower" in n]
    stock = [n for n, _ in base(tiny_model).model.audio_tower.named_parameters()]
    assert len(names) == len(stock) - 1, "all but embed_positions"
    assert all(float(model.get_parameter(n).grad.abs().sum()) > 0 for n in names if "k_proj.bias" not in n)
    adapter.save(model, tmp_path)
    saved = load_file(tmp_path / adapter.WEIGHTS_FILE)
    assert {n.split("audio_tower.")[1] for n in saved if "audio_tower." in n} == set(stock)


def renamed(pattern: str, new: str) -> Change:
    """Rewrites keys; at least one must match."""

    def change(tensors: dict[str, Any]) -> None:
        hits = [key for key in tensors if re.search(pattern, key)]
        assert hits
        for key in hits:
            tensors[re.sub(pattern, new, key)] = tensors.pop(key)

    return change


def cut_first(tensors: dict[str, Any]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = tensors[name][:1].clone()


DAMAGES: dict[str, tuple[Change, str]] = {
    "missing key": (lambda t: t.pop(sorted(t)[3]), "1 of 31 tensors differ"),
    "extra key": (lambda t: t.update(extra=torch.zeros(1)), "the first is extra"),
    "wrong shape": (cut_first, "1 of 32 tensors differ"),
    "language model of transformers 5.9": (
        renamed(r"model\.model\.language_model\.", "model.language_model.model."),
        "does not fit the model",
    ),
    "projector of transformers 5.9": (
        renamed(r"model\.model\.multi_modal_projector", "model.multi_modal_projector"),
        "8 of 32 tensors differ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_adapter_that_does_not_fit_is_refused_whole(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    adapter.save(tuned(tiny_model), tmp_path)
    tensors = load_file(tmp_path / adapter.WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / adapter.WEIGHTS_FILE)
    model = adapter.attach(base(tiny_model), LORA)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=message) as caught:
        adapter.load_weights(model, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with pytest.raises(UserError, match=message):
        adapter.load(base(tiny_model), tmp_path)


def test_folder_without_a_readable_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model, weights = base(tiny_model), tmp_path / adapter.WEIGHTS_FILE
    adapter.save(tuned(tiny_model), tmp_path)
    whole = weights.read_bytes()
    for damaged in (whole[:-100], b"", b"no safetensors"):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read"):
            adapter.load(base(tiny_model), tmp_path)
    weights.unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="must be in safetensors format"):
        adapter.load(base(tiny_model), tmp_path)
    for text in ("{", "{}", "[]", '{"peft_type": "FOO"}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=r"no readable adapter_config\.json"):
            adapter.load(model, tmp_path)
    for folder in (tmp_path / "nowhere", Path("nowhere")):
        with pytest.raises(UserError, match=f"{folder} holds no readable adapter_config"):
            adapter.load(model, folder)


# base model


BAD_CONFIGS: dict[str, tuple[Change, str]] = {
    "realtime": (lambda c: c.update(model_type="voxtral_realtime"), "is a voxtral_realtime model"),
    "llama": (lambda c: c.update(model_type="llama"), "has model type 'llama', not 'voxtral'"),
    "no type": (lambda c: c.pop("model_type"), "has model type None"),
    "foreign code": (lambda c: c.update(auto_map={"AutoModel": "evil.Model"}), "'auto_map', which may run"),
    "other sizes": (lambda c: c["text_config"].update(intermediate_size=100), "weights cannot be loaded"),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_unfit_config_is_refused(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    change, message = BAD_CONFIGS[kind]
    values = json.loads((tiny_model / "config.json").read_text())
    change(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    shutil.copy(tiny_model / "model.safetensors", tmp_path)
    refuses(tmp_path, message)


def refuses(folder: Path | str, message: str) -> None:
    """Loading ends in one line that names the folder and says ``message``."""
    with pytest.raises(UserError, match=message) as caught:
        modeling.load(str(folder), torch.float32)
    assert "\n" not in str(caught.value) and f"--model_id {folder}" in str(caught.value)


def test_folder_without_fit_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    tensors = load_file(tiny_model / "model.safetensors")
    shutil.copy(tiny_model / "config.json", tmp_path)
    refuses(tmp_path, "the weights cannot be loaded")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    refuses(tmp_path, "the weights cannot be loaded")
    weights.write_bytes((tiny_model / "model.safetensors").read_bytes()[:-1000])
    refuses(tmp_path, "the weights cannot be loaded")
    tensors.pop("language_model.lm_head.weight")
    save_file(tensors, weights, {"format": "pt"})
    refuses(tmp_path, r"1 weights are missing from its files, the first is lm_head\.weight")


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    for nowhere in (tmp_path / "nowhere", "nowhere", "no/where", "./no/where/at all"):
        refuses(nowhere, r"no readable config\.json there")
    refuses(tmp_path, "no readable config.json")
    for text, message in (("{", "no readable config"), ("[]", "no readable config")):
        (tmp_path / "config.json").write_text(text)
        refuses(tmp_path, message)


# decoding


GROUPS = {"asr": [3], "sqa of two chunks": [6], "tqa": [0], "text": [0, 1, 2], "mixed": [3, 0, 4, 2, 6, 5]}


@pytest.fixture(scope="module")
def speaker(tiny_model: Path) -> Any:
    return tuned(tiny_model)


def prompts(collator: Collator, examples: list[Example]) -> tuple[torch.Tensor, list[int]]:
    """Ids padded on the left and the prompts' lengths."""
    rows = [collator.prompt(e.sample, e.n_samples) for e in examples]
    return collator.pad(rows, left=True), [len(row) for row in rows]


def decode(
    model: Any, collator: Collator, examples: list[Example], eos: int = 2, limits: list[int] | None = None
) -> list[list[int]]:
    ids, lengths = prompts(collator, examples)
    audio, slots = collator.stack_audio(examples), collator.audio_slots(ids)
    limits = limits or [12] * len(examples)
    group = Prompts(ids, lengths, audio, slots, limits)
    answers = decode_stream(model, [group], DecodeCaps(len(lengths), 0), eos_id=eos)
    return [answer.tokens for answer in sorted(answers, key=lambda answer: answer.number)]


def stock_generate(model: Any, collator: Collator, examples: list[Example], eos: int) -> list[list[int]]:
    ids, _ = prompts(collator, examples)
    audio = collator.stack_audio(examples)
    features = {} if audio is None else {"input_features": audio}
    mask = (ids != 11).long()
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=eos,
        pad_token_id=11,
        **features,
    )
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


@pytest.mark.parametrize("group", GROUPS)
def test_decodes_as_stock_generate(
    speaker: Any, collator: Collator, examples: list[Example], group: str
) -> None:
    """With an end that never comes, and with one in the middle and one at the start of the first answer."""
    rows = [examples[i] for i in GROUPS[group]]
    free = decode(speaker, collator, rows)
    assert [len(answer) for answer in free] == [12] * len(rows)
    assert free == stock_generate(speaker, collator, rows, 2)
    for eos in (free[0][6], free[0][0]):
        answers = decode(speaker, collator, rows, eos)
        assert answers == stock_generate(speaker, collator, rows, eos)
        assert answers[0] == free[0][: free[0].index(eos)]
        if group == "mixed":
            assert len({len(answer) for answer in answers}) > 1


def test_batch_changes_no_answer(speaker: Any, collator: Collator, examples: list[Example]) -> None:
    together = decode(speaker, collator, examples)
    assert together == [decode(speaker, collator, [e])[0] for e in examples]
    assert len({tuple(answer) for answer in together}) == len(examples)


def test_limits_are_the_rows_own(speaker: Any, collator: Collator, examples: list[Example]) -> None:
    free = decode(speaker, collator, examples)
    eos, limits = free[3][4], [1, 12, 5, 9, 2, 12, 3]
    language_model = modeling.unwrap(speaker).model.language_model
    tower = modeling.unwrap(speaker).model.audio_tower
    with watched(language_model) as steps, watched(tower) as heard:
        answers = decode(speaker, collator, examples, eos, limits)
    expected = [row[:n] for row, n in zip(free, limits, strict=True)]
    expected = [row[: row.index(eos)] if eos in row else row for row in expected]
    assert answers == expected and len(expected[3]) <= 4
    widths = [len(kwargs["inputs_embeds"]) for kwargs, _ in steps]
    left = [
        sum(len(a) + (eos in f[:n]) > s for a, f, n in zip(answers, free, limits, strict=True))
        for s in range(12)
    ]
    assert widths == [n for n in left if n] and len(heard) == 1
