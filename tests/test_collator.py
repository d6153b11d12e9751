"""The micro-batch: labels on target and ``</s>`` alone, every audio slot filled by its own row, nothing dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voxtral_dist.audio import AudioSpec
from voxtral_dist.batch import MicroBatch
from voxtral_dist.collator import Collator, Example
from voxtral_dist.sample import Sample
from voxtral_dist.tokenizer import TekkenVocabulary

SPEC = AudioSpec(num_mel_bins=2, chunk_frames=200, tokens_per_chunk=25)
EOS, PAD, AUDIO = 2, 11, 24
TASKS = ["asr", "sqa", "tqa"]
TEXTS = st.one_of(
    st.text(min_size=1, max_size=20), st.sampled_from(["[AUDIO]</s><pad>", "세 번째", "x " * 60])
)
ROWS = st.tuples(
    st.sampled_from(TASKS), TEXTS, TEXTS, st.integers(1, 100_000), st.sampled_from([0.0, 0.25, 1.0])
)


@pytest.fixture(scope="module")
def collator(tiny_model: Path) -> Collator:
    return Collator(TekkenVocabulary.load(str(tiny_model)), SPEC)


def example(
    number: int, task: str, prompt: str, target: str, n_samples: int = 0, weight: float = 1.0, error: str = ""
) -> Example:
    """An example whose mel holds nothing but its number."""
    sample = Sample(str(number), task, "" if task == "asr" else prompt, (target,), language="ko")
    chunks = 0 if task == "tqa" else int(SPEC.chunks(n_samples))
    mel = torch.full((chunks, SPEC.num_mel_bins, SPEC.chunk_frames), float(number)) if chunks else None
    n_samples = n_samples if chunks else 0
    return Example(sample, mel, n_samples, TASKS.index(task), weight, f"k{number}", error)


def rows_of(collator: Collator, examples: list[Example]) -> list[tuple[list[int], list[int]]]:
    """Prompt and target of each example."""
    encode = collator.vocabulary.encode
    return [
        (collator.prompt(e.sample, e.n_samples), [*encode(e.sample.target.rstrip(" ")), EOS])
        for e in examples
    ]


def check_rows(collator: Collator, examples: list[Example], batch: MicroBatch) -> None:
    """Every row is prompt, target and padding; seen through the label indices the labels are the target."""
    rows = rows_of(collator, examples)
    assert batch.input_ids.shape == (len(rows), max(len(p) + len(t) for p, t in rows))
    assert batch.label_index.dtype == batch.labels.dtype == batch.label_task.dtype == torch.int64
    seen = torch.full_like(batch.input_ids, -100).flatten()
    assert len(set(batch.label_index.tolist())) == len(batch.label_index)
    seen[batch.label_index + 1] = batch.labels
    for ids, labels, (prompt, target) in zip(
        batch.input_ids.tolist(), seen.view_as(batch.input_ids).tolist(), rows, strict=True
    ):
        fill = len(ids) - len(prompt) - len(target)
        assert ids == prompt + target + [PAD] * fill
        assert labels == [-100] * len(prompt) + target + [-100] * fill


def check_labels(collator: Collator, examples: list[Example], batch: MicroBatch) -> None:
    """Each label carries its row's task and weight."""
    owner = batch.label_index // batch.input_ids.shape[1]
    assert batch.label_task.tolist() == [examples[row].task for row in owner]
    assert batch.label_weight.tolist() == [examples[row].weight for row in owner]
    assert torch.bincount(owner).tolist() == [len(t) for _, t in rows_of(collator, examples)]


def check_audio(examples: list[Example], batch: MicroBatch) -> None:
    """The slots are the ``[AUDIO]`` positions in order, as many as embeddings, and each row gets its own audio."""
    slots = (batch.input_ids.flatten() == AUDIO).nonzero().flatten()
    assert batch.audio_index.tolist() == slots.tolist()
    spoken = [e for e in examples if e.mel is not None]
    if not spoken:
        assert batch.audio is None
        return
    assert batch.audio is not None
    assert batch.audio.shape == (sum(len(e.mel) for e in spoken if e.mel is not None), 2, 200)
    assert len(slots) == len(batch.audio) * SPEC.tokens_per_chunk
    heard = batch.audio[:, 0, 0].repeat_interleave(SPEC.tokens_per_chunk)
    written = [float(examples[row].sample.id) for row in batch.audio_index // batch.input_ids.shape[1]]
    assert heard.tolist() == written


@settings(deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=6), first_draw=st.integers(0, 1 << 40))
def test_any_rows(collator: Collator, rows: list[tuple[str, str, str, int, float]], first_draw: int) -> None:
    examples = [example(number, *row) for number, row in enumerate(rows)]
    batch = collator.train_batch(examples, first_draw)
    check_rows(collator, examples, batch)
    check_labels(collator, examples, batch)
    check_audio(examples, batch)
    assert (batch.samples, batch.first_draw) == (len(rows), first_draw)
    assert batch.keys == [e.key for e in examples]
    assert batch.tokens == int((batch.input_ids != PAD).sum())
    assert batch.positions == batch.input_ids.numel()
    assert batch.audio_seconds == pytest.approx(sum(e.n_samples for e in examples) / 16_000)
    assert not batch.bad_samples


def test_labels_written_out(collator: Collator) -> None:
    """One row, by hand: the state of ``[/INST]`` predicts the first word, that of the last word ``</s>``."""
    batch = collator.train_batch([example(0, "tqa", "a", "b")], 0)
    a, b = collator.vocabulary.encode("a") + collator.vocabulary.encode("b")
    assert batch.input_ids.tolist() == [[1, 3, a, 4, b, EOS]]
    assert (batch.label_index.tolist(), batch.labels.tolist()) == ([3, 4], [b, EOS])


def test_unreadable_example_keeps_its_place_and_weighs_nothing(collator: Collator) -> None:
    examples = [
        example(0, "asr", "", "one two", 40_000, 0.0, "no audio"),
        example(1, "sqa", "which?", "two", 1_000, 1.0),
    ]
    batch = collator.train_batch(examples, 0)
    check_rows(collator, examples, batch)
    check_audio(examples, batch)
    owner = batch.label_index // batch.input_ids.shape[1]
    assert set(batch.label_weight[owner == 0].tolist()) == {0.0}
    assert set(batch.label_weight[owner == 1].tolist()) == {1.0}
    assert batch.bad_samples == ["k0: no audio"] and batch.samples == 2


def test_prompts_are_padded_on_the_left(collator: Collator) -> None:
    examples = [
        example(0, "tqa", "a long question, to be answered", "x"),
        example(1, "asr", "", "x", 40_000),
        example(2, "sqa", "y", "x", 1),
    ]
    prompts = [prompt for prompt, _ in rows_of(collator, examples)]
    ids = collator.pad(prompts, left=True)
    width = max(map(len, prompts))
    assert ids.dtype == torch.int64 and ids.tolist() == [[PAD] * (width - len(p)) + p for p in prompts]
    assert collator.audio_slots(ids).tolist() == [
        row * width + column for row in (1, 2) for column in range(width) if ids[row, column] == AUDIO
    ]
    assert len(collator.audio_slots(ids)) == 3 * SPEC.tokens_per_chunk
