"""One training run from its settings: pack, plan, build, resume, fit, report. Every rank calls :func:`train`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from voxtral_dist import (
    activity,
    checkpoint,
    distributed,
    dry_run,
    evaluator,
    model,
    prepare,
    report,
    run_dir,
    watchdog,
)
from voxtral_dist import config as settings
from voxtral_dist.collator import Collator
from voxtral_dist.config import TrainConfig
from voxtral_dist.data import TrainData, TrainSettings
from voxtral_dist.distributed import World
from voxtral_dist.engine import EngineSettings, TrainEngine, build_ds_config
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.eval_data import EvalData
from voxtral_dist.logger import get_logger
from voxtral_dist.monitor import Monitor, NullMonitor
from voxtral_dist.shares import CostModel
from voxtral_dist.task_data import TaskData, fingerprints
from voxtral_dist.trainer import Trainer, TrainState

log = get_logger(__name__)

DIGEST_STEPS = 8
"""Steps whose draws the ranks compare at the start."""


def train(config: TrainConfig, world: World) -> None:
    """Pack, plan, build, resume and fit.

    Raises:
        VoxtralDistError: with the exit code of what happened, see :class:`~voxtral_dist.errors.ExitCode`.
    """
    out = Path(config.output_dir)
    stored = run_dir.stored_identity(out) or {}
    if not config.dry_run:
        check_settings(config, out, stored)
    collator = prepare.open_collator(config)
    tasks = prepare.open_data(config, config.train_shards, config.train_jsonl, "train", world, collator)
    dev_tasks = prepare.open_data(config, config.val_shards, config.val_jsonl, "dev", world, collator)
    dev = EvalData(dev_tasks, collator, config.max_len)
    data = plan_data(config, world, tasks, collator, None)
    if config.dry_run:
        if world.is_main:
            print_dry_run(config, data, world)
        return
    identity = data.identity() | prepare.model_identity(config) | {"dev_data": fingerprints(dev.tasks)}
    run_dir.check_identity(out, identity)
    device = distributed.local_device(world)
    distributed.start(device)
    try:
        with watchdog.guarding(config.stall_timeout, partial(run_dir.end_stalled, out)):
            newest = checkpoint.newest_whole(out)
            if newest:
                data = plan_data(config, world, tasks, collator, newest)
            check_same_plan(data, checkpoint.step_of(newest) if newest else 0)
            if world.is_main:
                print("\n".join(dry_run.plan_lines(data, world.world_size)), flush=True)
                about = run_dir.environment(world.world_size, str(device)) | {"data": fingerprints(tasks)}
                run_dir.begin(out, settings.dump_yaml(config), identity, about)
            fit(config, data, dev, device, newest)
    finally:
        distributed.stop()


def plan_data(
    config: TrainConfig, world: World, tasks: Sequence[TaskData], collator: Collator, newest: Path | None
) -> TrainData:
    """The training data of a run that begins, or goes on from a checkpoint.

    The examples per step are, unless a flag says otherwise, those of the run's first start.
    """
    state = checkpoint.read_state(newest) if newest else None
    first = config.per_device_bsz * config.grad_accum * world.world_size
    size = config.global_batch_size or (
        state["plan"]["segments"][-1]["global_batch_size"] if state else first
    )
    names = TrainSettings.__dataclass_fields__.keys() - {"global_batch_size", "cost_model"}
    how = TrainSettings(
        global_batch_size=size,
        cost_model=CostModel.from_config(model.read_config(config.model_id)),
        **{name: getattr(config, name) for name in names},
    )
    allow = settings.split_list(config.allow_change)
    if state is None:
        return TrainData(tasks, collator, how)
    return TrainData(tasks, collator, how, saved=state["plan"], step=state["step"], allow=allow)


def check_same_plan(data: TrainData, first_step: int) -> None:
    """Compare a digest of the next steps across ranks. Collective.

    Raises:
        VoxtralDistError: a rank plans other draws, because it sees other data or settings.
    """
    digests = distributed.gather_json(data.plan.digest(first_step, DIGEST_STEPS))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]] if digests else []
    others = distributed.broadcast_json(others)
    if others:
        raise VoxtralDistError(
            f"rank {others[0]} plans other draws than rank 0: its data sets or settings differ; check that every node "
            "sees the same shards"
        )


def check_settings(config: TrainConfig, out: Path, stored: dict[str, Any]) -> None:
    """Refuse what needs no data to be refused, before data is packed into the directory of another run.

    Raises:
        UserError: the directory holds a run with other settings, or a run at all with ``--resume none``; the
            ``--ds_config`` is not usable.
    """
    if config.resume == "none" and stored:
        raise UserError(
            f"--resume none but --output_dir {out} holds a run; give a new directory or leave the flag out"
        )
    settings_now = prepare.model_identity(config) | {"seed": config.seed, "max_len": config.max_len}
    run_dir.check_identity(out, stored | settings_now)
    build_ds_config(EngineSettings(ds_config=config.ds_config), 0)


def print_dry_run(config: TrainConfig, data: TrainData, world: World) -> None:
    """Everything that ``--dry_run`` shows."""
    print("\n".join(dry_run.plan_lines(data, world.world_size)), flush=True)
    bf16 = prepare.use_bf16(config, distributed.local_device(world))
    lines = dry_run.size_lines(
        config, model.read_config(config.model_id), data, world.world_size, 2 if bf16 else 4
    )
    print("\n".join([*lines, *dry_run.prompt_lines(data)]), flush=True)


def fit(
    config: TrainConfig, data: TrainData, dev: EvalData, device: torch.device, newest: Path | None
) -> None:
    """Build model and engine, restore the newest checkpoint, and train to the end."""
    out = Path(config.output_dir)
    if newest and checkpoint.step_of(newest) == data.plan.num_steps and is_evaluated(out, newest.name, dev):
        log.info("%s is finished: all %d steps are done and evaluated", out, data.plan.num_steps)
        finish(out)
        return
    engine_settings = EngineSettings(
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=prepare.use_bf16(config, device),
        loss_norm=config.loss_norm,
        ds_config=config.ds_config,
        seed=config.seed,
    )
    engine = TrainEngine(prepare.training_model(config, device, len(data.tasks)), engine_settings)
    state = TrainState()
    if newest:
        saved = checkpoint.load(newest, engine)
        state = TrainState(**{name: saved[name] for name in TrainState.__dataclass_fields__})
    log.info("%s", f"going on from {newest}" if newest else f"starting at step 0, no checkpoint in {out}")
    monitor = Monitor.create(out, distributed.rank(), config.private_text, state.step)
    evaluate = partial(evaluate_step, config, engine.model.model, dev, monitor)
    try:
        Trainer(engine, data, config, monitor, evaluate, state).fit()
    finally:
        monitor.close()
    finish(out)


def evaluate_step(
    config: TrainConfig, voxtral: Any, dev: EvalData, monitor: NullMonitor, step: int
) -> dict[str, Any] | None:
    """Decode the dev data at a step, unless that was done before the last stop; the metrics on rank 0."""
    name = checkpoint.step_dir(Path(), step).name
    if is_evaluated(Path(config.output_dir), name, dev):
        return None
    folder = Path(config.output_dir) / "eval" / name
    activity.within(f"the evaluation at step {step}")
    how = evaluator.EvalSettings(config.per_device_bsz, config.eval_max_new_tokens, config.num_workers)
    result = evaluator.evaluate(voxtral, dev, how, {"model_id": config.model_id, "step": step})
    if result is None:
        return None
    evaluator.write(folder, result)
    previews = report.previews(result.predictions, evaluator.PREVIEWS_PER_TASK)
    monitor.texts(step, "previews", previews)
    scores = report.score_table(result.metrics)
    log.info("evaluation at step %d\n%s", step, scores if config.private_text else f"{scores}\n\n{previews}")
    return result.metrics


def is_evaluated(out: Path, name: str, dev: EvalData) -> bool:
    """Whether the evaluation of a step is on disk, or there is no dev data to do it on. Collective."""
    return not len(dev) or bool(distributed.broadcast_json((out / "eval" / name / "metrics.json").exists()))


def finish(out: Path) -> None:
    """Print the scores before and after training, where both were measured, and where the adapter is."""
    if distributed.rank() == 0:
        if len(list(out.glob("eval/step-*/metrics.json"))) > 1:
            print(f"\n{report.first_and_last(out / 'eval')}")
        where = checkpoint.pointer(out, "best") or checkpoint.pointer(out, "latest")
        print(f"\nfinished: adapter in {where}/adapter", flush=True)
