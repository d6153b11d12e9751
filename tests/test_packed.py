"""Packed rows and padded rows give the same losses and gradients, whatever stands together in a row."""

from itertools import pairwise
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
from voxtral_dist.packed_attention import FLEX, MASK, SPLIT, VARLEN, best_kernel, kernel_error, varlen_options

CPU = torch.device("cpu")


def varlen_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What PyTorch's documentation says of varlen_attn, which has no CPU kernel: each example by itself."""
    ends = cu_seq_q.tolist()
    assert (
        ends == cu_seq_k.tolist()
        and ends[-1] == len(query)
        and window_size == (-1, 0)
        and cu_seq_q.dtype is torch.int32
    )
    parts = []
    for first, last in pairwise(ends):
        assert 0 < last - first <= max_q == max_k
        q, k, v = (each[first:last].transpose(0, 1) for each in (query, key, value))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
            ).transpose(0, 1)
        )
    return torch.cat(parts)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """varlen_attn for a CPU."""
    monkeypatch.setattr(packed_attention, "varlen_attn", varlen_on_cpu)


@pytest.mark.parametrize("kernel", [SPLIT, FLEX, VARLEN])
def test_the_kernel_sees_what_the_mask_sees(tiny_model: Path, varlen: None, kernel: str) -> None:
    """On a CPU flex_attention has no backward pass, so losses are compared; where there is CUDA a run compares both."""
    training, collator = build(str(tiny_model))
    examples = make_examples(collator.spec)
    packed = collator.train_batch(examples, 0, packed=True)
    training.packed_kernel = MASK
    with torch.no_grad():
        expected = training(packed)
        training.packed_kernel = kernel
        got = training(packed)
        padded = training(collator.train_batch(examples, 0))
    torch.testing.assert_close(got.task_nll, expected.task_nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded.task_nll, expected.task_nll, rtol=1e-5, atol=1e-6)
    assert training.voxtral.model.language_model.config._attn_implementation != kernel


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


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kernel", [SPLIT, VARLEN])
def test_gradients_by_the_lengths_are_those_by_the_mask(
    tiny_model: Path, varlen: None, checkpointed: bool, kernel: str
) -> None:
    training, collator = build(str(tiny_model))
    batch = collator.train_batch(make_examples(collator.spec), 0, packed=True)
    training.packed_kernel = MASK
    expected = gradients(training, [batch])
    if checkpointed:
        checkpoint_layers(training.voxtral)
        training.train()
    training.packed_kernel = kernel
    found = gradients(training, [batch])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


def test_lengths_of_a_row() -> None:
    positions = torch.cat([torch.arange(length) for length in (3, 1, 5)])[None]
    options = varlen_options(positions)
    assert options["cu_seq_lens_q"].tolist() == [0, 3, 4, 9] and options["max_length_q"] == 8


def heads(query: int, key: int, size: int = 64) -> SimpleNamespace:
    return SimpleNamespace(num_attention_heads=query, num_key_value_heads=key, head_dim=size, hidden_size=0)


@pytest.mark.parametrize("config", [heads(4, 4), heads(32, 8)])
@pytest.mark.parametrize("kernel", [FLEX, VARLEN])
def test_the_check_before_a_run(
    config: SimpleNamespace, kernel: str, varlen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel_error(kernel, CPU, config, torch.float32, backward=kernel == VARLEN) < 1e-5
    right = packed_attention.packed_options
    monkeypatch.setattr(
        packed_attention, "packed_options", lambda p, kind: right(torch.arange(p.shape[1])[None], kind)
    )
    error = kernel_error(kernel, CPU, config, torch.float32, backward=False)
    assert error > 0.1, "one example over the whole row"


def test_gradients_that_are_not_finite_are_wrong(varlen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_attention.varlen_attn

    def spoilt(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        out.register_hook(lambda gradient: gradient * float("nan"))
        return out

    monkeypatch.setattr(packed_attention, "varlen_attn", spoilt)
    assert kernel_error(VARLEN, CPU, heads(4, 4), torch.float32) == float("inf")


def test_an_error_without_words_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> float:
        raise AssertionError

    monkeypatch.setattr(packed_attention, "kernel_error", fail)
    assert best_kernel(torch.device("cuda"), heads(4, 4), torch.bfloat16) == SPLIT
    assert [record.getMessage()[-16:] for record in caplog.records] == ["AssertionError: "] * 2


def test_a_device_without_kernels_splits_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device that is not there runs neither."""
    assert best_kernel(CPU, heads(4, 4), torch.bfloat16) == SPLIT
    if not torch.cuda.is_available():
        assert best_kernel(torch.device("cuda"), heads(4, 4), torch.bfloat16) == SPLIT
    tried: list[str] = []
    monkeypatch.setattr(
        packed_attention, "kernel_error", lambda kernel, *_: tried.append(kernel) or float(kernel == VARLEN)
    )
    assert best_kernel(torch.device("cuda"), heads(4, 4), torch.bfloat16) == FLEX and tried == [VARLEN, FLEX]
    assert best_kernel(torch.device("cuda"), heads(4, 4), torch.float32) == FLEX and tried[2:] == [FLEX]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [FLEX, VARLEN])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_is_right_on_a_gpu(kernel: str) -> None:
    cuda, config = torch.device("cuda"), heads(32, 8, 128)
    assert kernel_error(kernel, cuda, config, torch.bfloat16) < packed_attention.TOLERANCE[torch.bfloat16]
    assert best_kernel(cuda, config, torch.bfloat16) == VARLEN


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
