"""Decoding as a stream: no answer depends on its company, rows that end make room, and the limits hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_runs import Demo
from test_model import base, watched

from voxtral_dist import decode
from voxtral_dist import model as modeling
from voxtral_dist.audio import AudioSpec
from voxtral_dist.batch import DecodeCaps
from voxtral_dist.collator import Collator
from voxtral_dist.decode import Decoded, Prompts, decode_stream
from voxtral_dist.eval_data import EvalData, decode_groups
from voxtral_dist.plan import Int64
from voxtral_dist.task_data import open_tasks
from voxtral_dist.tokenizer import TekkenVocabulary

EOS, PAD, AUDIO = 2, 11, 24
LENGTHS = (40, 3, 36, 12, 33, 5, 30, 7, 31, 9)
"""Prompts' lengths; those of 30 and more have a chunk of audio."""

LIMITS = (5, 66, 1, 20, 12, 2, 30, 8, 15, 3)
"""Longest answers; one is longer than the cache's room."""


@pytest.fixture(scope="module")
def speaker(tiny_model: Path) -> Any:
    return base(tiny_model)


@pytest.fixture(scope="module")
def prompts(tiny_model: Path) -> list[tuple[list[int], torch.Tensor | None]]:
    """Random words of LENGTHS, in all the long ones the audio slots first, and what is heard there."""
    spec, generator = AudioSpec.from_config(modeling.read_config(str(tiny_model))), torch.Generator()
    out: list[tuple[list[int], torch.Tensor | None]] = []
    for number, length in enumerate(LENGTHS):
        generator.manual_seed(number)
        ids = torch.randint(1000, 4096, (length,), generator=generator).tolist()
        mel = None
        if length >= 30:
            ids[1 : 1 + spec.tokens_per_chunk] = [AUDIO] * spec.tokens_per_chunk
            mel = torch.rand(1, spec.num_mel_bins, spec.chunk_frames, generator=generator)
        out.append((ids, mel))
    return out


def group(prompts: Sequence[Any], rows: Sequence[int], limits: Sequence[int] = LIMITS) -> Prompts:
    width = max(len(prompts[row][0]) for row in rows)
    ids = torch.tensor([[PAD] * (width - len(prompts[row][0])) + prompts[row][0] for row in rows])
    heard = [prompts[row][1] for row in rows if prompts[row][1] is not None]
    slots = (ids.flatten() == AUDIO).nonzero().flatten()
    lengths, audio = [len(prompts[row][0]) for row in rows], torch.cat(heard) if heard else None
    return Prompts(ids, lengths, audio, slots, [limits[row] for row in rows])


def answers(
    model: Any, prompts: Sequence[Any], groups: Sequence[Sequence[int]], caps: DecodeCaps, eos: int = EOS
) -> list[Decoded]:
    """In the order of ``prompts``; each comes exactly once."""
    order = [row for rows in groups for row in rows]
    found = list(decode_stream(model, (group(prompts, rows) for rows in groups), caps, eos_id=eos))
    assert sorted(answer.number for answer in found) == list(range(len(order)))
    return sorted(found, key=lambda answer: order[answer.number])


ALONE = [[row] for row in range(len(LENGTHS))]


@pytest.fixture(scope="module")
def alone(speaker: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """What each says with nobody beside it."""
    found = [a.tokens for a in answers(speaker, prompts, ALONE, DecodeCaps(1, 0))]
    assert [len(tokens) for tokens in found] == list(LIMITS) and len({tuple(t[:1]) for t in found}) > 5
    return found


@pytest.mark.parametrize("room", [3, 64])
@pytest.mark.parametrize(
    ("groups", "caps"),
    [
        ([list(range(10))], DecodeCaps(10, 10_000)),
        (ALONE, DecodeCaps(3, 10_000)),
        ([[9, 1], [0, 2, 3, 7], [5], [4, 6, 8]], DecodeCaps(4, 10_000)),
        ([[6, 1], [0, 2], [3, 7], [5, 9], [4, 8]], DecodeCaps(100, 280)),
        ([[8, 3, 5, 1], [0, 2, 4], [9, 7, 6]], DecodeCaps(2, 0)),
    ],
)
def test_company_changes_no_answer(
    speaker: Any,
    prompts: Sequence[Any],
    alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    groups: list[list[int]],
    caps: DecodeCaps,
    room: int,
) -> None:
    """Rows that enter late beside shorter and longer ones, and caches that are copied in every way."""
    monkeypatch.setattr(decode, "ROOM", room)
    assert [answer.tokens for answer in answers(speaker, prompts, groups, caps)] == alone


def test_an_end_in_the_middle_and_at_once(
    speaker: Any, prompts: Sequence[Any], alone: list[list[int]]
) -> None:
    for eos in (alone[1][30], alone[6][0]):
        ended = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in alone]
        assert ended != alone
        for caps in (DecodeCaps(3, 10_000), DecodeCaps(10, 10_000)):
            assert [a.tokens for a in answers(speaker, prompts, ALONE, caps, eos)] == ended


def passes(model: Any, prompts: Sequence[Any], groups: Any, caps: DecodeCaps) -> list[tuple[int, int]]:
    """Rows and positions of every pass of the language model."""
    with watched(modeling.unwrap(model).model.language_model) as calls:
        answers(model, prompts, groups, caps)
    return [tuple(kwargs["inputs_embeds"].shape[:2]) for kwargs, _ in calls]


def test_rows_that_end_make_room(speaker: Any, prompts: Sequence[Any]) -> None:
    """Never more rows than allowed, and as many as that as long as any wait."""
    order = sorted(range(10), key=lambda row: -LIMITS[row])
    steps = [
        rows
        for rows, width in passes(speaker, prompts, [[r] for r in order], DecodeCaps(3, 10_000))
        if width == 1
    ]
    assert max(steps) == 3 and len(steps) == max(LIMITS) - 1
    apart = [
        rows
        for rows, width in passes(speaker, prompts, [order[:3], order[3:6], order[6:]], DecodeCaps(4, 0))
        if width == 1
    ]
    assert len(apart) == sum(LIMITS[order[first]] - 1 for first in (0, 3, 6))


def test_token_limit_counts_the_longest_row(speaker: Any, prompts: Sequence[Any]) -> None:
    """Rows 1, 6 and 0 need 69, 60 and 45 positions."""
    groups = [[1], [6], [0]]
    for tokens, most in ((207, 3), (206, 2), (119, 1)):
        assert max(rows for rows, _ in passes(speaker, prompts, groups, DecodeCaps(10, tokens))) == most


def test_the_cache_grows_up_to_the_longest_answer(speaker: Any, prompts: Sequence[Any]) -> None:
    rooms: list[int] = []
    hook = speaker.model.language_model.register_forward_hook(
        lambda _, __, kw, out: rooms.append(kw["past_key_values"].layers[0].keys.shape[2]), with_kwargs=True
    )
    answers(speaker, prompts, [[1], [3]], DecodeCaps(1, 0))
    hook.remove()
    assert sorted(set(rooms)) == [3, 12, 12 + 20, 3 + decode.ROOM, 3 + 66]


def test_positions_and_padding_are_counted(speaker: Any, prompts: Sequence[Any]) -> None:
    groups, caps = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], DecodeCaps(9, 10_000)
    found = answers(speaker, prompts, groups, caps)
    assert sum(a.positions for a in found) == sum(r * w for r, w in passes(speaker, prompts, groups, caps))
    useful = [length + limit - 1 for length, limit in zip(LENGTHS, LIMITS, strict=True)]
    assert [a.positions - a.padding for a in found] == useful
    assert found[1].padding >= 37 and found[0].padding < 10
    assert all(0 < a.first_s <= a.last_s for a in found) and found[1].first_s < found[1].last_s


def test_prompts_are_drawn_one_group_ahead(speaker: Any, prompts: Sequence[Any]) -> None:
    drawn = []

    def groups() -> Iterator[Prompts]:
        for rows in ([0, 5], [1], [2], [3]):
            drawn.extend(rows)
            yield group(prompts, rows)

    stream = decode_stream(speaker, groups(), DecodeCaps(2, 10_000), eos_id=EOS)
    assert next(stream).number == 1 and drawn == [0, 5, 1, 2], "1 entered at once"
    assert len(list(stream)) == 4
    assert list(decode_stream(speaker, [], DecodeCaps(2, 10), eos_id=EOS)) == []


def test_groups_hold_the_limits_and_like_answers() -> None:
    rng = np.random.default_rng(0)
    prompts, expected = rng.integers(5, 400, 300), rng.integers(1, 150, 300)
    limits = expected + rng.integers(0, 100, 300)
    for caps in (DecodeCaps(16, 4000), DecodeCaps(1000, 4000), DecodeCaps(16, 100_000), DecodeCaps(8, 100)):
        groups = decode_groups(prompts, limits, expected, caps)
        assert sorted(np.concatenate(groups).tolist()) == list(range(300))
        sizes = [len(g) * int(prompts[g].max() + limits[g].max()) for g in groups]
        assert all(len(g) <= caps.rows for g in groups)
        assert all(size <= caps.tokens or len(g) == 1 for g, size in zip(groups, sizes, strict=True))
        widths = [int(prompts[g].max() + limits[g].max()) for g in groups]
        assert widths == sorted(widths, reverse=True)
        ranges = sorted((int(expected[g].min()), int(expected[g].max())) for g in groups)
        assert all(high <= low for (_, high), (low, _) in pairwise(ranges))
    assert decode_groups(prompts[:0], limits[:0], expected[:0], DecodeCaps(4, 10)) == []


def test_every_example_is_in_one_batch_of_one_rank(tiny_model: Path, demo: Demo) -> None:
    collator = Collator(
        TekkenVocabulary.load(str(tiny_model)), AudioSpec.from_config(modeling.read_config(str(tiny_model)))
    )
    tasks = open_tasks([demo.folder / "shards" / name / "dev" for name in ("asr", "sqa", "tqa")], collator)
    data = EvalData(tasks, collator, 128)
    asked: list[str] = []

    def limit_of(task: str, n_samples: Int64) -> Int64:
        asked.append(task)
        return n_samples // 1_000 + 4 if task == "asr" else np.full(len(n_samples), 200)

    for world_size in (1, 2, 3, 7, 30):
        caps = DecodeCaps(4, 500)
        shares = [data.batches(rank, world_size, caps, limit_of) for rank in range(world_size)]
        assert shares == [data.batches(rank, world_size, caps, limit_of) for rank in range(world_size)]
        everything = [item for share in shares for batch in share for item in batch]
        assert sorted(everything) == [(task, n) for task in range(3) for n in range(8)]
        assert max(len(batch) for share in shares for batch in share) <= 4
        counts = [sum(map(len, share)) for share in shares]
        assert max(counts) - min(counts) <= max(1, max(counts) // 3)
    assert set(asked) == {"asr", "sqa", "tqa"}
    rows = [len(b) for b in data.batches(0, 1, DecodeCaps(8, 128 * 3), limit_of)]
    assert max(rows) > 3, "answers that may be long leave room for 3, the others for more"
