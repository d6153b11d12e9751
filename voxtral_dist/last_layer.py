"""The last decoder layer, which computes after its attention only the positions that somebody reads.

A training step reads the positions that predict a label, about a fifth of them. What the last layer's MLP makes of
the others goes nowhere, and neither does a gradient to it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class LastLayer(LlamaDecoderLayer):
    """transformers' layer; told what is read, it returns that alone."""

    def forward(
        self, hidden_states: torch.Tensor, *, read: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The layer's output.

        Args:
            hidden_states: [B, L, hidden size].
            read: int64 [P], flat positions whose output is wanted; None: all.
            kwargs: as the stock layer takes them.

        Returns:
            [P, hidden size], or [B, L, hidden size] where all is wanted.
        """
        if read is None:
            out: torch.Tensor = super().forward(hidden_states, **kwargs)
            return out
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        states = (hidden_states + attended).flatten(0, 1)[read]
        read_out: torch.Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return read_out


def install(voxtral: Any) -> None:
    """Let the language model of a ``VoxtralForConditionalGeneration`` take ``read``."""
    voxtral.model.language_model.layers[-1].__class__ = LastLayer
