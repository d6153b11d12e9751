"""Attention within the examples of a packed row: one example after the other, or by a kernel where it proves right.

What lies between examples is never computed; a mask, which the tests hold all against, would compute it and throw it
away. PyTorch's varlen_attn takes the lengths of the examples, needs no compiler, and runs on CUDA in bfloat16 alone;
flex_attention, as transformers calls it, takes other types too but has no backward pass on a CPU. Before a run uses
one of these, a small row goes through it and the mask. Elsewhere each example attends by a causal product of its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import AttentionMaskInterface

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


MASK, SPLIT, FLEX, VARLEN = "mask", "split", "flex_attention", "varlen_attn"
"""Ways to attend; all but the mask have the same name in transformers."""

_VARLEN_KNOWS = set(inspect.signature(varlen_attn).parameters)
_VARLEN_CAUSAL: dict[str, Any] = (
    {"window_size": (-1, 0)} if "window_size" in _VARLEN_KNOWS else {"is_causal": True}
)
"""Its arguments differ between PyTorch 2.11 and later ones."""


def varlen_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example of a packed row by varlen_attn, as transformers calls it.

    Args:
        module: unused.
        query: bf16 [1, heads, L, head size].
        key: [1, key-value heads, L, head size].
        value: as ``key``.
        attention_mask: unused.
        scaling: of the scores.
        cu_seq_lens_q: int32 [examples + 1], first positions of the examples, and L.
        max_length_q: at least the length of the longest example.
        others: unused.

    Returns:
        [1, L, heads, head size], and None for the attention weights.
    """
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    grouped = {"enable_gqa": True}
    if "enable_gqa" not in _VARLEN_KNOWS:
        groups, grouped = query.shape[1] // key.shape[1], {}
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    ends = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(query, key, value, *ends, scale=scaling, **_VARLEN_CAUSAL, **grouped)[None], None


@torch.compiler.disable
def split_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    example_lengths: torch.Tensor,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one example after the other, on any device; arguments and result as :func:`varlen_forward`.

    Args:
        module: unused.
        query: [1, heads, L, head size].
        key: [1, key-value heads, L, head size].
        value: as ``key``.
        attention_mask: unused.
        scaling: of the scores.
        example_lengths: int64 [examples], in host memory, together L.
        others: unused.
    """
    parts = zip(*(each.split(example_lengths.tolist(), dim=2) for each in (query, key, value)), strict=True)
    attended = [
        torch.nn.functional.scaled_dot_product_attention(
            *part, is_causal=True, scale=scaling, enable_gqa=True
        )
        for part in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


for _kind, _forward in ((VARLEN, varlen_forward), (SPLIT, split_forward)):
    AttentionInterface.register(_kind, _forward)
    AttentionMaskInterface.register(_kind, lambda *args, **kwargs: None)


def varlen_options(position_ids: torch.Tensor) -> dict[str, Any]:
    """What :func:`varlen_forward` wants to know of a packed row.

    Args:
        position_ids: int64 [1, L], starting again at 0 with each example.
    """
    ends = _ends(position_ids).int()
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "max_length_q": 1 << (longest - 1).bit_length()}


def _ends(position_ids: torch.Tensor) -> torch.Tensor:
    """First positions of the examples, and L."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([position_ids.shape[1]])])


def packed_options(position_ids: torch.Tensor, kind: str) -> dict[str, Any]:
    """Arguments of the language model that keep attention within the examples of a packed row.

    Args:
        position_ids: int64 [1, L], starting again at 0 with each example.
        kind: one of :data:`MASK`, :data:`SPLIT`, :data:`FLEX` and :data:`VARLEN`.
    """
    if kind == VARLEN:
        return varlen_options(position_ids)
    if kind == SPLIT:
        return {"example_lengths": _ends(position_ids).diff().cpu()}
    return {"attention_mask": (block_causal_blocks if kind == FLEX else block_causal_mask)(position_ids)}


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


def attending(language_model: Any, kind: str) -> Any:
    """Context in which the language model attends in this way; its own for :data:`MASK`."""
    return nullcontext() if kind == MASK else attention(language_model, kind)


def best_kernel(device: torch.device, text_config: Any, dtype: torch.dtype) -> str:
    """The first kernel that runs here, forward and backward, and is right; without one :data:`SPLIT`."""
    if device.type == "cuda":
        for kernel in (VARLEN, FLEX) if dtype is torch.bfloat16 else (FLEX,):
            if kernel_is_right(kernel, device, text_config, dtype):
                return kernel
    return SPLIT


def kernel_is_right(kernel: str, device: torch.device, text_config: Any, dtype: torch.dtype) -> bool:
    """Whether a kernel runs here, forward and backward, and agrees with the mask."""
    try:
        error = kernel_error(kernel, device, text_config, dtype)
    except Exception as failure:  # a compiler that is missing, a shape that is not supported
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        log.warning("packed rows do without %s, it does not run here: %s", kernel, reason)
        return False
    if error > TOLERANCE[dtype]:
        log.warning("packed rows do without %s, it is off by %.1e of the largest value", kernel, error)
    return error <= TOLERANCE[dtype]


def kernel_error(
    kernel: str, device: torch.device, text_config: Any, dtype: torch.dtype, backward: bool = True
) -> float:
    """Largest difference between kernel and mask, of the output and the gradients, relative to the largest value.

    Args:
        kernel: :data:`FLEX` or :data:`VARLEN`.
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
    got = _attend(kernel, ours, positions, size**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *theirs, attn_mask=block_causal_mask(positions), scale=size**-0.5, enable_gqa=True
    ).transpose(1, 2)
    pairs = [(got.detach(), expected.detach())]
    if backward:
        got.float().square().sum().backward()
        expected.square().sum().backward()
        pairs += [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
    errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _attend(kernel: str, values: list[torch.Tensor], positions: torch.Tensor, scaling: float) -> torch.Tensor:
    """Output [1, L, heads, head size] of a kernel on queries, keys and values [1, heads, L, head size]."""
    options, module = packed_options(positions, kernel), torch.nn.Module().train()
    mask = options.pop("attention_mask", None)
    forward: Any = varlen_forward if kernel == VARLEN else flex_attention_forward
    output: torch.Tensor = forward(module, *values, mask, scaling=scaling, **options)[0]
    return output
