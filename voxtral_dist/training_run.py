"""One training run from its settings: pack, plan, build, resume, fit, report. Every rank calls :func:`train`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from voxtral_dist import (
    checkpoint,
    debug_run,
    distributed,
    dry_run,
    model,
    prepare,
    report,
    resume,
    run_dir,
    run_report,
    step_evaluation,
    watchdog,
)
from voxtral_dist import config as settings
from voxtral_dist.atomic import write_bytes
from voxtral_dist.collator import Collator
from voxtral_dist.config import TrainConfig
from voxtral_dist.data import TrainData, TrainSettings
from voxtral_dist.distributed import World
from voxtral_dist.ds_config import EngineSettings, build_ds_config
from voxtral_dist.early_stopping import check_metric
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.eval_data import EvalData
from voxtral_dist.gradient_conflict import gradient_conflict
from voxtral_dist.logger import get_logger
from voxtral_dist.micro_batches import OVERHEAD
from voxtral_dist.monitor import Monitor
from voxtral_dist.shares import CostModel
from voxtral_dist.step_metrics import StepMetrics
from voxtral_dist.task_data import TaskData, fingerprints
from voxtral_dist.tasks import TASKS
from voxtral_dist.train_state import TrainState
from voxtral_dist.trainer import Trainer, best_checkpoint
from voxtral_dist.validation_loss import validation_loss

log = get_logger(__name__)

DIGEST_STEPS = 8
"""Steps whose draws the ranks compare at the start."""


def train(config: TrainConfig, world: World) -> None:
    """Pack, plan, build, resume and fit.

    Raises:
        VoxtralDistError: with the exit code of what happened, see :class:`~voxtral_dist.errors.ExitCode`.
    """
    out = Path(config.output_dir)
    origin = None
    if not (config.dry_run or config.debug):
        origin = resume.named(config.resume, out, settings.dump_yaml(config))
        check_settings(config, out, origin)
    collator = prepare.open_collator(config)
    tasks = prepare.open_data(
        config, config.train_shards, config.train_jsonl, "train", world, collator, config.train_where
    )
    dev_tasks = prepare.open_data(config, config.val_shards, config.val_jsonl, "dev", world, collator)
    dev = EvalData(dev_tasks, collator, config.max_len)
    if len(dev):
        check_metric(config.best_metric, {task.name: TASKS[task.name].metric for task in dev_tasks})
    data = plan_data(config, world, tasks, collator, None)
    if config.dry_run:
        if world.is_main:
            print_dry_run(config, data, world)
        return
    if config.debug:
        debug_run.debug(config, data, world)
        return
    identity = data.identity() | prepare.model_identity(config) | {"dev_data": fingerprints(dev.tasks)}
    resume.check_identities(out, origin, identity)
    device = distributed.local_device(world)
    distributed.start(device)
    try:
        with watchdog.guarding(config.stall_timeout, partial(run_dir.end_stalled, out)):
            newest = resume.whole(origin) if origin else checkpoint.newest_whole(out)
            if newest:
                data = plan_data(config, world, tasks, collator, newest)
            resume.check_not_over(out, origin, data.plan.num_steps)
            check_same_plan(data, checkpoint.step_of(newest) if newest else 0)
            if world.is_main:
                go_back(out, newest, config.best_metric)
                about = run_dir.environment(world.world_size, str(device)) | {"data": fingerprints(tasks)}
                about["init_adapter"] = [config.init_adapter, identity["init_adapter"]]
                if newest and (changed := run_dir.changed_environment(out, about)):
                    log.warning("going on with %s: equal to rounding, not bit for bit", changed)
                run_dir.begin(out, settings.dump_yaml(config), identity, about)
                print("\n".join(dry_run.plan_lines(data, world.world_size)), flush=True)
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
    names = TrainSettings.__dataclass_fields__.keys() - {"global_batch_size", "cost_model", "overhead"}
    how = TrainSettings(
        global_batch_size=size,
        cost_model=CostModel.from_config(model.read_config(config.model_id)),
        overhead=OVERHEAD[distributed.local_device(world).type],
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


def check_settings(config: TrainConfig, out: Path, origin: Path | None) -> None:
    """Refuse what needs no data to be refused, before data is packed into the directory of another run.

    Args:
        config: of this start.
        out: the run directory.
        origin: the checkpoint that ``--resume`` names.

    Raises:
        UserError: the directory holds a run with other settings, or a run at all with ``--resume none``; the
            ``--ds_config`` is not usable.
    """
    stored = run_dir.stored_identity(out)
    if config.resume == "none" and stored:
        raise UserError(
            f"--resume none but --output_dir {out} holds a run; give a new directory or leave the flag out"
        )
    settings_now = prepare.model_identity(config) | {"seed": config.seed, "max_len": config.max_len}
    theirs = run_dir.stored_identity(resume.run_of(origin)) if origin else stored
    resume.check_identities(out, origin, (theirs or {}) | settings_now)
    build_ds_config(EngineSettings(ds_config=config.ds_config), 0)


def go_back(out: Path, start: Path | None, metric: str) -> None:
    """Set aside what the run did after the checkpoint it goes on from, and say so; for rank 0.

    That is what came after the one that ``--resume`` names, or damaged ones that were passed over.
    """
    own = start and resume.is_own(start, out)
    line = resume.set_aside(out, checkpoint.step_of(start)) if start and own else None
    if line:
        print(line, flush=True)
        (out / "best").unlink(missing_ok=True)
        best = best_checkpoint(out, metric)
        if best is not None:
            write_bytes(out / "best", f"{best.name}\n".encode())


def print_dry_run(config: TrainConfig, data: TrainData, world: World) -> None:
    """Everything that ``--dry_run`` shows."""
    print("\n".join(dry_run.plan_lines(data, world.world_size)), flush=True)
    bf16 = prepare.use_bf16(config, distributed.local_device(world))
    lines = dry_run.size_lines(config, model.read_config(config.model_id), data, world.world_size, bf16)
    print("\n".join([*lines, *dry_run.prompt_lines(data)]), flush=True)


def fit(
    config: TrainConfig, data: TrainData, dev: EvalData, device: torch.device, newest: Path | None
) -> None:
    """Build model and engine, restore the newest checkpoint, and train to the end."""
    out = Path(config.output_dir)
    at_end = newest is not None and checkpoint.step_of(newest) == data.plan.num_steps
    if newest and at_end and step_evaluation.is_evaluated(out, newest.name, dev):
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
    training = prepare.training_model(config, device, len(data.tasks))
    cache = prepare.open_encoder_cache(config, training, data.tasks)
    engine = TrainEngine(training, engine_settings)
    state = TrainState.restored(checkpoint.load(newest, engine)) if newest else TrainState()
    log.info("%s", f"going on from {newest}" if newest else f"starting at step 0, no checkpoint in {out}")
    monitor = Monitor.create(out, distributed.rank(), config.private_text, state.step)
    metrics = StepMetrics(
        data,
        model.read_config(config.model_id),
        distributed.world_size(),
        rank=distributed.rank(),
        device=device,
        max_grad_norm=config.max_grad_norm,
        lora_parameters=sum(p.numel() for name, p in engine.named_parameters if "lora_" in name),
        encoder_trains=not config.freeze_whisper,
        totals=state.totals,
    )
    evaluate = partial(step_evaluation.evaluate_step, config, engine.model.model, dev, monitor)
    loss = partial(validation_loss, engine, dev, data.names, config.per_device_bsz)
    conflict = partial(gradient_conflict, engine, dev, data.names)
    trainer = Trainer(engine, data, config, monitor, metrics, evaluate, loss, conflict, state)
    try:
        trainer.fit()
    finally:
        monitor.close()
        if cache:
            cache.close()
    if distributed.rank() == 0:
        write_page(out)
    finish(out)


def finish(out: Path) -> None:
    """Print the scores before and after training, where both were measured, and where the adapter is."""
    if distributed.rank() == 0:
        if len(list(out.glob("eval/step-*/metrics.json"))) > 1:
            print(f"\n{report.first_and_last(out / 'eval')}")
        where = checkpoint.pointer(out, "best") or checkpoint.pointer(out, "latest")
        print(f"\nfinished: adapter in {where}/adapter", flush=True)


def write_page(out: Path) -> None:
    """Write the report of a finished run; what fails here is said and does no harm to the run."""
    try:
        print(f"\nreport: {run_report.write_report(out, status={'exit_code': 0, 'message': 'done'})}")
    except Exception as error:
        log.warning("no report.html (%s: %s); tools/report_run.py makes one", type(error).__name__, error)
