"""The training loss: cross-entropy with label smoothing, summed in fp32, over label positions alone.

The libraries' own smoothing is ignored or unshifted for Voxtral, so this is written out. Shifting is not done here:
the collator pairs each label with the position that predicts it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""The field's mark of a position without a label, used where labels are shown."""

HEAD_CHUNK = 1024
"""Label positions per call of the head: bounds the logits at 1,024 x vocabulary."""


def smoothed_nll(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Label-smoothed negative log-likelihood (Szegedy et al. 2016, section 7), in nats.

    ``(1 - s) * -log p[label] + s * mean over the vocabulary of -log p``, the definition of
    ``torch.nn.CrossEntropyLoss(label_smoothing=s)``.

    Args:
        logits: [P, vocabulary], any floating type.
        labels: int64 [P].
        smoothing: s in [0, 1).

    Returns:
        float32 [P].
    """
    return torch.nn.functional.cross_entropy(
        logits.float(), labels, reduction="none", label_smoothing=smoothing
    )


def head_nll(
    head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Loss of each label position, the logits made in chunks that do not outlive their turn.

    Below a frozen head the gradient is taken in that turn too; below one that trains, the backward pass makes the
    logits again.

    Args:
        head: maps [p, hidden size] to [p, vocabulary].
        hidden: [P, hidden size], the states that predict the labels.
        labels: int64 [P].
        smoothing: label smoothing in [0, 1).

    Returns:
        float32 [P].
    """
    if hidden.requires_grad and not any(p.requires_grad for p in head.parameters()):
        nll: torch.Tensor = _FrozenHead.apply(hidden, labels, head, smoothing)
        return nll

    def chunk_nll(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return smoothed_nll(head(states), targets, smoothing)

    parts = [
        cast(
            torch.Tensor,
            checkpoint(chunk_nll, states, targets, use_reentrant=False, preserve_rng_state=False),
        )
        for states, targets in zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK), strict=True)
    ]
    return torch.cat(parts)


class _FrozenHead(torch.autograd.Function):
    """:func:`head_nll` with the gradient of each chunk's states taken while its logits are there.

    The loss of a position depends on its own state alone, so what comes from above scales that state's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: torch.nn.Module, smoothing: float
    ) -> torch.Tensor:
        nll, gradients = [], []
        for states, targets in zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK), strict=True):
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                part = smoothed_nll(head(leaf), targets, smoothing)
                part.sum().backward()
            gradients.append(leaf.grad)
            nll.append(part.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(nll)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * above[:, None]).to(gradient.dtype), None, None, None
