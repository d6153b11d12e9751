"""Greedy decoding: the encoder once per sample, a KV cache written in place, and what has ended makes room.

A step costs about the same for one row as for many, so rows must not run empty: :func:`decode_stream` lets the next
prompts in as soon as enough answers have ended, instead of waiting for the longest one. What a row answers does not
depend on its company, up to the rounding of the matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from voxtral_dist.batch import DecodeCaps
from voxtral_dist.model import embed, encode_audio, unwrap

ENDED_SHARE, ROOM = 8, 64
"""The cache is copied when one row in so many has ended, and when so many new tokens have filled it."""


@dataclass(frozen=True)
class Prompts:
    """Prompts that enter together, on the model's device.

    Attributes:
        input_ids: int64 [B, L], padded on the left.
        lengths: B numbers of positions without padding.
        audio: float32 [C, mel bins, frames], or None.
        audio_index: int64 [C x tokens per chunk], flat positions of the audio slots.
        limits: B most new tokens, at least 1 each.
    """

    input_ids: torch.Tensor
    lengths: Sequence[int]
    audio: torch.Tensor | None
    audio_index: torch.Tensor
    limits: Sequence[int]


@dataclass
class Decoded:
    """One answer.

    Attributes:
        number: of its prompt, counted through all groups from 0.
        tokens: new token ids without ``</s>``.
        first_s, last_s: seconds from its entry to its first and last new token, ``</s>`` included.
        positions: positions the language model has computed for it.
        padding: how many of these were of no use: padding of the prompt, and steps after its end.
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0
    positions: int = 0
    padding: int = 0


@torch.inference_mode()
def decode_stream(
    model: Any, groups: Iterable[Prompts], caps: DecodeCaps, *, eos_id: int
) -> Iterator[Decoded]:
    """Answers as they end; a group enters as soon as it fits beside the rows that are still being answered.

    Args:
        model: ``VoxtralForConditionalGeneration`` or the ``PeftModel`` around it, in eval mode.
        groups: the prompts, longest first, in groups of a part of ``caps``; drawn one ahead.
        caps: limits of the rows being answered. A group that exceeds them is answered alone.
        eos_id: the token that ends an answer.
    """
    voxtral, iterator, entered = unwrap(model), iter(groups), 0
    group = next(iterator, None)
    block: _Block | None = None
    while group is not None or block is not None:
        blocks = [block] if block is not None else []
        while group is not None and _have_room([row for b in blocks for row in b.rows], group, caps):
            blocks.append(_enter(voxtral, group, entered, eos_id))
            entered += len(group.lengths)
            group = next(iterator, None)
        if len(blocks) > 1 or blocks[0].is_stale():
            yield from (row.answer for b in blocks for row in b.rows if row.ended)
            block = _join(blocks)
        if block is not None:
            _step(voxtral, block, eos_id)


@dataclass
class _Row:
    """A prompt being answered: its positions in the cache now and at the answer's limit, and when it entered."""

    answer: Decoded
    length: int
    longest: int
    entered: float
    ended: bool = False

    def take(self, token: int, eos_id: int, now: float) -> None:
        """Note the next token; one that comes after the end was computed in vain."""
        if self.ended:
            self.answer.padding += 1
            return
        self.answer.last_s = now - self.entered
        self.answer.first_s = self.answer.first_s or self.answer.last_s
        if token != eos_id:
            self.answer.tokens.append(token)
        self.ended = token == eos_id or self.length + 1 == self.longest


class _Layer(DynamicLayer):
    """A layer's keys and values in buffers [rows, heads, room, head size], so that a step copies nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next position and return views of all in use."""
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Positions in use."""
        return self.length


@dataclass
class _Block:
    """B rows that are computed together, flush right in one cache that has ``room`` for so many positions.

    ``token`` int64 [B] is the last of each row, ``positions`` int64 [B, 1] where it goes, and ``mask`` bool
    [B, 1, 1, room] is False on padding; None where there is none.
    """

    rows: list[_Row]
    cache: Cache
    token: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    room: int

    def is_stale(self) -> bool:
        """Whether it is full, or enough rows have ended to take them out."""
        ended = sum(row.ended for row in self.rows)
        return self.cache.get_seq_length() == self.room or ended * ENDED_SHARE >= len(self.rows)


def _have_room(rows: Sequence[_Row], group: Prompts, caps: DecodeCaps) -> bool:
    """Whether a group fits beside the rows that have not ended; always where there are none."""
    longest = [row.longest for row in rows if not row.ended]
    if not longest:
        return True
    longest += [sum(pair) for pair in zip(group.lengths, group.limits, strict=True)]
    return len(longest) <= caps.rows and len(longest) * max(longest) <= caps.tokens


def _enter(voxtral: Any, group: Prompts, entered: int, eos_id: int) -> _Block:
    """Prompts that have gone through the model, with their first tokens."""
    now, width, device = time.perf_counter(), group.input_ids.shape[1], group.input_ids.device
    rows = [
        _Row(Decoded(number, positions=width, padding=width - length), length, length + limit, now)
        for number, (length, limit) in enumerate(zip(group.lengths, group.limits, strict=True), entered)
    ]
    visible = _flush_right(group.lengths, width, width, device)
    block = _Block(rows, DynamicCache(), group.input_ids, (visible.cumsum(1) - 1).clamp(min=0), None, width)
    states = None if group.audio is None else encode_audio(voxtral, group.audio)
    embeds = embed(voxtral, group.input_ids, states, group.audio_index)
    _next(voxtral, block, embeds, visible.long() if min(group.lengths) < width else None, eos_id)
    return block


def _step(voxtral: Any, block: _Block, eos_id: int) -> None:
    """One more token for every row."""
    for row in block.rows:
        row.length += 1
        row.answer.positions += 1
    width = block.cache.get_seq_length() + 1
    mask = None if block.mask is None else block.mask[..., :width]
    _next(voxtral, block, voxtral.get_input_embeddings()(block.token[:, None]), mask, eos_id)
    block.positions = block.positions + 1


def _next(voxtral: Any, block: _Block, embeds: torch.Tensor, mask: torch.Tensor | None, eos_id: int) -> None:
    """Let embeddings [B, L, hidden size] through the model and note the token that follows in each row."""
    where = {"attention_mask": mask, "position_ids": block.positions}
    states = voxtral.model.language_model(
        inputs_embeds=embeds, past_key_values=block.cache, use_cache=True, **where
    ).last_hidden_state
    block.token = voxtral.lm_head(states[:, -1]).argmax(-1)
    tokens = block.token.tolist()
    now = time.perf_counter()
    for row, token in zip(block.rows, tokens, strict=True):
        row.take(token, eos_id, now)


def _join(blocks: Sequence[_Block]) -> _Block | None:
    """One block of the rows that have not ended, with room for their next tokens; None where all have."""
    kept = [[place for place, row in enumerate(block.rows) if not row.ended] for block in blocks]
    rows = [block.rows[place] for block, places in zip(blocks, kept, strict=True) for place in places]
    if not rows:
        return None
    lengths = [row.length for row in rows]
    width, device = max(lengths), blocks[0].token.device
    room = width + min(ROOM, max(row.longest - row.length for row in rows))
    indices = [torch.tensor(places, device=device, dtype=torch.long) for places in kept]
    layers = [
        _join_layers(stack, indices, width, room)
        for stack in zip(*(block.cache.layers for block in blocks), strict=True)
    ]
    visible = _flush_right(lengths, width, room, device)
    return _Block(
        rows,
        Cache(layers=layers),
        torch.cat([block.token[index] for block, index in zip(blocks, indices, strict=True)]),
        torch.tensor(lengths, device=device)[:, None],
        visible[:, None, None] if min(lengths) < width else None,
        room,
    )


def _join_layers(
    layers: Sequence[DynamicLayer], indices: Sequence[torch.Tensor], width: int, room: int
) -> _Layer:
    """The rows ``indices`` of the same layer of several caches, ``width`` positions; the caches are emptied."""
    first = layers[0].keys
    shape = (sum(map(len, indices)), first.shape[1], room, first.shape[3])
    keys, values = first.new_zeros(shape), first.new_zeros(shape)
    start = 0
    for layer, index in zip(layers, indices, strict=True):
        length, end = layer.get_seq_length(), start + len(index)
        used = min(width, length)
        for target, source in ((keys, layer.keys), (values, layer.values)):
            target[start:end, :, width - used : width] = source[:, :, length - used : length][index]
        layer.keys = layer.values = None
        start = end
    return _Layer(keys, values, width)


def _flush_right(lengths: Sequence[int], width: int, room: int, device: torch.device) -> torch.Tensor:
    """bool [B, room], False on the padding to the left of rows that end at ``width``."""
    starts = width - torch.tensor(lengths, device=device)
    return torch.arange(room, device=device) >= starts[:, None]
