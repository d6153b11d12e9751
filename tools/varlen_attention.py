"""PyTorch's varlen_attn for packed rows, as an attention of transformers: an arm of ``tools/bench_train_step.py``

It takes the lengths of the examples instead of a mask, computes no block between them, and needs no compiler. It runs
on CUDA alone. Its arguments differ between PyTorch 2.11 and later ones.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

VARLEN = "voxtral_dist_varlen"
"""Its name in transformers."""

_KNOWN = set(inspect.signature(varlen_attn).parameters)
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _KNOWN else {"is_causal": True}


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
    """Causal attention within each example of one row.

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
    if "enable_gqa" in _KNOWN:
        grouped = {"enable_gqa": True}
    else:
        groups, grouped = query.shape[1] // key.shape[1], {}
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    ends = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(query, key, value, *ends, scale=scaling, **_CAUSAL, **grouped)[None], None


AttentionInterface.register(VARLEN, varlen_forward)
AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)


def varlen_options(position_ids: torch.Tensor) -> dict[str, Any]:
    """What :func:`varlen_forward` wants to know of a packed row, as arguments of the language model.

    Args:
        position_ids: int64 [1, L], starting again at 0 with each example.
    """
    starts = (position_ids[0] == 0).nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).int()
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "max_length_q": 1 << (longest - 1).bit_length()}
