"""Build the demo's base model, a tiny random Voxtral: ``python tools/build_tiny_voxtral.py OUT [--seed 0]``

The folder loads offline with ``VoxtralForConditionalGeneration.from_pretrained`` and
``VoxtralProcessor.from_pretrained``. Everything is that of a real Voxtral except the sizes, the length of an audio
chunk (2 s instead of 30) and the random weights. The weights are drawn so that LoRA alone can learn the demo: in
the frozen encoder the content outweighs the positions (with Whisper's plain sinusoids nothing is learned), and the
frozen embeddings and output head are large enough for confident logits. The same seed gives the same bytes; called
again on a finished OUT it says so and does nothing.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import sinusoids
from transformers.tokenization_mistral_common import MistralCommonBackend

from voxtral_dist.atomic import holds, new_folder
from voxtral_dist.errors import UserError, run_main

VERSION = "tiny-voxtral/1"
"""Recorded in the folder. Changing what is built from the same arguments must change it."""

RECORD = "recipe.json"
"""What was built."""

SPECIALS = 1000  # ids reserved for special tokens, as in every Tekken vocabulary
_FIRST = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] "
    "[/SYSTEM_PROMPT] [TOOL_CONTENT]"
)
_LATER = {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 32: "[ARGS]", 33: "[CALL_ID]", 34: "[TRANSCRIBE]"}
SPECIAL_TOKENS = dict(enumerate(_FIRST.split())) | _LATER
"""Ids of the control tokens of Voxtral-Mini-3B-2507."""

MEL_BINS = 128
AUDIO_WIDTH = 128
FRAMES_PER_SECOND = 100  # of the log-mel spectrogram; the encoder halves them

INIT_STD = 0.05  # the demo learns in fewer steps than with the usual 0.02
CONV_STD = 0.08
EMBEDDING_STD = 0.15  # of the token embeddings and of the head
POSITION_SCALE = 0.1


def chunk_seconds(max_source_positions: int) -> float:
    """Length in seconds of the audio chunk of an encoder with so many positions (1500: 30 s).

    Raises:
        UserError: not a multiple of 100; four positions make one audio token, fifty a second.
    """
    if max_source_positions < 1 or max_source_positions % 100:
        raise UserError(f"max_source_positions {max_source_positions} is no multiple of 100, which is 2 s")
    return 2 * max_source_positions / FRAMES_PER_SECOND


def tekken(vocab_size: int, chunk_length_s: float) -> dict[str, Any]:
    """The content of ``tekken.json``: the first ranks of the vocabulary that mistral-common ships.

    A byte-pair vocabulary is ordered by rank, so every prefix that has the 256 bytes is a tokenizer.

    Raises:
        UserError: ``vocab_size`` (special tokens included) leaves no room for the 256 bytes.
    """
    if vocab_size < SPECIALS + 256:
        raise UserError(
            f"vocab_size {vocab_size} is below {SPECIALS + 256}: 1000 special tokens and 256 bytes"
        )
    source = json.loads((files("mistral_common") / "data" / "tekken_240911.json").read_text("utf-8"))
    sizes = {
        "num_vocab_tokens": vocab_size - SPECIALS,
        "default_vocab_size": vocab_size,
        "default_num_special_tokens": SPECIALS,
        "version": "v11",
    }
    special = [
        {"rank": rank, "token_str": SPECIAL_TOKENS.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
        for rank in range(max(SPECIAL_TOKENS) + 1)
    ]
    audio = {
        "sampling_rate": 16_000,
        "frame_rate": 12.5,
        "chunk_length_s": chunk_length_s,
        "audio_encoding_config": {"num_mel_bins": MEL_BINS, "hop_length": 160, "window_size": 400},
    }
    vocab = source["vocab"][: vocab_size - SPECIALS]
    return {"config": source["config"] | sizes, "vocab": vocab, "special_tokens": special, "audio": audio}


def model_config(max_source_positions: int, hidden_size: int, layers: int, vocab_size: int) -> VoxtralConfig:
    """The shape of the model. The encoder is four times as wide inside because the projector reshapes by it."""
    audio = {
        "hidden_size": AUDIO_WIDTH,
        "intermediate_size": 4 * AUDIO_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_mel_bins": MEL_BINS,
        "max_source_positions": max_source_positions,
    }
    text = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 4096,
        "rope_theta": 1e4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 11,
        "tie_word_embeddings": False,
    }
    return VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", **audio},
        text_config={"model_type": "llama", **text},
        audio_token_id=24,
        dtype="float32",
    )


def init_std(name: str) -> float:
    """Standard deviation of the matrix called ``name``."""
    if ".conv" in name:
        return CONV_STD
    return EMBEDDING_STD if "embed_tokens" in name or "lm_head" in name else INIT_STD


@torch.no_grad()
def draw_weights(model: VoxtralForConditionalGeneration, seed: int) -> None:
    """Fill ``model`` with weights that depend on ``seed`` and the names alone; biases 0, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if name.endswith("embed_positions.weight"):
            weight.copy_(POSITION_SCALE * sinusoids(*weight.shape))
        elif weight.ndim > 1:
            weight.normal_(0, init_std(name), generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)


def build(
    out: Path,
    *,
    seed: int = 0,
    max_source_positions: int = 100,
    hidden_size: int = 192,
    layers: int = 2,
    vocab_size: int = 4096,
) -> bool:
    """Write the model folder ``out``; False when it already holds this very model.

    Args:
        out: the folder; must not exist, be empty or hold the model of the same arguments.
        seed: of the weights.
        max_source_positions: of the encoder, 50 for each second of a chunk.
        hidden_size: of the language model, four heads.
        layers: of the language model.
        vocab_size: 1000 special tokens included.

    Raises:
        UserError: a size that makes no model, or ``out`` holds something else.
    """
    sizes = {"max_source_positions": max_source_positions, "hidden_size": hidden_size, "layers": layers}
    recipe = json.dumps({"version": VERSION, "seed": seed, **sizes, "vocab_size": vocab_size}) + "\n"
    if holds(out, RECORD, recipe):
        return False
    seconds = chunk_seconds(max_source_positions)
    vocabulary = tekken(vocab_size, seconds)
    model = VoxtralForConditionalGeneration(model_config(vocab_size=vocab_size, **sizes))
    draw_weights(model, seed)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=11)
    with new_folder(out) as aside:
        model.save_pretrained(aside)
        (aside / "tekken.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=round(seconds))
        VoxtralProcessor(extractor, MistralCommonBackend.from_pretrained(aside)).save_pretrained(aside)
        (aside / RECORD).write_text(recipe, encoding="utf-8")
    return True


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    args = parser.parse_args()
    new = build(args.out, seed=args.seed)
    print(f"tiny Voxtral {'built in' if new else 'already in'} {args.out}")


if __name__ == "__main__":
    run_main(main)
