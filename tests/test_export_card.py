"""The model card: what it says is on record, what it may not say, and that its loading code runs as it stands."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from demo_runs import TASKS, Demo
from harness import load_script
from test_export import publish
from test_model import tuned
from test_run_report import records

from voxtral_dist import adapter, model_card
from voxtral_dist.atomic import write_json
from voxtral_dist.record_scores import score_records
from voxtral_dist.run_record import read_run

FACTS = model_card.Facts(
    name="out",
    format="merged",
    dtype="bfloat16",
    base="base|model",
    on_hub=False,
    step=4,
    form=[("method", "LoRA"), ("rank", 20)],
    proof={"prompts": 5, "rows": 2, "largest_difference": 1e-5, "largest_change": 3.0, "equal_answers": 5},
)


def evaluate(folder: Path, good: bool, weights: str) -> float:
    """An evaluation of some weights; its CER."""
    folder.mkdir(parents=True)
    metrics = score_records(records(good))
    write_json(folder / "metrics.json", metrics | {"provenance": {"model_id": "m", "weights": weights}})
    return float(metrics["tasks"]["asr"]["cer"])


@pytest.fixture
def run(demo: Demo, tmp_path: Path) -> tuple[Path, str]:
    """A run over the demo with evaluations of its weights and of others; also the weights' hash."""
    model = tuned(demo.model)
    weights = adapter.digest(model)
    shards = {
        split: [str(demo.folder / "shards" / task / split) for task in TASKS] for split in ("train", "dev")
    }
    run = publish(tmp_path / "run", model, demo.model, val_shards=shards["dev"], train_shards=shards["train"])
    prints = {
        split: {
            task: [json.loads(Path(folder, "manifest.json").read_text())["fingerprint"]]
            for task, folder in zip(TASKS, folders, strict=True)
        }
        for split, folders in shards.items()
    }
    write_json(run / "environment.json", {"data": prints["train"]})
    write_json(run / "identity.json", {"tasks": list(TASKS), "dev_data": prints["dev"]})
    evaluate(run / "eval/step-00000000", False, "")
    evaluate(run / "eval/step-00000004", True, weights)
    evaluate(run / "evaluations/mine", True, weights)
    evaluate(run / "evaluations/anothers", False, "0" * 64)
    return run, weights


def test_card_shows_the_data_and_the_scores_of_these_weights_alone(run: tuple[Path, str]) -> None:
    folder, weights = run
    record = read_run(folder)
    card = model_card.render(FACTS, record, weights)
    before, after = (record.evaluations[step]["tasks"]["asr"]["cer"] for step in (0, 4))
    assert f"asr  | cer        | {before:.4f} | {after:.4f}" in card and before != after
    assert "evaluation mine of the same weights" in card and "anothers" not in card
    assert re.search(
        r"\| asr \| train \| asr/train \| 60 \| 0\.0\d \| (ko, en|en, ko) \| fast, slow \| `[0-9a-f]{12}` \|",
        card,
    )
    assert "language: [en, ko]" in card and "base_model:" not in card and "license:" not in card
    assert "Apache-2.0" in card and "step 4" in card and "| rank | 20 |" in card and r"base\|model" in card
    assert not re.findall(r"(?<![\w.])/(?:tmp|home|root|work)\b\S*", card)
    for step, hashed in ((4, "1" * 64), (8, weights), (None, weights)):
        other = model_card.render(model_card.Facts(**vars(FACTS) | {"step": step}), record, hashed)
        assert f"{after:.4f}" not in other.split("The evaluation mine")[0]
    unknown = model_card.render(FACTS, record, "1" * 64)
    assert "No evaluation of these weights is on record." in unknown


def test_card_says_what_limits_the_scores_and_takes_no_markup(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, weights = run
    moved = tmp_path / "run/shards/asr/dev"
    config = json.loads((folder / "config.yaml").read_text())
    shutil.copytree(config["val_shards"][0], moved)
    marker = next(moved.glob("asr-dev-*.json"))
    write_json(marker, json.loads(marker.read_text()) | {"domains": {"<b>x|y`\n# z": 1}})
    config |= {
        "load_in_4bit": True,
        "sqa_question": "spoken",
        "val_shards": [str(moved)],
        "task_weights": "a|b",
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    card = model_card.render(FACTS, read_run(folder), weights)
    assert r"\<b\>x\|y\` \# z" in card and r"| `task_weights` | a\|b |" in card
    assert "beside a base in 4 bits" in card and "the audio asks" in card


def test_card_of_an_adapter_alone_makes_nothing_up() -> None:
    alone = model_card.Facts(
        **vars(FACTS) | {"step": None, "format": "vllm-lora", "base": "org/voxtral", "on_hub": True}
    )
    card = model_card.render(alone, None, "0" * 64)
    assert "not on record here" in card and "No evaluation of these weights is on record." in card
    assert "base_model: org/voxtral" in card and "--max-lora-rank 32 --lora-modules out=out" in card
    assert "was not run" in card and "language:" not in card


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with chunks of 30 s, as the processor makes them."""
    out = tmp_path_factory.mktemp("models") / "long"
    load_script("tools/build_tiny_voxtral.py").build(out, max_source_positions=1500, hidden_size=64)
    return out


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_code_of_the_card_runs_as_it_stands(
    long_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """Beside folders by the names that it uses: of the base, and of an export of that format."""
    (tmp_path / "base").symlink_to(long_model)
    adapter.save(tuned(long_model), tmp_path / "adapter")
    out = tmp_path / "adapter" if kind == "adapter" else long_model
    (tmp_path / "out").symlink_to(out)
    card = model_card.render(model_card.Facts(**vars(FACTS) | {"format": kind, "base": "base"}), None, "")
    monkeypatch.chdir(tmp_path)
    soundfile.write("clip.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    code = re.search(r"```python\n(.*?)```", card, re.S)
    assert code
    scope: dict[str, Any] = {}
    exec(compile(code[1], "README.md", "exec"), scope)
    assert (
        capsys.readouterr().out.startswith("[")
        and scope["answer"].shape[1] > scope["inputs"]["input_ids"].shape[1]
    )


def test_command_asks_rows_of_the_dev_sets_and_says_what_it_did(
    run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, out = load_script("tools/export_adapter.py"), tmp_path / "new/out"
    flags = [str(run[0]), "--format", "adapter", "--out", str(out)]
    tool.main(flags)
    said = capsys.readouterr().out
    assert (
        "logits of 9 prompts differ from the run's by at most 0," in said and "9 of 9 greedy answers" in said
    )
    record = json.loads((out / "export.json").read_text())
    assert record["weights"] == run[1] and record["step"] == 4 and record["proof"]["rows"] == 6
    tool.main(flags)
    assert capsys.readouterr().out == f"{out} already holds this export; nothing was done\n"
