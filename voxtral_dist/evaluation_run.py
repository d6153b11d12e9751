"""One evaluation from its settings: pack, decode, score, write, and probe whether the audio was heard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from voxtral_dist import checkpoint, distributed, evaluator, prediction_parts, prepare, report
from voxtral_dist.atomic import write_json
from voxtral_dist.config import EvalConfig, load_yaml
from voxtral_dist.distributed import World
from voxtral_dist.errors import UserError
from voxtral_dist.eval_data import EvalData
from voxtral_dist.tasks import TASKS

OF_THE_RUN = ("model_id", "max_len", "load_in_4bit")
"""Settings of a run that its evaluation takes over."""

PROBES = ("swapped", "silence")
"""What the audio probe lets every example hear instead of its own audio."""


def with_run_settings(config: EvalConfig) -> EvalConfig:
    """Fill what the flags leave at its default from the run that ``lora_dir`` names: :data:`OF_THE_RUN`, and
    ``output_dir`` with a folder in it.

    Raises:
        UserError: ``model_id`` or ``output_dir`` is neither given nor to be found, or the run was trained on other
            prompts.
    """
    lora_dir = Path(config.lora_dir)
    if config.lora_dir and (lora_dir / "config.yaml").is_file():
        run = load_yaml(lora_dir / "config.yaml")
        trained = run.get("sqa_question", config.sqa_question)
        if trained != config.sqa_question:
            raise UserError(
                f"--sqa_question {config.sqa_question}: {lora_dir} was trained with {trained!r}, it would be scored on "
                f"prompts it never saw; give --sqa_question {trained}"
            )
        names = OF_THE_RUN if not config.predict else tuple(name for name in OF_THE_RUN if name != "max_len")
        left = [name for name in names if getattr(config, name) == getattr(EvalConfig, name)]
        config = replace(config, **{name: run[name] for name in left if name in run})
        out = lora_dir / ("predictions" if config.predict else "evaluations/latest")
        config = replace(config, output_dir=config.output_dir or str(out))
    for name in ("model_id", "output_dir"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing; without it --lora_dir must be a run directory")
    return config


def evaluate(config: EvalConfig, world: World) -> None:
    """Evaluate an adapter, or the base model without one. Every rank calls it.

    Raises:
        UserError: the model, the adapter or the data are not what the flags say.
    """
    if config.lora_dir:
        checkpoint.find_adapter(Path(config.lora_dir))  # before anything is packed
    collator = prepare.open_collator(config)
    tasks = prepare.open_data(config, config.val_shards, config.val_jsonl, "dev", world, collator)
    data = EvalData(tasks, collator, config.max_len)
    device = distributed.local_device(world)
    distributed.start(device)
    try:
        model, adapter_path = prepare.decoding_model(config, device)
        _evaluate_and_write(config, model, data, adapter_path)
    finally:
        distributed.stop()


def _evaluate_and_write(config: EvalConfig, model: Any, data: EvalData, adapter_path: str | None) -> None:
    out = Path(config.output_dir)
    about = prepare.provenance(config, model) | {"adapter": adapter_path}

    def decoded(audio: str) -> evaluator.Evaluation | None:
        how = prepare.decode_settings(config, config.gen_max_new_tokens, audio)
        return evaluator.evaluate(model, data, how, about, out)

    result = decoded("own")
    probes = {audio: decoded(audio) for audio in PROBES} if config.audio_probe else {}
    if result is None:
        return
    evaluator.write(out, result)
    print(report.score_table(result.metrics))
    if not config.private_text:
        print(f"\n{report.previews(result.predictions, evaluator.PREVIEWS_PER_TASK)}")
    scores = {audio: probe.metrics for audio, probe in probes.items() if probe is not None}
    if scores:
        audio_tasks = [task.name for task in data.tasks if TASKS[task.name].has_audio]
        verdict = report.probe_verdict(result.metrics, scores, audio_tasks)
        write_json(out / "audio_probe.json", {**scores, "verdict": verdict}, private=True)
        print(f"\n{report.probe_table(result.metrics, scores, audio_tasks)}\n{verdict}")
    prediction_parts.remove(out)
    print(f"\nwritten: {out}/metrics.json, predictions.jsonl, timing.jsonl", flush=True)
