"""The proof that an exported model is the run's own: the same logits and the same greedy answers to a few prompts.

Both are loaded in float32 on the CPU, one after the other: 4 bytes a parameter, 19 GB for Voxtral-Mini, 97 GB for
Voxtral-Small; of Mistral's format also the file itself, half as much in bf16. The prompts are two rows of every dev set
of the run that lies on this machine, and three that are made: noise of half a chunk and of one and a half, and text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from voxtral_dist.audio import log_mel
from voxtral_dist.audio_file import AudioError, decode
from voxtral_dist.batch import DecodeCaps
from voxtral_dist.collator import Collator, Example
from voxtral_dist.decode import Prompts, decode_stream
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.model import embed, encode_audio, unwrap
from voxtral_dist.sample import Sample
from voxtral_dist.shards import CorruptSampleError, ShardSet, sample_from_row

ROWS_PER_SET, POSITIONS, NEW_TOKENS = 2, 32, 16
"""Rows of a dev set, last positions of a prompt whose logits are compared, and tokens of an answer."""

TOLERANCE = 1e-4
"""Largest difference of a logit that float32 rounding explains, as a share of the largest logit."""

MOST_LOST = 0.5
"""Largest share of what training changed that rounded weights may lose, in root mean squares of the logits."""


@dataclass(frozen=True)
class Behaviour:
    """What a model says: logits float32 [n, vocabulary] at the last positions of all prompts, and its answers' ids."""

    logits: torch.Tensor
    answers: list[list[int]]


@dataclass(frozen=True)
class Proof:
    """How near an export is to the run's own model.

    Attributes:
        prompts: how many were asked.
        rows: how many of these are rows of the run's dev sets.
        largest_difference: of a logit.
        largest_change: of a logit by the training.
        lost: the differences over the changes, in root mean squares.
        equal_answers: greedy answers that are the same token for token.
    """

    prompts: int
    rows: int
    largest_difference: float
    largest_change: float
    lost: float
    equal_answers: int


def examples(folders: Sequence[Path], collator: Collator) -> list[Example]:
    """The prompts: rows of the packed sets in ``folders`` as far as they can be read, and the made ones last."""
    return [*_rows(folders, collator), *_made(collator)]


def _rows(folders: Sequence[Path], collator: Collator) -> Iterator[Example]:
    for folder in folders:
        with suppress(UserError, CorruptSampleError, AudioError, OSError):
            shards = ShardSet.open(folder)
            for number in range(min(ROWS_PER_SET, len(shards))):
                record = shards.read(number)
                audio = None if record.audio is None else decode(record.audio)
                yield _example(sample_from_row(record.row), audio, collator)


def _made(collator: Collator) -> Iterator[Example]:
    generator = np.random.default_rng(0)
    chunk = collator.spec.chunk_samples
    made = (("asr", "", chunk // 2), ("sqa", "What is said?", chunk * 3 // 2), ("tqa", "Say yes.", 0))
    for task, prompt, samples in made:
        audio = 0.1 * generator.standard_normal(samples).astype(np.float32) if samples else None
        yield _example(Sample("made", task, prompt, (), language="en"), audio, collator)


def _example(sample: Sample, audio: Any, collator: Collator) -> Example:
    mel = None if audio is None else log_mel(audio, collator.spec)
    return Example(sample, mel, 0 if audio is None else len(audio), 0, 1.0, sample.id)


@torch.inference_mode()
def behaviour(model: Any, rows: Sequence[Example], collator: Collator) -> Behaviour:
    """Ask a model, which may have an adapter, all prompts one by one, then let it answer them together."""
    voxtral, logits = unwrap(model).eval(), []
    prompts = [_prompt([row], collator) for row in rows]
    for prompt in tqdm(prompts, desc="proof", unit="prompt", leave=False):
        heard = None if prompt.audio is None else encode_audio(voxtral, prompt.audio)
        embeds = embed(voxtral, prompt.input_ids, heard, prompt.audio_index)
        states = voxtral.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits.append(voxtral.lm_head(states[0, -POSITIONS:]).float())
    end = collator.vocabulary.special("</s>")
    answers = decode_stream(model, iter(prompts), DecodeCaps(len(rows), 1 << 60), eos_id=end)
    ordered = sorted(answers, key=lambda answer: answer.number)
    return Behaviour(torch.cat(logits), [answer.tokens for answer in ordered])


def _prompt(rows: Sequence[Example], collator: Collator) -> Prompts:
    ids = [collator.prompt(row.sample, row.n_samples) for row in rows]
    input_ids = collator.pad(ids, left=True)
    audio = collator.stack_audio(rows)
    return Prompts(
        input_ids, list(map(len, ids)), audio, collator.audio_slots(input_ids), [NEW_TOKENS] * len(ids)
    )


def judge(base: Behaviour, run: Behaviour, export: Behaviour, *, rounded: bool, rows: int) -> Proof:
    """Compare an export with the run's own model.

    Args:
        base: of the model before training.
        run: of the base with the run's adapter.
        export: of what was written, loaded again.
        rounded: the weights were rounded after the merge, to bfloat16.
        rows: prompts that are rows of dev sets.

    Raises:
        UserError: the training changed nothing, or rounding lost most of it.
        VoxtralDistError: the export is another model.
    """
    change, difference = run.logits - base.logits, export.logits - run.logits
    largest, apart = float(change.abs().max()), float(difference.abs().max())
    if not largest:
        raise UserError(
            "the trained weights change no logit of any prompt; train longer or export another checkpoint"
        )
    lost = float(difference.norm() / change.norm())
    same = sum(mine == other for mine, other in zip(run.answers, export.answers, strict=True))
    proof = Proof(len(run.answers), rows, apart, largest, lost, same)
    if rounded and not lost <= MOST_LOST:
        raise UserError(
            f"rounded to bf16 the merged weights lose {lost:.0%} of what training changed in the logits; give --dtype "
            "fp32, or serve the adapter beside the base"
        )
    if not rounded and (not apart <= TOLERANCE * float(run.logits.abs().max()) or same < proof.prompts):
        raise VoxtralDistError(
            f"the export is not the run's model: its logits differ by up to {apart:.3g} (training changed them by "
            f"{largest:.3g}), {same} of {proof.prompts} answers are equal; nothing was written"
        )
    return proof
