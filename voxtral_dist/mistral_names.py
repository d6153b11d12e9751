"""What the weights of a Voxtral are called in memory, in a Hugging Face folder and in Mistral's own format.

    in_folder("model.language_model.layers.0.self_attn.q_proj.weight")
                                -> "language_model.model.layers.0.self_attn.q_proj.weight"
    to_mistral(that)            -> "layers.0.attention.wq.weight"
    from_mistral(that)          -> the folder's name again

The names on disk did not change with transformers 5.10, those in memory did. Mistral's names and the order of the query
and key rows are those that transformers' ``convert_voxtral_weights_to_hf.py`` and vLLM's ``voxtral.py`` read.
"""

from __future__ import annotations

import re
from typing import Any

import torch

EMBED_POSITIONS = "audio_tower.embed_positions.weight"
"""Computed by the readers of Mistral's format; stored there only where it is not the usual sinusoids."""

_IN_FOLDER = (
    (r"model\.language_model\.(.+)", r"language_model.model.\1"),
    (r"lm_head\.(.+)", r"language_model.lm_head.\1"),
    (r"model\.((?:audio_tower|multi_modal_projector)\..+)", r"\1"),
)

_ENCODER = "mm_whisper_embeddings.whisper_encoder"
_OUTSIDE_LAYERS = {
    "language_model.lm_head": "output",
    "language_model.model.norm": "norm",
    "language_model.model.embed_tokens": "mm_whisper_embeddings.tok_embeddings",
    "multi_modal_projector.linear_1": "mm_whisper_embeddings.audio_language_projection.0",
    "multi_modal_projector.linear_2": "mm_whisper_embeddings.audio_language_projection.2",
    "audio_tower.conv1": f"{_ENCODER}.conv_layers.0",
    "audio_tower.conv2": f"{_ENCODER}.conv_layers.1",
    "audio_tower.layer_norm": f"{_ENCODER}.transformer.norm",
    "audio_tower.embed_positions": f"{_ENCODER}.embed_positions",
}
_TEXT_LAYER = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"},
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_AUDIO_LAYER = {
    "self_attn_layer_norm": "attention_norm",
    "final_layer_norm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkv"},
    "self_attn.out_proj": "attention.wo",
    "fc1": "feed_forward.w1",
    "fc2": "feed_forward.w2",
}
_LAYERS = (
    ("language_model.model.layers.", "layers.", _TEXT_LAYER),
    ("audio_tower.layers.", f"{_ENCODER}.transformer.layers.", _AUDIO_LAYER),
)


def in_folder(name: str) -> str:
    """The name in a Hugging Face folder of a weight that the model of transformers 5.10 or later calls ``name``."""
    for pattern, new in _IN_FOLDER:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    return name


def to_mistral(name: str) -> str:
    """Mistral's name of a weight of a Hugging Face folder. Raises :class:`KeyError` for an unknown one."""
    return _renamed(name, from_mistral=False)


def from_mistral(name: str) -> str:
    """The reverse of :func:`to_mistral`. Raises :class:`KeyError` for an unknown name."""
    return _renamed(name, from_mistral=True)


def _renamed(name: str, *, from_mistral: bool) -> str:
    module, _, kind = name.rpartition(".")
    for *prefixes, parts in _LAYERS:
        here, there = reversed(prefixes) if from_mistral else prefixes
        number, _, part = module.removeprefix(here).partition(".")
        if module.startswith(here) and number.isdigit():
            return f"{there}{number}.{_turned(parts, from_mistral)[part]}.{kind}"
    return f"{_turned(_OUTSIDE_LAYERS, from_mistral)[module]}.{kind}"


def _turned(names: dict[str, str], reverse: bool) -> dict[str, str]:
    return {new: old for old, new in names.items()} if reverse else names


def rotary_heads(name: str, text: Any) -> int:
    """Heads whose rows the two formats order differently in the weight ``name`` of a folder; 0 where they agree.

    Args:
        name: in a Hugging Face folder.
        text: the language model's config.
    """
    part = name.removeprefix("language_model.model.layers.").partition(".")[2]
    counts = {
        "self_attn.q_proj.weight": text.num_attention_heads,
        "self_attn.k_proj.weight": text.num_key_value_heads,
    }
    return counts.get(part, 0) if name.startswith("language_model.") else 0


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a [heads x size, in] weight from halves, as transformers rotates them, to pairs, as Mistral does."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def in_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The reverse of :func:`interleaved`."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def sinusoids(length: int, channels: int) -> torch.Tensor:
    """Whisper's encoder positions, float32 [length, channels], which readers of Mistral's format compute."""
    from transformers.models.whisper.modeling_whisper import sinusoids as whisper

    return whisper(length, channels)


def params(config: Any, audio: dict[str, Any]) -> dict[str, Any]:
    """The content of ``params.json``: what vLLM and transformers' conversion script read, no more.

    Args:
        config: a ``VoxtralConfig``.
        audio: the entry ``audio`` of the model's ``tekken.json``.
    """
    text = config.text_config
    return {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "head_dim": text.head_dim,
        "hidden_dim": text.intermediate_size,
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "rope_theta": text.rope_parameters["rope_theta"],
        "norm_eps": text.rms_norm_eps,
        "vocab_size": text.vocab_size,
        "tied_embeddings": text.tie_word_embeddings,
        "max_position_embeddings": text.max_position_embeddings,
        "max_seq_len": text.max_position_embeddings,
        "multimodal": {"whisper_model_args": _encoder_params(config.audio_config, audio)},
    }


def _encoder_params(encoder: Any, audio: dict[str, Any]) -> dict[str, Any]:
    sound = {name: audio[name] for name in ("sampling_rate", "frame_rate", "chunk_length_s")}
    return {
        "encoder_args": {
            "audio_encoding_args": sound | audio["audio_encoding_config"],
            "dim": encoder.hidden_size,
            "n_layers": encoder.num_hidden_layers,
            "head_dim": encoder.hidden_size // encoder.num_attention_heads,
            "hidden_dim": encoder.intermediate_size,
            "n_heads": encoder.num_attention_heads,
            "vocab_size": encoder.vocab_size,
            "max_source_positions": encoder.max_source_positions,
        },
        "downsample_args": {"downsample_factor": encoder.intermediate_size // encoder.hidden_size},
    }
