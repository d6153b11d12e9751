"""What is no export: refused with one line and nothing left behind; and how the checkpoint to export is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import FORMS, publish, source_of
from test_model import tuned

from voxtral_dist import adapter, checkpoint, mistral_names
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.export import export
from voxtral_dist.export_proof import Behaviour, judge
from voxtral_dist.export_source import find_source


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a LoRA on language model and projector."""
    return publish(tmp_path_factory.mktemp("run") / "run", tuned(tiny_model), tiny_model)


def nothing_left(out: Path) -> bool:
    return not list(out.parent.glob(f"{out.name}*"))


def zero_b(folder: Path) -> None:
    tensors = load_file(folder / adapter.WEIGHTS_FILE)
    save_file({n: t * ("lora_B" not in n) for n, t in tensors.items()}, folder / adapter.WEIGHTS_FILE)


def misname(folder: Path) -> None:
    tensors = load_file(folder / adapter.WEIGHTS_FILE)
    save_file(
        {n.replace("layers.1", "layers.7"): t for n, t in tensors.items()}, folder / adapter.WEIGHTS_FILE
    )


def poison(folder: Path) -> None:
    tensors = load_file(folder / adapter.WEIGHTS_FILE)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / adapter.WEIGHTS_FILE)


def unreadable(folder: Path) -> None:
    (folder / adapter.WEIGHTS_FILE).write_bytes(b"\x00")


def patterned(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 1}}))


Damage = Callable[[Path], None]
REFUSED: dict[str, tuple[str, str, Damage | None, str]] = {
    "nothing learned": ("lora", "merged", zero_b, "all 16 lora_B tensors are zero"),
    "NaN": ("lora", "merged", poison, "holds NaN or infinity"),
    "cut off": ("lora", "merged", unreadable, "holds no readable adapter"),
    "other ranks": ("lora", "merged", patterned, "a LoRA with alpha_pattern"),
    "names of no weight": ("lora", "merged", misname, "7 of 16 trained weights are not in the base model"),
    "names of no weight, mistral": (
        "lora",
        "mistral",
        misname,
        "7 of 16 trained weights are not in the base",
    ),
    "names of no weight, adapter": ("lora", "adapter", misname, "does not fit the model"),
    "DoRA for vLLM": ("dora language model", "vllm-lora", None, "a DoRA, which vLLM does not serve"),
    "projector for vLLM": (
        "lora",
        "vllm-lora",
        None,
        "would ignore 4 of 32 trained tensors, such as .*projector",
    ),
    "encoder for vLLM": ("encoder", "vllm-lora", None, "vLLM serves adapters of the language model alone"),
    "weights for vLLM": (
        "projector weights",
        "vllm-lora",
        None,
        r"whole weights \(--tune projector\), no adapter",
    ),
    "weights as adapter": (
        "projector weights",
        "adapter",
        None,
        r"whole weights \(--tune projector\), no adapter",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, case: str
) -> None:
    form, kind, damage, message = REFUSED[case]
    changes = FORMS.get(form, {"dora": True, "targets": "language_model"})
    source = source_of(tuned(tiny_model, **changes), tiny_model, tmp_path / "adapter")
    if damage:
        damage(source.adapter)
    with pytest.raises(UserError, match=message) as caught:
        export(source, kind, tmp_path / "out", "")
    assert "\n" not in str(caught.value) and nothing_left(tmp_path / "out")


def test_an_export_that_is_another_model_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong order of rows, as from a wrong permutation, is seen by the proof."""
    monkeypatch.setattr(mistral_names, "interleaved", lambda weight, heads: weight)
    with pytest.raises(VoxtralDistError, match="the export is not the run's model"):
        export(find_source(run, "", ""), "mistral", tmp_path / "out", "")
    assert nothing_left(tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the weights take 0\.0 GB and 0\.0 GB are free; make room"):
        export(find_source(run, "", ""), "merged", tmp_path / "out", "")
    assert nothing_left(tmp_path / "out")


def said(shift: float, answer: int = 1) -> Behaviour:
    return Behaviour(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + shift * torch.tensor([1.0, -1.0]), [[answer]])


def test_the_verdict_follows_the_difference() -> None:
    before, after = said(0.0), said(1.0)
    assert judge(before, after, said(1.0001), rounded=False, rows=0).equal_answers == 1
    assert judge(before, after, said(1.4), rounded=True, rows=0).lost == pytest.approx(0.4)
    for wrong in (said(1.01), said(1.0, answer=2), said(float("nan"))):
        with pytest.raises(VoxtralDistError, match="not the run's model"):
            judge(before, after, wrong, rounded=False, rows=0)
    with pytest.raises(UserError, match="lose 60% of what training changed"):
        judge(before, after, said(1.6), rounded=True, rows=0)
    with pytest.raises(UserError, match="change no logit"):
        judge(before, before, before, rounded=False, rows=0)


def test_flags_and_sources_that_do_not_fit(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    cases = [
        (run, "step-9", "has no checkpoint step-9; there are: step-00000004"),
        (run, "newest", "--checkpoint newest: give best, last or step-N"),
        (tmp_path, "", "neither a run directory"),
        (run / "checkpoints/step-00000004", "best", "is no run directory; leave the flag out"),
    ]
    for path, which, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            find_source(path, which, "")
        assert "lora_dir" not in str(caught.value)
    with pytest.raises(UserError, match="--dtype bf16: --format adapter holds no weights of the base"):
        export(find_source(run, "", ""), "adapter", tmp_path / "out", "bf16")
    with pytest.raises(UserError, match="no local folder, and not on the hub"):
        export(find_source(run, "", str(tmp_path / "gone")), "adapter", tmp_path / "out", "")
    adapter.save(tuned(tiny_model, tune="projector"), tmp_path / "weights")
    with pytest.raises(UserError, match="on which base model"):
        find_source(tmp_path / "weights", "", "")


def test_checkpoints_of_a_run_are_found(tiny_model: Path, tmp_path: Path) -> None:
    run = publish(tmp_path / "run", tuned(tiny_model), tiny_model)
    publish(run, tuned(tiny_model, seed=2), tiny_model, step=8)
    (run / "best").write_text("step-00000004\n")
    for which, step in (("", 4), ("best", 4), ("last", 8), ("step-8", 8), ("step-00000004", 4)):
        source = find_source(run, which, "")
        assert (source.step, source.base, source.run) == (step, str(tiny_model), run.resolve())
        assert source.adapter == checkpoint.step_dir(run, step) / "adapter"
    inside = find_source(run / "checkpoints/step-00000008", "", "")
    assert (inside.step, inside.run) == (8, run.resolve())
    alone = find_source(run / "checkpoints/step-00000008/adapter", "", "")
    assert (alone.step, alone.run, alone.base) == (None, None, str(tiny_model))
    (run / "checkpoints/step-00000008/adapter/adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="step-00000008 is damaged"):
        find_source(run, "last", "")
