"""``--torch_compile``: training passes through compiled layers give the gradient of the plain ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_runs import Demo, Process, started
from test_gradient import build, make_examples
from test_packed import gradients

from voxtral_dist.config import TrainConfig
from voxtral_dist.errors import UserError
from voxtral_dist.model import TrainingModel


def compiled(training: TrainingModel) -> set[bool]:
    core = training.voxtral.model
    layers = [*core.language_model.layers, *core.audio_tower.layers]
    return {layer._compiled_call_impl is not None for layer in layers}


def test_layers_are_compiled_in_training_alone(tiny_model: Path) -> None:
    training, _ = build(str(tiny_model))
    assert compiled(training.train()) == {False}
    training.compile_layers()
    assert compiled(training) == {False}
    for mode in (True, False, True):
        assert compiled(training.train(mode)) == {mode}


WATCHED = """
import sys
sys.path.insert(0, "launch")
import train
from voxtral_dist.decode_share import Share
from voxtral_dist.model import TrainingModel, unwrap


def watched(function, name):
    def call(self, *args):
        layer = unwrap(self.model).model.language_model.layers[0]
        print(f"{name} compiled={layer._compiled_call_impl is not None} training={layer.training}", flush=True)
        return function(self, *args)
    return call


Share.run = watched(Share.run, "decode")
TrainingModel.forward = watched(TrainingModel.forward, "step")
train.main()
"""


def test_a_run_decodes_through_the_layers_as_they_are(demo: Demo, tmp_path: Path) -> None:
    """Before, between and after its training steps."""
    flags = demo.flags(tmp_path / "run", "--max_steps", "2", "--eval_steps", "1", "--torch_compile")
    with started([Process([sys.executable, "-c", WATCHED, *flags], tmp_path / "log")]) as (process,):
        assert process.end() == 0, process.text
    found = [line for line in process.text.splitlines() if line.startswith(("decode ", "step "))]
    decodings = [line for line in found if line.startswith("decode")]
    assert decodings == ["decode compiled=False training=False"] * 3 and found[0] == found[-1] == decodings[0]
    assert "step compiled=True training=True" in found and "step compiled=False training=True" not in found


def test_a_missing_compiler_is_one_line(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nlong story")

    monkeypatch.setattr(torch, "compile", fail)
    training, _ = build(str(tiny_model))
    with pytest.raises(UserError, match=r"--torch_compile .* No working C\+\+ compiler found; leave it out"):
        training.compile_layers()
    assert compiled(training.train()) == {False}


def test_recomputed_layers_are_not_compiled() -> None:
    flags = {"train_shards": "a", "val_shards": "b", "model_id": "c", "output_dir": "d"}
    with pytest.raises(UserError, match=r"--torch_compile with --grad_ckpt: .* leave one out"):
        TrainConfig(**flags, torch_compile=True, grad_ckpt=True).validate()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_layers_give_the_same_gradient(
    tiny_model: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sounds and texts, texts alone, one example: every kind of pass that a run makes."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    training, collator = build(str(tiny_model))
    examples = make_examples(collator.spec)
    texts = [example for example in examples if example.mel is None]
    batches = [
        collator.train_batch(part, 0, packed) for part in (examples, examples[:3], texts, examples[:1])
    ]
    expected = gradients(training.train(), batches)
    training.compile_layers()
    torch._dynamo.utils.counters.clear()
    found = gradients(training.train(), batches)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name
