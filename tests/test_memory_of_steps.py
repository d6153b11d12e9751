"""The memory estimate against whole steps: the real engine's on two CPU ranks, and what was measured on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, run_ranks
from peft.tuners.lora.layer import Linear
from test_gradient import LORA
from test_last_layer import Whole
from test_memory import storages
from test_model import base
from transformers import VoxtralConfig

from voxtral_dist import adapter, memory, step_memory
from voxtral_dist import model as modeling
from voxtral_dist.config import TrainConfig
from voxtral_dist.ds_config import EngineSettings
from voxtral_dist.prepare import lora_settings
from voxtral_dist.step_memory import LiveBytes, Shape

MEASURED = [
    ({}, 512, 13_660_278_784),
    ({}, 2048, 22_609_149_952),
    ({}, 4096, 33_607_806_464),
    ({}, 7168, 50_088_133_120),
    ({"grad_ckpt": True}, 2048, 11_989_953_536),
    ({"grad_ckpt": True}, 16384, 18_217_312_256),
    ({"packed": True}, 2048, 22_574_002_176),
    ({"tune": "projector"}, 2048, 17_331_001_344),
    ({"tune": "language_model"}, 2048, 85_156_569_088),
]
"""Flags, positions, and the most bytes that CUDA's allocator held in a step of tools/bench_memory.py with the shape of
Voxtral-Mini: one H200, torch 2.11.0+cu130, transformers 5.17.0, deepspeed 0.19.8. peft's layers then, which cast their
inputs.
"""


def use_layers_of_then(training: modeling.TrainingModel, casting: bool) -> None:
    """What the peaks were measured with: peft's adapters, and the last MLP on all positions."""
    training.voxtral.model.language_model.layers[-1].__class__ = Whole
    for module in training.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = casting
            module.__class__ = Linear


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "positions", "measured"), MEASURED)
def test_peaks_measured_on_a_gpu(flags: dict[str, Any], positions: int, measured: int) -> None:
    config, mini = TrainConfig(**({"packed": False} | flags)), VoxtralConfig()
    shape = Shape.worst(positions, 2048, mini, config.packed)
    training = step_memory.weightless(mini, lora_settings(config), bf16=True, grad_ckpt=config.grad_ckpt)
    use_layers_of_then(training, casting=True)
    held = memory.states(training, config, 1, bf16=True)
    passes = step_memory.trace(training, shape, bf16=True)
    assert memory.Estimate(held, passes, shape, 0).peak == pytest.approx(measured, rel=0.03)


LATER = [
    (8, False, 27.88),
    (16, False, 46.60),
    (32, False, 83.42),
    (8, True, 10.44),
    (16, True, 11.80),
    (32, True, 14.52),
]
"""Clips of 3 s, whether layers are recomputed, and GiB at most in a step of tools/bench_train_step.py on an H200 after
the estimate was complete: packed, varlen_attn, which repeats keys and values in this version of PyTorch, no casting."""


@pytest.mark.slow
@pytest.mark.parametrize(("clips", "grad_ckpt", "measured"), LATER)
def test_peaks_measured_after_the_estimate_was_made(clips: int, grad_ckpt: bool, measured: float) -> None:
    config, mini = (
        TrainConfig(lora_targets="language_model", packed=True, grad_ckpt=grad_ckpt),
        VoxtralConfig(),
    )
    shape = Shape(1, 429 * clips, clips, 46 * clips, packed=True)
    training = step_memory.weightless(mini, lora_settings(config), bf16=True, grad_ckpt=grad_ckpt)
    use_layers_of_then(training, casting=False)
    held = memory.states(training, config, 1, bf16=True)
    passes = step_memory.trace(training, shape, bf16=True)
    assert memory.Estimate(held, passes, shape, 0).peak / 2**30 == pytest.approx(measured, rel=0.1)


Counted = dict[str, int]


def engine_bytes(rank: int, model_dir: str, cases: list[Any]) -> list[list[Counted]]:
    """Bytes of the real engine on two ranks, and what is estimated of them, by case."""
    from voxtral_dist.engine import TrainEngine
    from voxtral_dist.micro_batch_probe import MadeUp, held_by

    found = []
    for tune, ds_config, sizes in cases:
        settings, config = replace(LORA, tune=tune), modeling.read_config(model_dir)
        training = modeling.TrainingModel(adapter.attach(base(Path(model_dir)), settings), 1)
        engine = TrainEngine(training, EngineSettings(ds_config=ds_config))
        engine.train_step(MadeUp(), 0.0)
        weights = storages(p for p in training.parameters() if p.requires_grad)
        states = storages(held_by(engine))
        batch = step_memory.micro_batch(Shape(*sizes), config)
        with LiveBytes(held_by(engine)) as live:
            engine.train_step(MadeUp(batch, batch), 0.0)
        counted = {
            "frozen": sum(p.nbytes for p in training.parameters() if not p.requires_grad),
            "trained": sum(weights.values()),
            "held": sum(states.values()),
            "peak": max(live.peaks.values()),
        }
        flags = TrainConfig(ds_config=ds_config)
        guess = memory.estimate(flags, config, settings, ranks=2, shape=Shape(*sizes), bf16=False)
        s = guess.states
        estimated = {"frozen": sum(s.frozen.values()), "trained": s.trained, "held": s.held}
        found.append([counted, estimated | {"peak": guess.peak}])
    return found


@pytest.mark.slow
def test_states_and_peak_are_those_of_the_engine(tiny_model: Path) -> None:
    """Where the activations decide and where the update does, with one large bucket and with small ones."""
    small = str(ROOT / "ds_configs/cpu_test.json")
    cases = [
        ("lora", "", (4, 100, 4, 100)),
        ("language_model", "", (2, 4, 0, 8)),
        ("language_model", small, (2, 4, 0, 8)),
    ]
    first, second = run_ranks(engine_bytes, 2, str(tiny_model), cases)
    for counted, estimated in [*first, *second]:
        assert estimated == pytest.approx(counted, rel=0.1)
