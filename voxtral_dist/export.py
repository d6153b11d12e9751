"""Exports of a run: how they are written, proved and put into their place.

    source = find_source(Path("runs/one"), which="", model_id="")
    proof = export(source, "merged", Path("one-merged"), dtype="")

An export is written aside, loaded again, compared with the run's own model and renamed; one that is refused leaves
nothing behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from voxtral_dist import adapter, export_adapters, export_models, model, model_card, prepare
from voxtral_dist.atomic import holds, new_folder, write_json
from voxtral_dist.config import DataConfig, split_list
from voxtral_dist.errors import UserError
from voxtral_dist.export_proof import Proof, behaviour, examples, judge
from voxtral_dist.export_source import Source, find_base
from voxtral_dist.export_weights import BaseWeights, Job, Trained
from voxtral_dist.full_tuning import WeightsConfig
from voxtral_dist.run_record import read_run
from voxtral_dist.shard_format import file_sha256

VERSION = "voxtral-dist/export/1"
RECORD, CARD = "export.json", "README.md"


class Format(NamedTuple):
    """How an export is written into a folder, how it is loaded from there, and whether it is a whole model."""

    write: Callable[[Job, Path], None]
    load: Callable[[Job, Path], Any]
    whole: bool


FORMATS = {
    "adapter": Format(export_adapters.write_adapter, export_adapters.load_adapter, False),
    "merged": Format(export_models.write_merged, export_models.load_merged, True),
    "mistral": Format(export_models.write_mistral, export_models.load_mistral, True),
    "vllm-lora": Format(export_adapters.write_vllm_lora, export_adapters.load_vllm_lora, False),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export(source: Source, kind: str, out: Path, dtype: str) -> Proof | None:
    """Write an export, prove it and put it into its place; None when it is there already.

    Args:
        source: from :func:`find_source`.
        kind: a key of :data:`FORMATS`.
        out: a folder that is missing, empty or holds this very export.
        dtype: a key of :data:`DTYPES` for the weights of a whole model; "": the base's own.

    Raises:
        UserError: it cannot be made in this format, or ``out`` holds something else.
        VoxtralDistError: what was written is not the run's model.
    """
    how = FORMATS[kind]
    if dtype and not how.whole:
        raise UserError(f"--dtype {dtype}: --format {kind} holds no weights of the base; leave the flag out")
    folder = find_base(source.base)
    model.read_config(str(folder))
    base_name = Path(source.base).name if Path(source.base).is_dir() else source.base
    trained = Trained.read(source.adapter)
    job = Job(BaseWeights.open(folder), base_name, source.adapter, trained, DTYPES.get(dtype))
    identity = _identity(source, kind, job)
    if holds(out, RECORD, identity):
        return None
    with new_folder(out) as aside:
        how.write(job, aside)
        proof, weights = _prove(source, kind, job, aside)
        facts = _facts(source, kind, job, out.resolve().name, proof)
        write_json(
            aside / RECORD, {"version": VERSION, "identity": identity, "weights": weights, **asdict(facts)}
        )
        record = read_run(source.run) if source.run else None
        (aside / CARD).write_text(model_card.render(facts, record, weights), "utf-8")
    return proof


def _facts(source: Source, kind: str, job: Job, name: str, proof: Proof) -> model_card.Facts:
    return model_card.Facts(
        name=name,
        format=kind,
        dtype=_dtype(kind, job),
        base=job.base_name,
        on_hub=not Path(source.base).is_dir(),
        step=source.step,
        form=_form(job.trained.config),
        proof=asdict(proof),
    )


def _identity(source: Source, kind: str, job: Job) -> str:
    """SHA-256 over what decides the files, hex."""
    with (source.adapter / adapter.WEIGHTS_FILE).open("rb") as file:
        weights = file_sha256(file)
    config = (job.base.folder / "config.json").read_text("utf-8")
    shapes = {name: [list(shape), str(dtype)] for name, (shape, dtype) in job.specs.items()}
    decisive = [VERSION, kind, source.base, config, shapes, weights]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _dtype(kind: str, job: Job) -> str:
    """Type of most of the tensors that an export holds."""
    own = [tensor.dtype for tensor in job.trained.tensors.values()]
    types = [dtype for _, dtype in job.specs.values()] if FORMATS[kind].whole else own
    return str(max(set(types), key=types.count)).removeprefix("torch.")


def _form(config: Any) -> list[tuple[str, Any]]:
    """Method, size and place of what was trained, for the card."""
    if isinstance(config, WeightsConfig):
        what = {"projector": "projector", "language_model": "projector, layers of the language model"}[
            config.tune
        ]
        return [
            ("method", "whole weights"),
            ("trained", what if config.freeze_whisper else f"{what}, audio encoder"),
        ]
    method = ("DoRA" if config.use_dora else "LoRA") + (", rank-stabilised" if config.use_rslora else "")
    known = {pattern: name for name, pattern in adapter.TARGET_MODULES.items()}
    where = known.get(str(config.target_modules), "see adapter_config.json")
    where = {"both": "language model, projector", "language_model": "language model"}.get(where, where)
    rows = [
        ("method", method),
        ("rank", config.r),
        ("alpha", config.lora_alpha),
        ("dropout", config.lora_dropout),
    ]
    return [*rows, ("trained", f"{where}, whole audio encoder" if config.modules_to_save else where)]


def _prove(source: Source, kind: str, job: Job, folder: Path) -> tuple[Proof, str]:
    """Compare what was written with the run's own model; also the hash of the latter's trained weights."""
    base = str(job.base.folder)
    spoken = source.settings.get("sqa_question", "written")
    collator = prepare.open_collator(DataConfig(model_id=base, sqa_question=spoken))
    sets = [Path(name) for name in split_list(source.settings.get("val_shards") or "")]
    if source.run and not sets:
        sets = sorted(source.run.glob("shards/*/dev"))
    rows = examples(sets, collator)
    run_model = model.load(base, torch.float32)
    before = behaviour(run_model, rows, collator)
    run_model = adapter.load(run_model, source.adapter)
    run, weights = behaviour(run_model, rows, collator), adapter.digest(run_model)
    del run_model
    exported = behaviour(FORMATS[kind].load(job, folder), rows, collator)
    rounded = FORMATS[kind].whole and job.is_rounded
    return judge(before, run, exported, rounded=rounded, rows=len(rows) - 3), weights
