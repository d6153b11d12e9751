"""Every preset of ds_configs/ under the real DeepSpeed, on two ranks: accepted, exact, and its state can be kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, run_ranks
from test_engine import digest, micro_batches, moments, poisoned, put_back, weights
from test_gradient import SPLITS, build, make_examples, reference_gradient, relative_errors

from voxtral_dist import optimizer_state
from voxtral_dist.ds_config import BUCKET_LIMIT, EngineSettings, build_ds_config
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import UserError

PRESETS = sorted((ROOT / "ds_configs").glob("*.json"))
STAGE_1 = {"zero_optimization": {"stage": 1}}
SPLIT = "text | audio"


def three_steps(rank: int, model_dir: str, files: list[str], out: str) -> list[dict[str, Any]]:
    """Per file: the gradient of a step; one that is skipped; offloaded state in a new engine, both engines' next."""
    seen = []
    for file in files:
        settings = EngineSettings(max_grad_norm=0.5, ds_config=file)
        training, collator = build(model_dir)
        batches = micro_batches(collator, make_examples(collator.spec), SPLITS[SPLIT][rank])
        engine = TrainEngine(training, settings)
        result = engine.train_step(batches, 1e-3)
        tensors, step = optimizer_state.gather(engine)
        if rank == 0:
            gradient = {k.split("/", 1)[1]: v / 0.1 for k, v in tensors.items() if k.startswith("exp_avg/")}
            torch.save(gradient, Path(out, f"{Path(file).stem}.pt"))
        before = [digest(engine), *moments(engine)]
        skipped = engine.train_step([poisoned(batches[0])] if rank == 1 else batches, 1e-3)
        state = [[digest(engine), *moments(engine)]]
        untouched = before == state[0]
        if engine.zero_optimizer.cpu_offload:
            other = TrainEngine(build(model_dir)[0], settings)
            put_back(other, {"weights": weights(engine), "moments": tensors, "step": step})
            for one in (engine, other):
                one.train_step(batches, 1e-3)
            state = [[digest(one), *moments(one)] for one in (engine, other)]
        seen.append(
            {
                "norm": result.grad_norm,
                "applied": [result.applied, skipped.applied],
                "untouched": untouched,
                "same": state[0] == state[-1],
                "offload": bool(engine.zero_optimizer.cpu_offload),
            }
        )
    return seen


@pytest.fixture(scope="module")
def ran(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """What both ranks saw, by preset; ZeRO-1 beside them as a file of a user's own."""
    out = tmp_path_factory.mktemp("presets")
    (out / "stage1.json").write_text(json.dumps(STAGE_1))
    files = [*map(str, PRESETS), str(out / "stage1.json")]
    first, second = run_ranks(three_steps, 2, str(tiny_model), files, str(out))
    names = [Path(file).stem for file in files]
    return out, dict(zip(names, first, strict=True)), dict(zip(names, second, strict=True))


@pytest.mark.parametrize("name", [*(path.stem for path in PRESETS), "stage1"])
def test_preset_gives_the_exact_gradient_and_keeps_its_state(
    tiny_model: Path, ran: tuple[Path, dict[str, Any], dict[str, Any]], name: str
) -> None:
    out, first, second = ran
    seen = first[name]
    assert seen == second[name], "the ranks agree"
    expected = reference_gradient(str(tiny_model), 0.5)
    errors = relative_errors(torch.load(out / f"{name}.pt", weights_only=True), expected)
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
    norm = torch.stack([g.norm() for g in reference_gradient(str(tiny_model), 0.0).values()]).norm()
    assert seen["norm"] == pytest.approx(float(norm), rel=1e-5), "before clipping"
    assert seen["applied"] == [True, False] and seen["untouched"] and seen["same"]
    assert seen["offload"] == ("offload" in name)


def test_readme_opens_each_preset_with_its_command() -> None:
    text = (ROOT / "ds_configs" / "README.md").read_text("utf-8")
    for path in PRESETS:
        place = text.index(f"\n### {path.name}\n")
        section = text[place + 1 :].split("\n### ")[0]
        assert re.match(
            rf"### {path.name}\n\n```bash\n[^`]*--ds_config ds_configs/{path.name}[^`]*```\n", section
        )
    described = set(re.findall(r"^\| `([\w.]+)` \|", text, re.M))
    for path in PRESETS:
        values = json.loads(path.read_text())
        keys = {*values, *values["zero_optimization"]} - {"zero_optimization"}
        assert keys <= described | {"offload_optimizer"}, path.name


# a user's own file


def refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        build_ds_config(EngineSettings(ds_config=str(path)), 1000)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "reason"), [(0, "keeps no gradient back"), (3, "gathers weights in the forward pass")]
)
def test_other_stages_are_refused_with_the_reason(tmp_path: Path, stage: int, reason: str) -> None:
    refused(
        tmp_path, {"zero_optimization": {"stage": stage}}, f"ZeRO stage {stage} {reason}.*needs stage 1 or 2"
    )


DECIDES = {
    "train_batch_size": (8, "--global_batch_size, else --per_device_bsz x --grad_accum x ranks"),
    "train_micro_batch_size_per_gpu": (2, "--per_device_bsz and --max_tokens_per_micro_batch decide"),
    "gradient_accumulation_steps": (4, r"--grad_accum \(at the first start\) or --global_batch_size decides"),
    "gradient_clipping": (1.0, "--max_grad_norm decides"),
    "optimizer": ({"type": "AdamW"}, "--weight_decay; AdamW is built in"),
    "zero_force_ds_cpu_optimizer": (True, "torch's AdamW is used"),
}


@pytest.mark.parametrize("key", DECIDES)
def test_contradiction_names_the_flag_that_decides(tmp_path: Path, key: str) -> None:
    value, flag = DECIDES[key]
    refused(tmp_path, STAGE_1 | {key: value}, f"{key}.*{flag}")


def test_only_host_memory_takes_the_optimizer(tmp_path: Path) -> None:
    offload = {"device": "nvme", "nvme_path": "/tmp"}
    refused(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": offload}}, "'nvme'; only 'cpu'")
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    assert build_ds_config(EngineSettings(ds_config=str(path)), 10)["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in build_ds_config(EngineSettings(), 10)


def test_buckets_of_whole_weights_are_bounded() -> None:
    zero = build_ds_config(EngineSettings(), 3_234_000_001)["zero_optimization"]
    assert (
        zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == BUCKET_LIMIT and BUCKET_LIMIT % 2 == 0
    )
