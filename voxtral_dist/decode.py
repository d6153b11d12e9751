"""Greedy decoding of a batch: the encoder once per sample, a KV cache, and finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from voxtral_dist.model import embed, unwrap


@torch.inference_mode()
def greedy_decode(
    model: Any,
    input_ids: torch.Tensor,
    prompt_lengths: Sequence[int],
    audio: torch.Tensor | None,
    audio_index: torch.Tensor,
    *,
    eos_id: int,
    max_new_tokens: Sequence[int],
) -> list[list[int]]:
    """Most likely token after token until ``</s>`` or the limit.

    Args:
        model: ``VoxtralForConditionalGeneration`` or the ``PeftModel`` around it, in eval mode.
        input_ids: int64 [B, L], prompts padded on the left.
        prompt_lengths: B numbers of positions without padding.
        audio: float32 [C, mel bins, frames], or None.
        audio_index: int64 [C x tokens per chunk], flat positions of the audio slots.
        eos_id: the token that ends an answer.
        max_new_tokens: B limits, at least 1 each.

    Returns:
        B lists of new token ids without ``</s>``.
    """
    from transformers import DynamicCache

    voxtral, device = unwrap(model), input_ids.device
    width = input_ids.shape[1]
    mask = torch.arange(width, device=device) >= width - torch.tensor(prompt_lengths, device=device)[:, None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {"inputs_embeds": embed(voxtral, input_ids, audio, audio_index)}
    cache = DynamicCache()
    answers: list[list[int]] = [[] for _ in prompt_lengths]
    alive = list(range(len(prompt_lengths)))
    while alive:
        out = voxtral.model.language_model(
            **inputs,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        token = voxtral.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
        keep = []
        for place, (row, new) in enumerate(zip(alive, token.tolist(), strict=True)):
            if new != eos_id:
                answers[row].append(new)
                if len(answers[row]) < max_new_tokens[row]:
                    keep.append(place)
        if len(keep) < len(alive):
            rows = torch.tensor(keep, device=device, dtype=torch.long)
            alive = [alive[place] for place in keep]
            token, mask, positions = token[rows], mask[rows], positions[rows]
            cache.batch_select_indices(rows)
        inputs = {"inputs_embeds": voxtral.get_input_embeddings()(token[:, None])}
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        positions = positions[:, -1:] + 1
    return answers
