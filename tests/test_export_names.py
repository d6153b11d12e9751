"""Names and row orders of the three formats, against tables that are written down here and share no code with ours.

The tables follow transformers' ``convert_voxtral_weights_to_hf.py`` and vLLM's ``voxtral.py``, ``whisper.py`` and
``mistral.py`` (names alone).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from voxtral_dist import mistral_names as names
from voxtral_dist import model as modeling

AUDIO = "mm_whisper_embeddings."
CONVERTED_LINEARS = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj"}


def outside_layers() -> dict[str, str]:
    """The folder's names of what lies outside layers, by Mistral's."""
    found = {
        "output.weight": "language_model.lm_head.weight",
        "norm.weight": "language_model.model.norm.weight",
        f"{AUDIO}tok_embeddings.weight": "language_model.model.embed_tokens.weight",
        f"{AUDIO}audio_language_projection.0.weight": "multi_modal_projector.linear_1.weight",
        f"{AUDIO}audio_language_projection.2.weight": "multi_modal_projector.linear_2.weight",
    }
    for kind in ("weight", "bias"):
        found |= {
            f"{AUDIO}whisper_encoder.conv_layers.0.{kind}": f"audio_tower.conv1.{kind}",
            f"{AUDIO}whisper_encoder.conv_layers.1.{kind}": f"audio_tower.conv2.{kind}",
            f"{AUDIO}whisper_encoder.transformer.norm.{kind}": f"audio_tower.layer_norm.{kind}",
        }
    return found


TEXT_PARTS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
AUDIO_PARTS = {
    "attention_norm": "self_attn_layer_norm",
    "ffn_norm": "final_layer_norm",
    "attention.wo": "self_attn.out_proj",
    "feed_forward.w1": "fc1",
    "feed_forward.w2": "fc2",
}


def converted(mistral: str) -> str:
    """The folder's name that transformers' conversion script gives a tensor."""
    if mistral in outside_layers():
        return outside_layers()[mistral]
    words = mistral.split(".")
    place = words.index("layers")
    number, kind, part = words[place + 1], words[-1], ".".join(words[place + 2 : -1])
    linear = CONVERTED_LINEARS.get(part.removeprefix("attention."))
    if words[0] == "layers":
        return f"language_model.model.layers.{number}.{TEXT_PARTS.get(part) or f'self_attn.{linear}'}.{kind}"
    assert words[:3] == ["mm_whisper_embeddings", "whisper_encoder", "transformer"]
    return f"audio_tower.layers.{number}.{AUDIO_PARTS.get(part) or f'self_attn.{linear}'}.{kind}"


def vllm_parameters(text_layers: int, audio_layers: int) -> dict[str, str]:
    """The parameters of vLLM's Voxtral before q, k, v and gate, up are stacked, each by the Mistral name it takes."""
    text = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    text |= {f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"}
    text |= {
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    found = {
        "language_model.lm_head.weight": "output.weight",
        "language_model.model.norm.weight": "norm.weight",
        "language_model.model.embed_tokens.weight": f"{AUDIO}tok_embeddings.weight",
        "audio_language_adapter.w_in.weight": f"{AUDIO}audio_language_projection.0.weight",
        "audio_language_adapter.w_out.weight": f"{AUDIO}audio_language_projection.2.weight",
    }
    for layer in range(text_layers):
        for ours, theirs in text.items():
            found[f"language_model.model.layers.{layer}.{ours}.weight"] = f"layers.{layer}.{theirs}.weight"
    encoder, stored = "whisper_encoder.whisper_encoder", f"{AUDIO}whisper_encoder"
    for kind in ("weight", "bias"):
        found |= {f"{encoder}.conv{n + 1}.{kind}": f"{stored}.conv_layers.{n}.{kind}" for n in (0, 1)}
        found[f"{encoder}.layer_norm.{kind}"] = f"{stored}.transformer.norm.{kind}"
        for layer in range(audio_layers):
            here, there = f"{encoder}.layers.{layer}", f"{stored}.transformer.layers.{layer}"
            pairs = {f"self_attn.{x}_proj": f"attention.w{x}" for x in ("q", "k", "v")}
            pairs |= {"self_attn.out_proj": "attention.wo", "self_attn_layer_norm": "attention_norm"}
            pairs |= {
                "mlp.fc1": "feed_forward.w1",
                "mlp.fc2": "feed_forward.w2",
                "final_layer_norm": "ffn_norm",
            }
            for ours, theirs in pairs.items():
                if (ours, kind) != ("self_attn.k_proj", "bias"):  # Whisper has none; vLLM makes a zero one
                    found[f"{here}.{ours}.{kind}"] = f"{there}.{theirs}.{kind}"
    return found


@pytest.fixture(scope="module")
def on_disk(tiny_model: Path) -> list[str]:
    """Names in the folder that transformers saved."""
    with safe_open(tiny_model / "model.safetensors", "pt") as tensors:
        return list(tensors.keys())


def test_names_in_memory_are_those_on_disk(tiny_model: Path, on_disk: list[str]) -> None:
    model = modeling.load(str(tiny_model), torch.float32)
    assert sorted(names.in_folder(name) for name, _ in model.named_parameters()) == sorted(on_disk)
    assert all(names.in_folder(name) == name for name in on_disk)


def test_mistral_names_are_those_that_transformers_converts(on_disk: list[str]) -> None:
    stored = [name for name in on_disk if name != names.EMBED_POSITIONS]
    assert {converted(names.to_mistral(name)): name for name in stored} == {name: name for name in stored}
    assert all(names.from_mistral(names.to_mistral(name)) == name for name in on_disk)


def test_mistral_names_fill_every_parameter_of_vllm(on_disk: list[str]) -> None:
    ours = {names.to_mistral(name) for name in on_disk}
    positions = names.to_mistral(names.EMBED_POSITIONS)
    assert ours - {positions} == set(vllm_parameters(2, 1).values())
    assert positions == f"{AUDIO}whisper_encoder.embed_positions.weight", (
        "a parameter of vLLM's Whisper, which it reads"
    )


@pytest.mark.parametrize("name", ["language_model.model.layers.0.mlp.new.weight", "vision_tower.x.weight"])
def test_unknown_names_are_no_guesses(name: str) -> None:
    for turn in (names.to_mistral, names.from_mistral):
        with pytest.raises(KeyError):
            turn(name)


def test_only_query_and_key_of_the_language_model_change_order(tiny_model: Path, on_disk: list[str]) -> None:
    text = modeling.read_config(str(tiny_model)).text_config
    heads = {name: count for name in on_disk if (count := names.rotary_heads(name, text))}
    expected = {
        f"language_model.model.layers.{n}.self_attn.{x}_proj.weight": c
        for n in (0, 1)
        for x, c in (("q", 4), ("k", 2))
    }
    assert heads == expected


def rotated_in_pairs(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Mistral's rotary embedding of [L, heads, size]: neighbours are the two parts of a complex number."""
    length, _, size = x.shape
    angles = torch.outer(torch.arange(length), theta ** -(torch.arange(0, size, 2) / size))
    turned = (
        torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.view_as_real(turned).flatten(2)


def test_reordered_rows_give_the_same_attention_in_mistrals_rotation() -> None:
    generator, theta, (length, heads, size, width) = torch.Generator().manual_seed(3), 1e4, (7, 4, 6, 10)
    query, key = torch.randn(2, heads * size, width, generator=generator)
    hidden = torch.randn(length, width, generator=generator)

    def project(weight: torch.Tensor) -> torch.Tensor:
        return (hidden @ weight.T).view(length, heads, size)

    angles = torch.outer(torch.arange(length), theta ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)[None]
    q, k = (project(w).transpose(0, 1)[None] for w in (query, key))
    q, k = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    expected = (q @ k.transpose(-1, -2))[0]
    turned = [
        rotated_in_pairs(project(names.interleaved(w, heads)), theta).transpose(0, 1) for w in (query, key)
    ]
    assert torch.allclose(turned[0] @ turned[1].transpose(-1, -2), expected, atol=1e-4)
    plain = [rotated_in_pairs(project(w), theta).transpose(0, 1) for w in (query, key)]
    assert not torch.allclose(plain[0] @ plain[1].transpose(-1, -2), expected, atol=1e-1)
    assert torch.equal(names.in_halves(names.interleaved(query, heads), heads), query)


def converted_text(params: dict[str, Any]) -> dict[str, Any]:
    """Settings of the language model as transformers' script reads them from ``params.json``."""
    renamed = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "intermediate_size": "hidden_dim"}
    renamed |= {
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "rms_norm_eps": "norm_eps",
    }
    renamed |= {name: name for name in ("head_dim", "vocab_size", "rope_theta")}
    return {
        ours: params[theirs]
        for ours, theirs in (renamed | {"max_position_embeddings": "max_seq_len"}).items()
    }


def test_params_say_what_transformers_and_vllm_read(tiny_model: Path) -> None:
    config = modeling.read_config(str(tiny_model))
    params = names.params(config, json.loads((tiny_model / "tekken.json").read_text())["audio"])
    text, audio = config.text_config, config.audio_config
    for name, value in converted_text(params).items():
        assert value == (text.rope_parameters[name] if name == "rope_theta" else getattr(text, name)), name
    assert params["max_position_embeddings"] == 4096 and params["tied_embeddings"] is False
    whisper = params["multimodal"]["whisper_model_args"]
    encoder, sound = whisper["encoder_args"], whisper["encoder_args"]["audio_encoding_args"]
    assert whisper["downsample_args"] == {"downsample_factor": 4}
    sizes = [encoder[n] for n in ("dim", "n_layers", "hidden_dim", "n_heads", "head_dim", "vocab_size")]
    assert sizes == [audio.hidden_size, 1, 512, 4, 32, audio.vocab_size]
    assert encoder["max_source_positions"] == 100
    assert (sound["num_mel_bins"], sound["window_size"], sound["sampling_rate"], sound["hop_length"]) == (
        128,
        400,
        16000,
        160,
    )
    assert "causal" not in encoder, "vLLM would take it for a realtime model"
