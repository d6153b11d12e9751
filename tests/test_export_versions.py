"""Exports of a run that really trained, loaded by other versions of transformers.

The versions are installed into the cache of pytest, without what the environment has already; where the package index
cannot be reached the tests are skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from demo_runs import Demo, alone, environment
from harness import ROOT
from safetensors.torch import load_file, save_file
from test_gradient import make_examples
from test_model import base, stock_logits

from voxtral_dist import adapter, checkpoint
from voxtral_dist import model as modeling
from voxtral_dist.audio import AudioSpec
from voxtral_dist.batch import MicroBatch
from voxtral_dist.collator import Collator
from voxtral_dist.tokenizer import TekkenVocabulary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OLD = ("transformers==4.57.6", "huggingface-hub<1", "tokenizers>=0.22,<=0.23.0")
NEWEST = ("transformers>=5,<6",)

LOGITS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, VoxtralForConditionalGeneration

folder, adapter, inputs, out = sys.argv[1:]
model, info = VoxtralForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
AutoProcessor.from_pretrained(folder)
if adapter:
    import peft
    model = peft.PeftModel.from_pretrained(model, adapter)
given = load_file(inputs)
with torch.no_grad():
    logits = model.eval()(input_ids=given["ids"], input_features=given["audio"], use_cache=False).logits
save_file({"logits": logits}, out)
print("version", sys.modules["transformers"].__version__)
"""


@pytest.fixture(scope="module")
def run(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps over the demo, with its evaluations."""
    out = tmp_path_factory.mktemp("runs") / "run"
    alone(demo.flags(out), out)
    return out


@pytest.fixture(scope="module")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in three formats, by the command."""
    out = tmp_path_factory.mktemp("exports")
    for kind in ("adapter", "merged", "mistral"):
        command = [
            sys.executable,
            "tools/export_adapter.py",
            str(run),
            "--format",
            kind,
            "--out",
            str(out / kind),
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "9 of 9 greedy answers are equal" in done.stdout
    return out


@pytest.fixture(scope="module")
def batch(demo: Demo) -> MicroBatch:
    """Text and audio mixed."""
    folder = str(demo.model)
    words = Collator(TekkenVocabulary.load(folder), AudioSpec.from_config(modeling.read_config(folder)))
    rows = make_examples(words.spec)
    return words.train_batch([rows[i] for i in (0, 4, 1, 5)], 0)


@pytest.fixture(scope="module")
def expected(run: Path, demo: Demo, batch: MicroBatch) -> torch.Tensor:
    """Logits of the run's own model."""
    return stock_logits(adapter.load(base(demo.model), checkpoint.find_adapter(run)), batch)


def installed(pytestconfig: pytest.Config, name: str, packages: tuple[str, ...]) -> Path:
    """A folder with these packages, made once."""
    folder = Path(pytestconfig.cache.mkdir(f"export-{name}"))
    mark = folder / ".complete"
    if not mark.is_file():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--upgrade",
            "--target",
            str(folder),
        ]
        done = subprocess.run([*pip, *packages], text=True, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"{packages[0]} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        mark.touch()
    return folder


def version_in(folder: Path) -> str:
    return next(metadata.distributions(name="transformers", path=[str(folder)])).version


def elsewhere(
    packages: Path, batch: MicroBatch, folder: Path, out: Path, with_adapter: Path | str = ""
) -> tuple[torch.Tensor, str]:
    """Logits by the transformers in ``packages``, and what it said."""
    save_file({"ids": batch.input_ids, "audio": batch.audio}, out / "inputs.safetensors")
    command = [sys.executable, "-c", LOGITS, str(folder), str(with_adapter), str(out / "inputs.safetensors")]
    environ = environment(PYTHONPATH=str(packages), HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [*command, str(out / "logits.safetensors")],
        cwd=out,
        env=environ,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"version {version_in(packages)}" in done.stdout
    return load_file(out / "logits.safetensors")["logits"], done.stderr


def test_merged_folder_under_transformers_4(
    pytestconfig: pytest.Config, exports: Path, batch: MicroBatch, expected: torch.Tensor, tmp_path: Path
) -> None:
    found, _ = elsewhere(installed(pytestconfig, "4.57.6", OLD), batch, exports / "merged", tmp_path)
    assert float((found - expected).abs().max()) < 1e-4


def test_transformers_4_takes_a_part_of_the_adapter_as_its_card_says(
    pytestconfig: pytest.Config,
    exports: Path,
    demo: Demo,
    batch: MicroBatch,
    expected: torch.Tensor,
    tmp_path: Path,
) -> None:
    packages = installed(pytestconfig, "4.57.6", OLD)
    found, said = elsewhere(packages, batch, demo.model, tmp_path, exports / "adapter")
    plain = stock_logits(base(demo.model), batch)
    assert "Found missing adapter keys" in said and "self_attn.q_proj.lora_A" in said
    assert float((found - expected).abs().max()) > 0.1 < float((found - plain).abs().max())
    assert "take only a part of the adapter" in (exports / "adapter/README.md").read_text("utf-8")


def test_both_under_the_newest_transformers(
    pytestconfig: pytest.Config,
    exports: Path,
    demo: Demo,
    batch: MicroBatch,
    expected: torch.Tensor,
    tmp_path: Path,
) -> None:
    packages = installed(pytestconfig, "newest", NEWEST)
    if version_in(packages) == metadata.version("transformers"):
        pytest.skip("the newest transformers is the installed one, which the fast tier tests")
    merged, _ = elsewhere(packages, batch, exports / "merged", tmp_path)
    assert float((merged - expected).abs().max()) < 1e-4
    adapted, said = elsewhere(packages, batch, demo.model, tmp_path, exports / "adapter")
    assert float((adapted - expected).abs().max()) < 1e-4 and "missing adapter keys" not in said


def test_card_of_a_real_run_has_its_scores(run: Path, exports: Path) -> None:
    card = (exports / "mistral/README.md").read_text("utf-8")
    step = next(step for step in (4, 8) if f"| checkpoint | step {step} |" in card)
    metrics = json.loads((run / f"eval/step-{step:08d}/metrics.json").read_text("utf-8"))
    assert re.search(rf"asr  \| cer .* \| {metrics['tasks']['asr']['cer']:.4f}", card)
    assert "asr/dev | 8 |" in card and "asr/train | 60 |" in card
