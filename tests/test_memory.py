"""The memory estimate against counted bytes: the real model's saved tensors, the released weights, a real cache."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gradient import LORA
from test_model import base
from transformers import VoxtralConfig

from voxtral_dist import adapter, memory, step_memory
from voxtral_dist import model as modeling
from voxtral_dist.batch import DecodeCaps
from voxtral_dist.config import TrainConfig
from voxtral_dist.decode import Prompts, decode_stream
from voxtral_dist.step_memory import LiveBytes, Shape

SMALL_24B = {
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
"""The language model of Voxtral-Small-24B-2507; its encoder is Mini's."""


def small_24b() -> VoxtralConfig:
    return VoxtralConfig(text_config={"model_type": "llama", **SMALL_24B})


# activations


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes by storage of what of this is a tensor."""
    found = [t.untyped_storage() for t in tensors if issubclass(type(t), torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class Saved:
    """A tensor that autograd saved, for as long as the graph is there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_bytes(training: modeling.TrainingModel, shape: Shape, bf16: bool) -> int:
    """Bytes that a real forward pass leaves: what autograd saved, and what Python still holds for recomputation."""
    batch = step_memory.micro_batch(shape, training.voxtral.config)
    gc.collect()
    before = storages([*gc.get_objects(), *training.parameters(), *training.buffers()])
    graph = weakref.WeakSet[Saved]()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor.detach())
        graph.add(saved)
        return saved

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        result = training(batch)
    after = storages([*(saved.tensor for saved in graph), *gc.get_objects()])
    assert result.loss.requires_grad
    return sum(size for key, size in after.items() if key not in before)


CASES: dict[str, tuple[Shape, dict[str, Any], set[str]]] = {
    "audio and text": (Shape(4, 90, 8, 120), {}, set()),
    "text alone": (Shape(2, 300, 0, 600), {}, set()),
    "recomputed": (Shape(8, 120, 8, 500), {}, {"grad_ckpt"}),
    "packed": (Shape(6, 100, 6, 90, packed=True), {}, set()),
    "dropout, bf16": (Shape(2, 60, 2, 40), {"dropout": 0.1}, {"bf16"}),
    "dora": (Shape(4, 90, 4, 50), {"dora": True}, set()),
    "language model": (Shape(4, 90, 4, 50), {"tune": "language_model"}, set()),
    "encoder": (Shape(4, 90, 8, 50), {"freeze_whisper": False}, set()),
}
SLOW = ("text alone", "dora", "language model", "packed", "encoder")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_kept_activations_are_those_that_are_counted(tiny_model: Path, name: str) -> None:
    shape, lora, flags = CASES[name]
    settings, bf16, grad_ckpt = replace(LORA, **lora), "bf16" in flags, "grad_ckpt" in flags
    voxtral = modeling.load(str(tiny_model), torch.bfloat16 if bf16 else torch.float32)
    training = modeling.TrainingModel(adapter.attach(voxtral, settings), 1).train()
    if grad_ckpt:
        modeling.checkpoint_layers(training.voxtral)
    with step_memory.fused_dropout():
        counted = kept_bytes(training, shape, bf16)
    config = modeling.read_config(str(tiny_model))
    weightless = step_memory.weightless(config, settings, bf16=bf16, grad_ckpt=grad_ckpt)
    found = step_memory.trace(weightless, shape, bf16=bf16)
    assert found.kept == pytest.approx(counted, rel=0.1)
    assert found.peak >= found.kept


@pytest.mark.slow
def test_recomputation_keeps_little_and_a_packed_row_needs_no_mask(tiny_model: Path) -> None:
    config = modeling.read_config(str(tiny_model))

    def kept(grad_ckpt: bool, packed: bool) -> int:
        training = step_memory.weightless(config, LORA, bf16=True, grad_ckpt=grad_ckpt)
        return step_memory.trace(training, Shape(8, 128, 8, 100, packed), bf16=True).kept

    all_kept = kept(False, False)
    assert kept(True, False) < 0.4 * all_kept
    assert kept(False, True) == pytest.approx(all_kept, rel=0.02)


@pytest.mark.slow
def test_no_micro_batch_of_as_many_positions_takes_more(tiny_model: Path) -> None:
    """Text alone, one recording, short clips, tiny rows."""
    config = modeling.read_config(str(tiny_model))

    def peak(shape: Shape) -> int:
        return step_memory.trace(step_memory.weightless(config, LORA, bf16=True), shape, bf16=True).peak

    others = [Shape(7, 131, 0, 917), Shape(1, 1000, 39, 20), Shape(10, 100, 30, 200), Shape(500, 2, 0, 500)]
    assert max(map(peak, others)) <= 1.02 * peak(Shape.worst(1000, 250, config))


# weights


def test_weights_of_the_released_models() -> None:
    """Their parameter counts, two bytes each; the encoder's positions are in four."""
    for config, count in ((VoxtralConfig(), 4_676_271_104), (small_24b(), 24_261_800_960)):
        training = step_memory.weightless(config, LORA, bf16=True)
        frozen = memory.states(training, TrainConfig(), 1, bf16=True).frozen
        assert sum(frozen.values()) == 2 * count + 2 * 1500 * 1280
        linears = config.text_config.num_hidden_layers * (
            2 * config.text_config.hidden_size * 128 * (32 + 8)
            + 3 * config.text_config.hidden_size * config.text_config.intermediate_size
        )
        four = memory.states(training, TrainConfig(load_in_4bit=True), 1, bf16=True).frozen
        saved = sum(frozen.values()) - sum(four.values())
        assert saved == pytest.approx(linears * (2 - memory.FOUR_BIT_BYTES), rel=1e-6)


# decoding


def test_cache_of_decoding(tiny_model: Path) -> None:
    voxtral, sizes = base(tiny_model), []

    def watch(_module: Any, _args: Any, inputs: Any, _out: Any) -> None:
        layers = inputs["past_key_values"].layers
        sizes.append(sum(t.untyped_storage().nbytes() for x in layers for t in (x.keys, x.values)))

    hook = voxtral.model.language_model.register_forward_hook(watch, with_kwargs=True)
    ids = torch.full((5, 60), 1001)
    prompts = Prompts(ids, [60] * 5, None, ids.new_zeros(0), [4] * 5)
    list(decode_stream(voxtral, [prompts], DecodeCaps(5, 5 * 64), eos_id=2))
    hook.remove()
    assert max(sizes) == pytest.approx(5 * 64 * memory.cache_bytes(voxtral.config, bf16=False), rel=0.1)


# counting


def test_live_bytes_come_and_go() -> None:
    held = [torch.zeros(10)]
    with LiveBytes(held) as live:
        first = torch.zeros(100)
        view = first[10:]
        assert live.live == 440
        del first
        assert live.live == 440 and len(view) == 90
        del view
        assert live.live == 40
        live.phase("more")
        torch.zeros(1000)
    assert live.peaks == {"": 440, "more": 4040}
    with pytest.raises(torch.OutOfMemoryError), LiveBytes(limit=100):
        torch.zeros(100)


def test_shape_of_the_flags(tiny_model: Path) -> None:
    """Rows bound the padded form, positions the packed one; one long example may exceed both."""
    config = modeling.read_config(str(tiny_model))
    flags = TrainConfig(per_device_bsz=4, max_len=100, packed=False)
    assert memory.largest_shape(flags, config).positions == 400
    assert memory.largest_shape(replace(flags, max_tokens_per_micro_batch=900), config).positions == 400
    packed = replace(flags, max_tokens_per_micro_batch=900, packed=True)
    assert memory.largest_shape(packed, config).positions == 900
    assert memory.largest_shape(replace(flags, max_tokens_per_micro_batch=30), config).positions == 100
    assert Shape.worst(900, 500, config) == Shape(2, 450, 34, 900)
