"""Packed rows and padded rows give the same losses and gradients, whatever stands together in a row."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_gradient import build, make_examples
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from voxtral_dist import packed_attention
from voxtral_dist.batch import MicroBatch
from voxtral_dist.model import checkpoint_layers
from voxtral_dist.packed_attention import kernel_error, kernel_is_right


def test_the_kernel_sees_what_the_mask_sees(tiny_model: Path) -> None:
    """On a CPU the kernel has no backward pass, so losses are compared; where there is CUDA a run compares both."""
    training, collator = build(str(tiny_model))
    examples = make_examples(collator.spec)
    packed = collator.train_batch(examples, 0, packed=True)
    with torch.no_grad():
        expected = training(packed)
        training.packed_kernel = True
        got = training(packed)
        padded = training(collator.train_batch(examples, 0))
    torch.testing.assert_close(got.task_nll, expected.task_nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded.task_nll, expected.task_nll, rtol=1e-5, atol=1e-6)
    assert training.voxtral.model.language_model.config._attn_implementation != "flex_attention"


def test_recomputed_layers_attend_as_in_the_forward_pass(tiny_model: Path) -> None:
    """The backward pass comes when the block is over; a kernel's block mask would mean nothing to another attention."""
    training, collator = build(str(tiny_model))
    checkpoint_layers(training.voxtral)
    language_model, calls = training.voxtral.model.language_model, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    training.train()
    with packed_attention.attention(language_model, "spy"):
        loss = training(collator.train_batch(make_examples(collator.spec)[:2], 0)).loss
    layers = language_model.config.num_hidden_layers
    assert len(calls) == layers
    loss.backward()
    assert len(calls) == 2 * layers


@pytest.mark.parametrize("heads", [(4, 4), (32, 8)])
def test_the_check_before_a_run(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=64, hidden_size=0
    )
    cpu = torch.device("cpu")
    assert kernel_error(cpu, config, torch.float32, backward=False) < 1e-5
    assert not kernel_is_right(cpu, config, torch.float32)
    wrong = packed_attention.block_causal_blocks
    monkeypatch.setattr(
        packed_attention, "block_causal_blocks", lambda p: wrong(torch.arange(p.shape[1])[None])
    )
    assert kernel_error(cpu, config, torch.float32, backward=False) > 0.1, "one example over the whole row"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_is_right_on_a_gpu() -> None:
    config = SimpleNamespace(num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_size=0)
    assert kernel_is_right(torch.device("cuda"), config, torch.bfloat16)


def gradients(
    training: torch.nn.Module, batches: list[MicroBatch]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    training.zero_grad(set_to_none=True)
    sums = torch.zeros(3)
    for batch in batches:
        result = training(batch)
        result.loss.backward()
        sums += result.task_nll
    return sums, {n: p.grad.clone() for n, p in training.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [4, 0, 6, 2], [5], [1, 2], [6, 5, 4, 3]])
def test_packed_equals_padded(tiny_model: Path, order: list[int]) -> None:
    training, collator = build(str(tiny_model))
    examples = [make_examples(collator.spec)[i] for i in order]
    packed = collator.train_batch(examples, 0, packed=True)
    assert packed.input_ids.shape == (1, packed.tokens)
    expected = gradients(training, [collator.train_batch(examples, 0)])
    alone = gradients(training, [collator.train_batch([example], 0) for example in examples])
    got = gradients(training, [packed])
    for reference in (expected, alone):
        torch.testing.assert_close(got[0], reference[0], rtol=1e-5, atol=1e-6)
        assert set(got[1]) == set(reference[1])
        for name, gradient in reference[1].items():
            assert float((got[1][name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name
