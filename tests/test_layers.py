"""The import rules of the package, read from its syntax trees: which layer may know which, and who may touch what."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = "voxtral_dist"
FILES = sorted((Path(__file__).resolve().parents[1] / PACKAGE).glob("*.py"))

# A module imports from the layers above its own. Where a layer is "open" its modules may import one another too;
# "2 data", "2 model" and "2 results" do not know each other.
LAYERS = {
    "0 ground": "errors activity atomic config command_line distributed logger watchdog workers",
    "1 words": "sample tasks text_norm normalizers ngram_scores scoring significance record_scores text_checks "
    "loss batch flops early_stopping",
    "2 data": "tar_members shard_format shard_reader shard_source shard_cache encoder_cache shards foreign_tar "
    "foreign verify_tar verify data_stats jsonl jsonl_check row_filter pack_plan packing arm_flags audio_file "
    "audio tokenizer lengths mix stages plan plan_history schedule shares audit micro_batches collator task_data "
    "data step_loader eval_data pauses mpeg recordings predict_rows predict_data dev_sound",
    "2 model": "packed_attention ds_config compiled_layers last_layer model full_tuning lora_linear adapter "
    "step_memory memory step_sums health train_state step_metrics engine optimizer_state checkpoint saver "
    "monitor gpu_meter decode prediction_parts decode_share run_dir resume mistral_names "
    "export_file export_weights export_source export_models export_adapters",
    "2 results": "report predictions figures charts row_charts page run_record run_charts run_facts run_report "
    "model_card error_rows error_groups error_checks error_analysis error_page differences comparison "
    "comparison_page transfer arm_comparison",
    "3 work": "trainer validation_loss gradient_conflict evaluator prepare experiment export_proof",
    "4 runs": "dry_run debug_run micro_batch_probe step_evaluation training_run evaluation_run prediction_run "
    "export",
}
CLOSED = {"3 work"}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules.split()}

# What only these modules may use.
OWNERS = {
    "deepspeed": {"engine"},
    "torch.distributed": {"distributed"},
    "os.environ": {"distributed", "logger"},
    "launch": set[str](),
    "tools": set[str](),
}


def may_import(importer: str, imported: str) -> bool:
    """Whether the layers let one module import another."""
    mine, other = LAYER_OF[importer], LAYER_OF[imported]
    return other not in CLOSED if mine == other else other[0] < mine[0]


def dotted_names(tree: ast.AST) -> set[str]:
    """Every dotted name a module imports or reads, for example ``os.environ`` or ``voxtral_dist.plan.cut``."""
    aliases: dict[str, str] = {}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
            aliases.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom):
            origin = PACKAGE if node.level else node.module or ""
            origin = f"{PACKAGE}.{node.module}" if node.level and node.module else origin
            names.update(f"{origin}.{alias.name}" for alias in node.names)
            aliases.update({alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            names.add(f"{aliases.get(head, head)}.{rest}")
    return {name.replace("os.getenv", "os.environ").replace("os.putenv", "os.environ") for name in names}


def violations(module: str, source: str) -> list[str]:
    """What a module of the package breaks, one line each."""
    names = dotted_names(ast.parse(source))
    found = [
        f"{module} may not use {thing}"
        for thing, owners in OWNERS.items()
        if module not in owners and any(f"{name}.".startswith(f"{thing}.") for name in names)
    ]
    return found + [
        f"{module} ({LAYER_OF[module]}) may not import {other} ({LAYER_OF[other]})"
        for other in sorted(imported_modules(names) - {module})
        if not may_import(module, other)
    ]


def imported_modules(names: set[str]) -> set[str]:
    """The modules of the package among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")} & set(LAYER_OF)


MODULES = [path for path in FILES if path.stem != "__init__"]


def test_every_module_has_a_layer() -> None:
    unknown = [path.stem for path in MODULES if path.stem not in LAYER_OF]
    assert not unknown, "add it to LAYERS, to the layer whose imports it needs"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_upwards(path: Path) -> None:
    assert violations(path.stem, path.read_text("utf-8")) == []


def test_no_import_goes_in_a_circle() -> None:
    names = {path.stem: dotted_names(ast.parse(path.read_text("utf-8"))) for path in MODULES}
    graph = {module: imported_modules(found) - {module} for module, found in names.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_init_imports_nothing() -> None:
    init = next(path for path in FILES if path.stem == "__init__")
    assert dotted_names(ast.parse(init.read_text("utf-8"))) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "from voxtral_dist.tasks import TASKS"),
        ("plan", "from voxtral_dist import checkpoint"),
        ("plan", "def f():\n    import voxtral_dist.engine"),
        ("model", "from voxtral_dist.plan import cut"),
        ("model", "from .plan import cut"),
        ("model", "from . import plan"),
        ("trainer", "from voxtral_dist import evaluator as e"),
        ("evaluator", "from voxtral_dist.trainer import Trainer"),
        ("report", "from voxtral_dist import training_run"),
        ("checkpoint", "import deepspeed.comm"),
        ("checkpoint", "from deepspeed import comm"),
        ("trainer", "from torch import distributed"),
        ("trainer", "import torch.distributed as dist"),
        ("trainer", "import torch\ntorch.distributed.barrier()"),
        ("trainer", "import torch as t\nt.distributed.barrier()"),
        ("config", "import os\nx = os.environ['HOME']"),
        ("config", "import os\nx = os.getenv('HOME')"),
        ("config", "from os import environ"),
        ("trainer", "from tools.build_shards import main"),
        ("trainer", "import launch.train"),
    ],
)
def test_a_broken_rule_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine", "import deepspeed.ops\nfrom voxtral_dist.model import TrainingModel"),
        ("distributed", "import os\nimport torch.distributed as dist\ndist.barrier(os.environ['RANK'])"),
        ("data", "from voxtral_dist import plan as planning\nplanning.cut()"),
        ("trainer", "from voxtral_dist import distributed, engine\ndistributed.barrier()"),
        ("report", "from voxtral_dist import __version__\nimport os.path\nself.tools = launch_time"),
    ],
)
def test_a_kept_rule_is_not_an_error(module: str, source: str) -> None:
    assert violations(module, source) == []
