"""The last layer on the positions that are read, and the head below which the gradient is taken at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_gradient import build, make_examples
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from voxtral_dist import loss
from voxtral_dist import model as modeling
from voxtral_dist.loss import head_nll


class Whole(LlamaDecoderLayer):
    """The stock layer on all positions, of which the same is returned."""

    def forward(
        self, hidden_states: torch.Tensor, read: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        out = super().forward(hidden_states, **kwargs)
        return out if read is None else out.flatten(0, 1)[read]


def step(training: modeling.TrainingModel, batch: Any) -> dict[str, torch.Tensor]:
    training.zero_grad(set_to_none=True)
    found = training(batch).loss
    found.backward()
    gradients = {name: p.grad.clone() for name, p in training.named_parameters() if p.grad is not None}
    return {"loss": found.detach()} | gradients


@pytest.mark.parametrize("grad_ckpt", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradient_are_those_of_the_whole_layer(
    tiny_model: Path, packed: bool, grad_ckpt: bool
) -> None:
    training, collator = build(str(tiny_model))
    if grad_ckpt:
        modeling.checkpoint_layers(training.voxtral)
    batch = collator.train_batch(make_examples(collator.spec), 0, packed)
    found = step(training.train(), batch)
    training.voxtral.model.language_model.layers[-1].__class__ = Whole
    expected = step(training, batch)
    assert found.keys() == expected.keys() and any("mlp" in name for name in found)
    for name, value in found.items():
        assert float((value - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()), name


def test_the_last_mlp_sees_the_label_positions_alone(tiny_model: Path) -> None:
    training, collator = build(str(tiny_model))
    batch = collator.train_batch(make_examples(collator.spec), 0)
    seen: list[int] = []
    for layer in training.voxtral.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda mlp, args, out: seen.append(args[0].shape[:-1].numel()))
    training(batch)
    assert seen == [batch.input_ids.numel()] * (len(seen) - 1) + [len(batch.labels)]
    assert len(batch.labels) < batch.input_ids.numel() / 2


class Head(torch.nn.Linear):
    """A head that counts its calls."""

    calls = 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(states)


Found = tuple[torch.Tensor, torch.Tensor, int]


def run(head: Head, states: torch.Tensor, labels: torch.Tensor, bf16: bool = False) -> Found:
    """Losses, gradient of a weighted sum of them to the states, and calls of the head."""
    head.calls, leaf = 0, states.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        nll = head_nll(head, leaf, labels, 0.1)
    (nll * torch.linspace(-1, 2, len(nll))).sum().backward()
    return nll.detach(), leaf.grad, head.calls


def plain(head: Head, states: torch.Tensor, labels: torch.Tensor) -> Found:
    leaf = states.float().clone().requires_grad_()
    logits = torch.nn.functional.linear(leaf, head.weight.float(), head.bias.float())
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    (nll * torch.linspace(-1, 2, len(nll))).sum().backward()
    return nll.detach(), leaf.grad, 1


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> tuple[Head, torch.Tensor, torch.Tensor]:
    """A frozen head, and states and labels that fill two chunks and a bit."""
    monkeypatch.setattr(loss, "HEAD_CHUNK", 8)
    torch.manual_seed(3)
    return Head(32, 50).requires_grad_(False), torch.randn(19, 32), torch.randint(0, 50, (19,))


def test_a_frozen_head_runs_once(inputs: tuple[Head, torch.Tensor, torch.Tensor]) -> None:
    nll, gradient, calls = run(*inputs)
    expected, theirs, _ = plain(*inputs)
    assert calls == 3, "once per chunk"
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(gradient, theirs)


def test_a_head_that_trains_gets_its_own_gradient(inputs: tuple[Head, torch.Tensor, torch.Tensor]) -> None:
    head = inputs[0].requires_grad_()
    nll, gradient, calls = run(*inputs)
    ours = head.weight.grad
    assert ours is not None and calls == 6, "made again in the backward pass"
    head.weight.grad = None
    expected, theirs, _ = plain(*inputs)
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(gradient, theirs)
    torch.testing.assert_close(ours, head.weight.grad)


def test_a_bfloat16_head_gives_a_bfloat16_gradient(inputs: tuple[Head, torch.Tensor, torch.Tensor]) -> None:
    head, states, labels = inputs
    head.bfloat16()
    nll, gradient, _ = run(head, states.bfloat16(), labels, bf16=True)
    expected, theirs, _ = plain(head, states.bfloat16(), labels)
    assert nll.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(nll, expected, rtol=0.02, atol=0.02)
    assert float((gradient.float() - theirs).norm() / theirs.norm()) < 0.01


def test_without_gradients_nothing_is_kept(inputs: tuple[Head, torch.Tensor, torch.Tensor]) -> None:
    head, states, labels = inputs
    with torch.no_grad():
        nll = head_nll(head, states, labels, 0.1)
    assert not nll.requires_grad and head.calls == 3
    torch.testing.assert_close(nll, plain(*inputs)[0])
