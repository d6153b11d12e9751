"""Exports of a run: each is the run's own model, by the names and in the files that others read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export_names import converted
from test_gradient import make_examples
from test_model import base, stock_logits, tuned
from transformers import VoxtralForConditionalGeneration

from voxtral_dist import adapter, checkpoint, mistral_names, run_dir
from voxtral_dist import model as modeling
from voxtral_dist.audio import AudioSpec
from voxtral_dist.batch import MicroBatch
from voxtral_dist.collator import Collator
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.export import export
from voxtral_dist.export_file import read_file, write_file
from voxtral_dist.export_source import Source, find_source
from voxtral_dist.export_weights import BaseWeights, Job, Trained
from voxtral_dist.tokenizer import TekkenVocabulary

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "language model": {"targets": "language_model"},
    "projector weights": {"tune": "projector"},
    "all weights": {"tune": "language_model", "freeze_whisper": False},
    "encoder": {"freeze_whisper": False},
}


@pytest.fixture(scope="module")
def batch(tiny_model: Path) -> MicroBatch:
    """Text and audio mixed."""
    folder = str(tiny_model)
    words = Collator(TekkenVocabulary.load(folder), AudioSpec.from_config(modeling.read_config(folder)))
    rows = make_examples(words.spec)
    return words.train_batch([rows[i] for i in (0, 4, 1, 5)], 0)


def publish(run: Path, model: Any, base_model: Path, step: int = 4, **settings: Any) -> Path:
    """A run directory with one checkpoint, written by the product."""
    config = {"model_id": str(base_model), "sqa_question": "written", **settings}
    run_dir.begin(run, json.dumps(config), {"tasks": ["asr", "sqa", "tqa"]}, {})
    checkpoint.publish(run, checkpoint.Snapshot({"step": step}, {}, adapter.snapshot(model)))
    (run / "best").write_text(f"step-{step:08d}\n")
    return run


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a LoRA on language model and projector."""
    return publish(tmp_path_factory.mktemp("run") / "run", tuned(tiny_model), tiny_model)


@pytest.fixture(scope="module")
def text_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the language model alone, rank-stabilised."""
    model = tuned(tiny_model, targets="language_model", rslora=True)
    return publish(tmp_path_factory.mktemp("run") / "run", model, tiny_model)


def source_of(model: Any, base_model: Path, folder: Path) -> Source:
    adapter.save(model, folder)
    return Source(str(base_model), folder, None, None, {})


def logits_of(source: Source, batch: MicroBatch) -> torch.Tensor:
    """Of the run's own model."""
    return stock_logits(adapter.load(base(Path(source.base)), source.adapter), batch)


# merging


@pytest.mark.parametrize("form", FORMS)
def test_merged_weights_are_the_trained_model(
    tiny_model: Path, tmp_path: Path, batch: MicroBatch, form: str
) -> None:
    """Under names on disk, into a model that knows nothing of the adapter."""
    model = tuned(tiny_model, **FORMS[form])
    expected = stock_logits(model, batch)
    source = source_of(model, tiny_model, tmp_path)
    job = Job(BaseWeights.open(tiny_model), "tiny", tmp_path, Trained.read(source.adapter), None)
    state = {name: job.weight(name) for name in job.specs}
    job.trained.check_all_used()
    config = modeling.read_config(str(tiny_model))
    plain = VoxtralForConditionalGeneration.from_pretrained(None, config=config, state_dict=state)
    assert float((stock_logits(plain.eval(), batch) - expected).abs().max()) < 1e-4
    assert float((stock_logits(base(tiny_model), batch) - expected).abs().max()) > 1e-2


def test_merge_is_that_of_peft_in_float32(tiny_model: Path, tmp_path: Path) -> None:
    """Of a bfloat16 base too: the sum is rounded once, not the product before it."""
    model = tuned(tiny_model)
    source = source_of(model, tiny_model, tmp_path / "adapter")
    low = {name: tensor.bfloat16() for name, tensor in read_file(tiny_model / "model.safetensors")}
    (tmp_path / "base").mkdir()
    save_file(low, tmp_path / "base/model.safetensors")
    job = Job(BaseWeights.open(tmp_path / "base"), "", tmp_path, Trained.read(source.adapter), None)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    layer = modeling.unwrap(model).model.language_model.layers[0].self_attn.q_proj
    exact = low[name].float() + layer.get_delta_weight("default")
    assert torch.equal(job.weight(name), exact.bfloat16()) and job.is_rounded
    assert torch.equal(
        job.weight("language_model.model.norm.weight"), low["language_model.model.norm.weight"]
    )


def test_files_are_safetensors_of_mixed_types(tmp_path: Path) -> None:
    """Odd numbers of narrow elements before wide ones: readers need aligned tensors."""
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7), "c": torch.randn(2, 2).half()}
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    count = iter(range(10))
    write_file(tmp_path / "x.safetensors", specs, tensors.__getitem__, lambda: next(count))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
    assert next(count) == 3
    with pytest.raises(VoxtralDistError, match="b became"):
        write_file(tmp_path / "y", specs, lambda name: tensors[name].double(), lambda: None)


# the formats


def test_merged_folder_loads_as_a_plain_model(run: Path, tmp_path: Path, batch: MicroBatch) -> None:
    source, out = find_source(run, "", ""), tmp_path / "merged"
    expected = logits_of(source, batch)
    proof = export(source, "merged", out, "")
    assert (
        proof
        and proof.largest_difference < 1e-4 < proof.largest_change
        and proof.equal_answers == proof.prompts
    )
    loaded, info = VoxtralForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert float((stock_logits(loaded.eval(), batch) - expected).abs().max()) < 1e-4
    assert {p.name for p in out.iterdir()} >= {
        "config.json",
        "tekken.json",
        "processor_config.json",
        "README.md",
    }
    assert json.loads((out / "config.json").read_text())["text_config"]["rope_theta"] == 1e4, (
        "transformers before 5"
    )
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert export(source, "merged", out, "") is None
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match="holds something else"):
        export(source, "mistral", out, "")
    with pytest.raises(UserError, match="holds something else"):
        export(source, "merged", out, "bf16")


def test_shards_of_the_base_are_kept_and_bf16_is_rounded_once(
    run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    model = base(tiny_model)
    model.save_pretrained(tmp_path / "base", max_shard_size="2MB")
    files = sorted(p.name for p in (tmp_path / "base").glob("model-*"))
    assert len(files) > 1
    out, source = tmp_path / "out", find_source(run, "", str(tmp_path / "base"))
    proof = export(source, "merged", out, "bf16")
    assert proof and 0 < proof.lost < 0.1
    assert sorted(p.name for p in out.glob("model-*")) == files
    tensors = {n: t for file in files for n, t in read_file(out / file)}
    assert {n for n, t in tensors.items() if t.dtype != torch.bfloat16} == {mistral_names.EMBED_POSITIONS}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"] == {n: f for f in files for n, _ in read_file(out / f)}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("positions", ["usual", "the demo's"])
def test_mistral_folder_maps_back_to_the_model(
    run: Path, tiny_model: Path, tmp_path: Path, batch: MicroBatch, positions: str
) -> None:
    """By the rules of transformers' script. Encoder positions are left out where readers compute the same."""
    folder, out = tmp_path / "base", tmp_path / "mistral"
    shutil.copytree(tiny_model, folder)
    weights = dict(read_file(folder / "model.safetensors"))
    if positions == "usual":
        weights[mistral_names.EMBED_POSITIONS] = mistral_names.sinusoids(100, 128)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        (folder / "params.json").write_text('{"dim": "the original"}')
    source = find_source(run, "", str(folder))
    export(source, "mistral", out, "")
    original = (out / "params.json").read_text() == '{"dim": "the original"}'
    assert original == (positions != "usual"), "the base's own settings where it has any"
    stored, state = dict(read_file(out / "consolidated.safetensors")), {}
    extra = "mm_whisper_embeddings.whisper_encoder.embed_positions.weight"
    assert (extra in stored) == (positions != "usual")
    state[mistral_names.EMBED_POSITIONS] = stored.pop(extra, mistral_names.sinusoids(100, 128))
    for name, tensor in stored.items():
        new, rows = converted(name), len(tensor)
        heads = (
            {"q_proj": 4, "k_proj": 2}.get(new.split(".")[-2], 0) if new.startswith("language_model") else 0
        )
        state[new] = (
            tensor.view(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(rows, -1)
            if heads
            else tensor
        )
    plain, info = VoxtralForConditionalGeneration.from_pretrained(
        None, config=modeling.read_config(str(folder)), state_dict=state, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert float((stock_logits(plain.eval(), batch) - logits_of(source, batch)).abs().max()) < 1e-4
    job = Job(BaseWeights.open(folder), "", source.adapter, Trained.read(source.adapter), None)
    exact = {name: job.weight(name) for name in job.specs}
    assert state.keys() == exact.keys()
    assert all(torch.equal(t, exact[n]) for n, t in state.items() if n != mistral_names.EMBED_POSITIONS)
    assert (out / "tekken.json").read_bytes() == (folder / "tekken.json").read_bytes()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "form", ["lora", pytest.param("dora", marks=SLOW), pytest.param("encoder", marks=SLOW)]
)
def test_adapter_loads_with_plain_peft(
    tiny_model: Path, tmp_path: Path, batch: MicroBatch, form: str
) -> None:
    model, out = tuned(tiny_model, **FORMS[form]), tmp_path / "out"
    source = source_of(model, tiny_model, tmp_path / "adapter")
    export(source, "adapter", out, "")
    loaded = peft.PeftModel.from_pretrained(base(tiny_model), str(out))
    assert torch.equal(stock_logits(loaded, batch), stock_logits(model, batch))
    assert str(tmp_path) not in "".join(p.read_text() for p in out.glob("*.json"))
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_model.name


VLLM_MODULES = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
VLLM_KEYS = {
    f"base_model.model.language_model.model.layers.{layer}.{module}.lora_{half}.weight"
    for layer in (0, 1)
    for module in VLLM_MODULES
    for half in "AB"
}
"""What vLLM looks up: its module names, which begin with ``language_model.model.layers``."""


def test_vllm_adapter_has_the_names_and_settings_that_vllm_reads(text_run: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "vllm", find_source(text_run, "", "")
    proof = export(source, "vllm-lora", out, "")
    tensors, trained = load_file(out / adapter.WEIGHTS_FILE), load_file(source.adapter / adapter.WEIGHTS_FILE)
    assert tensors.keys() == VLLM_KEYS and proof and proof.largest_difference == 0
    for name, tensor in tensors.items():
        old = name.replace("model.language_model.model.layers", "model.model.language_model.layers")
        assert torch.equal(tensor, trained[old])
    config = json.loads((out / "adapter_config.json").read_text())
    read = {n: config[n] for n in ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "modules_to_save")}
    assert read == {
        "r": 4,
        "lora_alpha": 8.0,
        "use_rslora": True,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
    }
    assert sorted(config["target_modules"]) == sorted(m.split(".")[1] for m in VLLM_MODULES)
