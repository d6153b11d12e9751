"""The FLOP formula against torch's own counter, at the released size and through a backward pass; peaks of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gradient import LORA, make_examples
from torch.utils.flop_counter import FlopCounterMode
from transformers import VoxtralConfig, VoxtralForConditionalGeneration

from voxtral_dist import adapter, flops, last_layer
from voxtral_dist import model as modeling
from voxtral_dist.audio import AudioSpec
from voxtral_dist.collator import Collator
from voxtral_dist.flops import VoxtralFlops, known_peak, peak
from voxtral_dist.tokenizer import TekkenVocabulary


def in_place_product(to: Any, left: Any, right: Any, **kwargs: Any) -> int:
    """FLOPs of ``addmm_`` from its shapes, which the counter does not know."""
    return int(2 * left[0] * left[1] * right[1])


def counted(call: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counter:
        call()
    return int(counter.get_total_flops())


def of(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_forward_of_the_released_mini_is_exact() -> None:
    """On the meta device, part by part. The counter does not know causality and counts attention twice."""
    config = VoxtralConfig()
    parts = VoxtralFlops.from_config(config)
    with torch.device("meta"), torch.no_grad():
        voxtral = VoxtralForConditionalGeneration(config)
        mel, states = torch.zeros(1, 128, 3000), torch.zeros(375, 5120)
        assert counted(lambda: voxtral.model.audio_tower(mel)) == parts.chunk
        assert counted(lambda: voxtral.model.multi_modal_projector(states)) == parts.projector
        assert counted(lambda: voxtral.lm_head(torch.zeros(7, 3072))) == 7 * parts.label
        last_layer.install(voxtral)
        for n in (100, 400):
            inputs = {
                "inputs_embeds": torch.zeros(1, n, 3072),
                "attention_mask": torch.ones(1, 1, n, n, dtype=torch.bool),
                "position_ids": torch.zeros(1, n, dtype=torch.long),
            }
            for read in (None, torch.arange(7)):
                total = counted(
                    lambda i=inputs, r=read: voxtral.model.language_model(**i, use_cache=False, read=r)
                )
                labels = n if read is None else 7
                expected = n * parts.token + 2 * n * n * parts.squared_token + labels * parts.last_mlp
                assert total == pytest.approx(expected, rel=1e-4)


def test_training_with_lora(tiny_model: Path) -> None:
    """Forward and backward through the trained model. The formula's two small generosities, together 0.2 % of a clip at
    the released size, are taken off: the gradient of the encoder's output, and the adapters of the last MLP."""
    voxtral = modeling.load(str(tiny_model), torch.float32)
    voxtral.set_attn_implementation("eager")  # the counter does not know the CPU's fused kernel
    collator = Collator(TekkenVocabulary.load(str(tiny_model)), AudioSpec.from_config(voxtral.config))
    batch = collator.train_batch([make_examples(collator.spec)[4]], 0)
    training = modeling.TrainingModel(adapter.attach(voxtral, LORA), 3).train()

    def step() -> None:
        training(batch).loss.backward()

    total = counted(step)
    assert batch.audio is not None and len(batch.audio) == 2
    parts, n = VoxtralFlops.from_config(voxtral.config), batch.tokens
    lora = {name: p.numel() for name, p in training.named_parameters() if p.requires_grad}
    of_projector = sum(size for name, size in lora.items() if "projector" in name)
    needed = parts.training(
        of(n), of(2), of(len(batch.labels)), lora_parameters=sum(lora.values()) - of_projector
    )
    again = 3 * n * n * parts.squared_token  # no causality
    slots, last = len(batch.audio_index), f"layers.{len(voxtral.model.language_model.layers) - 1}.mlp"
    of_last = sum(size for name, size in lora.items() if last in name)
    of_adapter = 6 * (of_projector * slots - of_last * (n - len(batch.labels)))
    unneeded = 2 * slots * voxtral.model.multi_modal_projector.linear_1.base_layer.weight.numel()
    assert needed + again + of_adapter - unneeded == pytest.approx(total, rel=0.002)


def test_training_counts_each_example_by_itself() -> None:
    parts = VoxtralFlops.from_config(VoxtralConfig())
    clip = parts.training(of(428), of(1), of(46))
    assert clip == pytest.approx(7.9e12, rel=0.01)
    assert parts.training(of(428, 428), of(1, 1), of(46, 46)) == 2 * clip
    assert parts.training(of(856), of(2), of(92)) > 2 * clip, "attention grows with the square of an example"
    assert parts.training(of(428), of(1), of(46), encoder_trains=True) - clip == 2 * parts.chunk
    assert parts.training(of(428), of(1), of(46), lora_parameters=10) - clip == 6 * 10 * 428
    trained = parts.training(of(428), of(1), of(46), language_model_trains=True)
    assert trained - clip == 428 * parts.token + 46 * parts.last_mlp
    assert parts.training(of(), of(), of()) == 0


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_known_peaks(name: str, teraflops: float) -> None:
    assert known_peak(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla V100-SXM2-32GB",
        "",
    ],
)
def test_another_card_is_not_taken_for_a_known_one(name: str) -> None:
    assert known_peak(name) is None


def test_peak_of_a_known_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = peak(torch.device("cuda", 0))
    assert found.flops == 989e12 and found.source == "dense bf16, data sheet of NVIDIA H200"


def test_peak_of_this_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flops.MEASURE_SECONDS, "cpu", 0.02)
    found = peak(torch.device("cpu"))
    assert 1e8 < found.flops < 1e14 and "float32 product of 512 x 512" in found.source


@pytest.mark.gpu
def test_peak_of_a_real_device_is_above_what_is_measured() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    measured = flops.measured_peak(device, "it").flops
    assert measured > 1e12
    assert measured < 1.02 * (known_peak(torch.cuda.get_device_name(device)) or float("inf"))
