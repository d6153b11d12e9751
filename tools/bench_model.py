"""The model that the benchmarks of a step, of transcription and of scaling share: a shape with random weights.

For ``tools/bench_train_step.py``, ``tools/bench_rtfx.py`` and ``tools/bench_scaling.py``; nothing is downloaded.
"""

from __future__ import annotations

import platform
import time
from typing import Any

import peft
import torch
import transformers
from transformers import VoxtralConfig, VoxtralForConditionalGeneration

from voxtral_dist import adapter

LORA = adapter.LoraSettings(
    r=16, alpha=32.0, dropout=0.05, targets="language_model", freeze_whisper=True, seed=0
)


def shape(device: torch.device) -> VoxtralConfig:
    """Voxtral-Mini-3B on a GPU; on a CPU 136 million weights with nearly the same shares of encoder, body and head."""
    if device.type == "cuda":
        text = {
            "vocab_size": 131_072, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 30,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072, "rope_theta": 1e8,
        }  # fmt: skip
        audio = {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
            "num_mel_bins": 128, "max_source_positions": 1500,
        }  # fmt: skip
    else:
        text = {
            "vocab_size": 8704, "hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 5,
            "num_attention_heads": 20, "num_key_value_heads": 5, "head_dim": 64, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "rope_theta": 1e6,
        }  # fmt: skip
        audio = {
            "hidden_size": 704, "intermediate_size": 2816, "num_hidden_layers": 3, "num_attention_heads": 11,
            "num_mel_bins": 128, "max_source_positions": 300,
        }  # fmt: skip
    return VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", **audio},
        text_config={"model_type": "llama", "tie_word_embeddings": False, **text},
        audio_token_id=24,
    )


def random_model(config: VoxtralConfig, device: torch.device) -> Any:
    """Random weights made on the device, frozen, with an adapter whose B is not zero."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = VoxtralForConditionalGeneration(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = model.to(dtype).to_empty(device=device)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim > 1:
            torch.nn.init.normal_(tensor.data, std=0.02)
        else:
            tensor.data.fill_(0.0 if name.endswith("bias") else 1.0)
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq = rotary.compute_default_rope_parameters(config.text_config)[
        0
    ].to(device)
    wrapped = adapter.attach(model.requires_grad_(False).eval(), LORA)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.01)
    return wrapped


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a figure holds for: date, device and versions."""
    threads = torch.get_num_threads()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
