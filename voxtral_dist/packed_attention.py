"""Attention within the examples of a packed row: by a mask on any device, by a kernel where it proves right.

The kernel is PyTorch's flex_attention as transformers calls it. It skips the blocks between examples, which the mask
computes and throws away; it has no backward pass on a CPU. Before a run uses it, one small row goes through both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.integrations.flex_attention import flex_attention_forward

from voxtral_dist.logger import get_logger

CHECKED_LENGTHS = (70, 1, 130, 55)
"""Lengths of the examples in the row that is compared; blocks have 128 positions."""

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}
"""Largest error of output and gradients, relative to the largest value, by type; a float32 kernel may use TF32."""

log = get_logger(__name__)


def block_causal_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """Mask of a packed row: each position sees the earlier positions of its own example and itself.

    Args:
        position_ids: int64 [1, L], starting again at 0 with each example.

    Returns:
        bool [1, 1, L, L], True where attention is allowed.
    """
    example = (position_ids[0] == 0).cumsum(0)
    return ((example[:, None] == example[None, :]).tril())[None, None]


def block_causal_blocks(position_ids: torch.Tensor) -> BlockMask:
    """The same as :func:`block_causal_mask`, as the kernel wants it."""
    example = (position_ids[0] == 0).cumsum(0)

    def allowed(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (example[query] == example[key])

    length = position_ids.shape[1]
    return create_block_mask(allowed, None, None, length, length, device=str(position_ids.device))


KERNEL = "flex_attention"
"""Its name in transformers."""


@contextmanager
def attention(language_model: Any, implementation: str) -> Iterator[None]:
    """Let the language model attend in this way inside the block."""
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def kernel_is_right(device: torch.device, text_config: Any, dtype: torch.dtype) -> bool:
    """Whether packed rows can use the kernel here: it runs, forward and backward, and agrees with the mask."""
    if device.type != "cuda":
        return False
    try:
        error = kernel_error(device, text_config, dtype)
    except Exception as failure:  # a compiler that is missing, a shape that is not supported
        log.warning(
            "packed rows use the mask, the kernel does not run here: %s", str(failure).splitlines()[0]
        )
        return False
    if error > TOLERANCE[dtype]:
        log.warning("packed rows use the mask, the kernel is off by %.1e of the largest value", error)
    return error <= TOLERANCE[dtype]


def kernel_error(device: torch.device, text_config: Any, dtype: torch.dtype, backward: bool = True) -> float:
    """Largest difference between kernel and mask, of the output and the gradients, relative to the largest value.

    Args:
        device: where to compare.
        text_config: heads and their sizes.
        dtype: of queries, keys and values; the mask is computed in float32.
        backward: compare the gradients too, which a CPU cannot.
    """
    heads, groups = text_config.num_attention_heads, text_config.num_key_value_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    positions = torch.cat([torch.arange(length) for length in CHECKED_LENGTHS])[None].to(device)
    random = torch.Generator().manual_seed(0)
    shapes = [(1, count, positions.shape[1], size) for count in (heads, groups, groups)]
    values = [torch.randn(shape, generator=random).to(device, dtype) for shape in shapes]
    ours = [value.clone().requires_grad_(backward) for value in values]
    theirs = [value.float().requires_grad_(backward) for value in values]
    module = torch.nn.Module().train()
    got = flex_attention_forward(module, *ours, block_causal_blocks(positions), scaling=size**-0.5)[0]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *theirs, attn_mask=block_causal_mask(positions), scale=size**-0.5, enable_gqa=True
    ).transpose(1, 2)
    pairs = [(got, expected)]
    if backward:
        got.float().square().sum().backward()
        expected.square().sum().backward()
        pairs += [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)
