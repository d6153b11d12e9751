"""Gradient truth: one optimizer step under ZeRO-2 equals the one-process gradient of the whole step.

The reference shares no code with the product's loss or step: the stock forward pass with all logits, shifted and
smoothed by torch's cross-entropy, summed, divided by the number of target tokens, clipped by torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from peft.tuners.lora.layer import Linear

from voxtral_dist import adapter, optimizer_state
from voxtral_dist import model as modeling
from voxtral_dist.adapter import LoraSettings
from voxtral_dist.audio import AudioSpec, log_mel
from voxtral_dist.collator import Collator, Example
from voxtral_dist.ds_config import EngineSettings
from voxtral_dist.engine import TrainEngine
from voxtral_dist.lora_linear import LoraLinear
from voxtral_dist.sample import Sample
from voxtral_dist.tokenizer import TekkenVocabulary

SMOOTHING = 0.1
Case = tuple[str, float, bool]
"""Which examples each rank gets, the clipping norm (0: none), activation checkpointing."""

LORA = LoraSettings(r=4, alpha=8.0, dropout=0.0, targets="both", freeze_whisper=True, seed=1)


def make_examples(spec: AudioSpec) -> list[Example]:
    """Seven examples: text, short and two-chunk audio, targets of very different lengths."""
    rng = np.random.default_rng(0)

    def audio(seconds: float) -> tuple[torch.Tensor, int]:
        samples = (rng.standard_normal(int(16000 * seconds)) * 0.1).astype(np.float32)
        return log_mel(samples, spec), len(samples)

    rows = [
        (
            "tqa",
            "What is the largest of three, one and two?",
            "three, because it is more than the others",
            None,
        ),
        ("tqa", "첫 번째 단어는?", "삼", None),
        ("tqa", "Say yes.", "yes", None),
        ("asr", "", "one two three", 1.0),
        ("asr", "", "일 이", 3.0),
        ("sqa", "last?", "three", 0.5),
        ("sqa", "마지막 단어는 무엇입니까?", "구", 1.9),
    ]
    out = []
    for number, (task, prompt, target, seconds) in enumerate(rows):
        mel, n_samples = audio(seconds) if seconds else (None, 0)
        sample = Sample(str(number), task, prompt, (target,), language="ko" if number % 2 else "en")
        out.append(Example(sample, mel, n_samples, ["asr", "sqa", "tqa"].index(task), 1.0, str(number)))
    return out


def build(model_dir: str) -> tuple[modeling.TrainingModel, Collator]:
    """The tiny model with a fresh adapter whose B matrices are not zero, so that every gradient is alive."""
    voxtral = modeling.load(model_dir, torch.float32)
    wrapped = adapter.attach(voxtral, LORA)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    collator = Collator(TekkenVocabulary.load(model_dir), AudioSpec.from_config(voxtral.config))
    return modeling.TrainingModel(wrapped, 3, SMOOTHING), collator


def reference_gradient(model_dir: str, clip: float) -> dict[str, torch.Tensor]:
    """The gradient of the whole step by the stock model with peft's own layers, one example after another."""
    training, collator = build(model_dir)
    model = training.model.train()
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = Linear
    total, count = torch.zeros(()), 0
    for example in make_examples(collator.spec):
        prompt = collator.prompt(example.sample, example.n_samples)
        target = [*collator.vocabulary.encode(example.sample.target), 2]
        ids = torch.tensor([prompt + target])
        labels = torch.tensor([[-100] * len(prompt) + target])
        logits = model(input_ids=ids, input_features=example.mel, use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], reduction="sum", label_smoothing=SMOOTHING, ignore_index=-100
        )
        count += len(target)
    (total / count).backward()
    params = {name: p for name, p in training.named_parameters() if p.requires_grad}
    if clip:
        torch.nn.utils.clip_grad_norm_(list(params.values()), clip)
    return {name: p.grad for name, p in params.items() if p.grad is not None}


def zero2_gradients(rank: int, model_dir: str, cases: list[Case], out: str) -> list[dict[str, Any]]:
    """One engine step per case; Adam's first moment after it is 0.1 x the (clipped) gradient."""
    results = []
    for split, clip, checkpointing in cases:
        training, collator = build(model_dir)
        if checkpointing:
            modeling.checkpoint_layers(training.voxtral)
        examples = make_examples(collator.spec)
        batches = [
            collator.train_batch([examples[i] for i in g], first_draw=g[0]) for g in SPLITS[split][rank]
        ]
        engine = TrainEngine(training, EngineSettings(max_grad_norm=clip))
        result = engine.train_step(batches, learning_rate=1e-3)
        tensors, step = optimizer_state.gather(engine)
        gradient = {
            k.removeprefix("exp_avg/"): v / 0.1 for k, v in tensors.items() if k.startswith("exp_avg/")
        }
        if rank == 0:
            torch.save(gradient, f"{out}/{split} {clip}.pt")
        results.append({"norm": result.grad_norm, "applied": result.applied, "step": step})
    return results


SPLITS = {
    "text | audio": [[[0, 1], [2]], [[3, 4], [5, 6]]],
    "three micro-batches | one": [[[0, 3], [4], [2, 6]], [[1, 5]]],
    "all | none": [[[0, 1, 3], [2, 4, 5, 6]], []],
    "one process": [[[0, 1, 2, 3, 4, 5, 6]]],
}


def relative_errors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert set(got) == set(expected)
    return {name: float((got[name] - g).norm() / g.norm()) for name, g in expected.items()}


CASES: list[Case] = [
    ("text | audio", 0.0, False),
    ("text | audio", 0.5, False),
    ("three micro-batches | one", 0.0, True),
    ("all | none", 0.0, False),
]


@pytest.mark.parametrize("cases", [CASES, [("one process", 0.0, False)]], ids=["two ranks", "one rank"])
def test_step_equals_one_process_reference(tiny_model: Path, tmp_path: Path, cases: list[Case]) -> None:
    world_size = len(SPLITS[cases[0][0]])
    ranks = run_ranks(zero2_gradients, world_size, str(tiny_model), cases, str(tmp_path))
    for (split, clip, _), result, other in zip(cases, ranks[0], ranks[-1], strict=True):
        assert result == other and result["applied"] and result["step"] == 1
        expected = reference_gradient(str(tiny_model), clip)
        errors = relative_errors(torch.load(tmp_path / f"{split} {clip}.pt", weights_only=True), expected)
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < 1e-5, f"{split}, clip {clip}: {worst} is off by {errors[worst]:.2e}"
        norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
        assert (
            norm == pytest.approx(0.5, rel=1e-4) if clip else result["norm"] == pytest.approx(norm, rel=1e-5)
        )


def test_the_test_would_notice(tiny_model: Path) -> None:
    """The step at hand tells right from nearly right: clipped, mean-weighted and unshifted gradients are far off."""
    expected = reference_gradient(str(tiny_model), 0.0)
    clipped = reference_gradient(str(tiny_model), 0.5)
    assert min(relative_errors(clipped, expected).values()) > 0.1
    training, collator = build(str(tiny_model))
    batches = [collator.train_batch([example], 0) for example in make_examples(collator.spec)]
    sum(training(batch).loss / len(batch.labels) for batch in batches).backward()
    mean = {name: p.grad / len(batches) for name, p in training.named_parameters() if p.grad is not None}
    assert max(relative_errors(mean, expected).values()) > 0.1
