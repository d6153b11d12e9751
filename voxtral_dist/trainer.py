"""The training loop: when to step, log, evaluate, save and stop. Every rank runs it in step."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from voxtral_dist import activity, checkpoint, distributed, health
from voxtral_dist.atomic import write_bytes
from voxtral_dist.batch import MicroBatch
from voxtral_dist.config import TrainConfig
from voxtral_dist.data import TrainData
from voxtral_dist.early_stopping import EarlyStopping, score_of
from voxtral_dist.engine import Share, TrainEngine
from voxtral_dist.errors import Preempted, VoxtralDistError
from voxtral_dist.logger import get_logger
from voxtral_dist.monitor import NullMonitor
from voxtral_dist.run_dir import moved_away
from voxtral_dist.saver import Saver
from voxtral_dist.schedule import Schedule
from voxtral_dist.step_loader import StepLoader
from voxtral_dist.step_metrics import StepMetrics
from voxtral_dist.step_sums import StepResult
from voxtral_dist.train_state import TrainState

MAX_ROLLBACKS = 3
"""How often the spike guard goes back in a run; it only warns after that."""

log = get_logger(__name__)


Evaluate = Callable[[int], dict[str, Any] | None]
"""Decodes and scores the dev data at a step; the metrics on rank 0, None elsewhere or without dev data."""

ValidationLoss = Callable[[], dict[str, float]]
"""Loss of each task on a fixed part of the dev data; empty without dev data. Collective."""

GradientConflict = Callable[[], dict[str, float | None]]
"""How alike the gradients of the tasks are on a fixed part of the dev data, by tag. Collective."""


class Trainer:
    """Trains from ``state`` to the end of the plan.

    Args:
        engine: of the run, restored when the run goes on.
        data: training data with its plan.
        config: settings of the run.
        monitor: where numbers go; does nothing on other ranks than 0.
        metrics: assembles the numbers of a step.
        evaluate: called at evaluation steps on every rank.
        validation_loss: called between them on every rank.
        gradient_conflict: called at its own steps on every rank.
        state: where to start.
    """

    def __init__(
        self,
        engine: TrainEngine,
        data: TrainData,
        config: TrainConfig,
        monitor: NullMonitor,
        metrics: StepMetrics,
        evaluate: Evaluate,
        validation_loss: ValidationLoss,
        gradient_conflict: GradientConflict,
        state: TrainState,
    ) -> None:
        self.engine, self.data, self.config = engine, data, config
        self.monitor, self.metrics = monitor, metrics
        self.evaluate, self.validation_loss = evaluate, validation_loss
        self.gradient_conflict = gradient_conflict
        self.state = state
        self.run_dir = Path(config.output_dir)
        self.schedule = Schedule(
            config.learning_rate, config.warmup_ratio, config.lr_schedule == "stage", config.rewarmup_steps
        )
        self.saver = Saver(self.run_dir, config.save_total_limit, config.max_failed_saves)
        self.loader = StepLoader(data, distributed.rank(), distributed.world_size())
        self.early_stopping = EarlyStopping(config.early_stopping_patience, config.early_stopping_min_delta)
        if state.best_metric != config.best_metric:  # scores by another one say nothing
            state.best_metric, state.scores = config.best_metric, []
        self.stragglers = health.Stragglers()
        self._stop_requested = False
        self._announced = ""

    def fit(self) -> None:
        """Run every step that is left, with evaluations and checkpoints; returns when the run is complete.

        Raises:
            Preempted: SIGTERM, SIGUSR2, SIGINT or SIGHUP reached any rank; a checkpoint was written.
            NonFiniteError: too many steps in a row were skipped.
            BadSamplesError: too many examples could not be read.
            VoxtralDistError: a checkpoint could not be written, the run directory is gone, or an example does not fit
                into memory.
        """
        self._catch_signals()
        if self._evaluation_due():  # before training, or left undone by a run that died
            self._evaluate()
        with tqdm(
            total=self.data.plan.num_steps,
            initial=self.state.step,
            desc="train",
            unit="step",
            disable=distributed.rank() != 0,
            mininterval=1.0,
        ) as bar:
            while not self._is_over():
                self._run(bar)
        self.saver.wait(final=True)

    def _is_over(self) -> bool:
        return self.state.step >= self.data.plan.num_steps or self.stopped_early()

    def stopped_early(self) -> bool:
        """Whether the evaluations so far say that going on brings nothing; with stages only those of the last count."""
        scores = {int(step): score for step, score in self.state.scores}
        return self.early_stopping.is_over(scores, self._last_stage_step())

    def _last_stage_step(self) -> int:
        """First step of the last stage; 0 where there is one stage."""
        segments = self.data.plan.segments
        return next(s.start_step for s in segments if s.stage == segments[-1].stage)

    def _run(self, bar: Any) -> None:
        """Step by step to the end of the run, or to where the spike guard goes back."""
        with closing(self.loader.steps(self.state.step)) as steps:
            for index, share in steps:
                self._announce_stage(index)
                recent = self.state.recent_losses
                result = self._step(index, share)
                bar.set_postfix(loss=f"{result.loss:.3f}", refresh=False)
                bar.update()
                spike = result.applied and health.is_spike(result.loss, recent, self.config.spike_factor)
                if spike and self._roll_back(result):
                    return
                self._after_step(result)
                if self._is_over():
                    return

    def _announce_stage(self, index: int) -> None:
        stages, segment = self.data.history["stages"], self.data.plan.segment_of(index)
        name = stages[segment.stage]["name"]
        if segment.start_step == index:
            self.state.recent_losses = []  # other tasks have other losses
        if len(stages) > 1 and name != self._announced:
            weights = ", ".join(f"{t} {w}" for t, w in zip(self.data.names, segment.weights, strict=True))
            log.info(
                "step %d: stage %d of %d, %s (%s)", index + 1, segment.stage + 1, len(stages), name, weights
            )
        self.state.stage = self._announced = name

    def _step(self, index: int, share: Share) -> StepResult:
        rate = self.schedule.rate(self.data.plan, index)
        timed = _Timed(share)
        activity.within(f"step {index + 1}")
        result = self.engine.train_step(timed, rate, stop=lambda: self._stop_requested)
        self.state.count(result, self.data.plan.draws_after(index + 1), self.data.names)
        self.monitor.scalars(self.state.step, self.metrics.scalars(result, self.state, rate, timed.seconds))
        return result

    def _after_step(self, result: StepResult) -> None:
        """Everything that happens between two steps."""
        state, config, last = self.state, self.config, self.data.plan.num_steps
        health.check_finite(result, state.step, state.skipped_in_a_row, config.max_skipped_steps)
        health.check_samples(state.bad_samples, state.samples_seen)
        self.stragglers.look(result.seconds_by_rank, state.step)
        if result.stop or self._evaluation_due() or _due(state.step, config.save_steps):
            self._save()
        if result.stop and state.step < last:
            self.saver.wait(final=True)
            raise Preempted(
                f"stopped by a signal after step {state.step} of {last}; the same command goes on from here"
            )
        if self._evaluation_due():
            self.saver.wait(final=state.step == last)
            self._evaluate()
        elif _due(state.step, config.val_loss_steps):
            losses = self.validation_loss()
            self.monitor.scalars(state.step, {f"val_loss/{task}": loss for task, loss in losses.items()})
            self.metrics.restart_clock()
        if _due(state.step, config.grad_conflict_steps):
            self.monitor.scalars(state.step, self.gradient_conflict())
            self.metrics.restart_clock()

    def _evaluation_due(self) -> bool:
        step = self.state.step
        return step in (0, self.data.plan.num_steps) or _due(step, self.config.eval_steps)

    def _evaluate(self) -> None:
        """Decode the dev data; ``best`` then names the checkpoint with the best score."""
        step = self.state.step
        self._check_run_dir()
        self.engine.model.eval()  # the model around the one that decodes: it also switches compiled layers off
        metrics = self.evaluate(step)
        self.metrics.restart_clock()
        score = distributed.broadcast_json(metrics and score_of(metrics, self.config.best_metric))
        if score is not None:
            self.state.record_score(step, score)
        best = best_checkpoint(self.run_dir, self.config.best_metric) if metrics else None
        if best is not None:
            write_bytes(self.run_dir / "best", f"{best.name}\n".encode())
        if self.stopped_early():
            log.info(
                "stopping early: no gain of %s in the last %d evaluations",
                self.config.best_metric,
                self.early_stopping.patience,
            )

    def _roll_back(self, result: StepResult) -> bool:
        """Go back to the newest checkpoint and leave out the steps since then; False where that cannot be."""
        step = self.state.step
        self.saver.wait()
        newest = checkpoint.newest_whole(self.run_dir)
        if newest is None or len(self.state.left_out) >= MAX_ROLLBACKS:
            log.warning(
                "step %d: loss %.3f is a spike; going on, the spike guard cannot go back", step, result.loss
            )
            return False
        log.warning("%s", health.rollback_message(step, result.loss, newest))
        left_out = [*self.state.left_out, [checkpoint.step_of(newest), step]]
        saved = TrainState.restored(checkpoint.load(newest, self.engine))
        for name in ("samples_seen", "tokens_seen", "audio_seconds_seen", "bad_samples", "task_tokens_seen"):
            setattr(self.state, name, getattr(saved, name))
        self.state.left_out = left_out
        self.state.recent_losses = saved.recent_losses if saved.stage == self.state.stage else []
        self.state.totals.clear()
        self.state.totals.update(saved.totals)
        self._save()
        if self._evaluation_due():
            self.saver.wait(final=step == self.data.plan.num_steps)
            self._evaluate()
        return True

    def _check_run_dir(self) -> None:
        """Whatever is written into a directory that is gone would begin a second one. Collective."""
        fault = distributed.broadcast_json(moved_away(self.run_dir))
        if fault:
            raise VoxtralDistError(fault)

    def _save(self) -> None:
        self._check_run_dir()
        self.saver.save(self.state.step, self.engine, asdict(self.state) | {"plan": self.data.history})

    def _catch_signals(self) -> None:
        """A signal only sets a flag; the next step's reduction tells every rank. A second Ctrl-C ends at once."""

        def request_stop(number: int, frame: Any) -> None:
            self._stop_requested = True
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, request_stop)


class _Timed:
    """A share that adds up how long its micro-batches were waited for, in seconds."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self.seconds = 0.0

    def __iter__(self) -> Iterator[MicroBatch]:
        micro_batches = iter(self._share)
        while True:
            started = time.perf_counter()
            batch = next(micro_batches, None)
            self.seconds += time.perf_counter() - started
            if batch is None:
                return
            for bad in batch.bad_samples:
                log.warning("masked example %s", bad)
            yield batch

    def smaller(self) -> Share:
        """The share in smaller micro-batches, still timed."""
        self._share = self._share.smaller()
        return self


def best_checkpoint(run_dir: Path, metric: str) -> Path | None:
    """The published checkpoint whose evaluation has the best score, the earlier one of equals."""
    best: tuple[float, Path] | None = None
    for path in checkpoint.published(run_dir):
        try:
            metrics = json.loads((run_dir / "eval" / path.name / "metrics.json").read_text("utf-8"))
            score = score_of(metrics, metric)
        except (OSError, ValueError, KeyError):
            continue
        if score is not None and (best is None or score > best[0]):
            best = (score, path)
    return best[1] if best else None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
