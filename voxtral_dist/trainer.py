"""The training loop: when to step, log, evaluate, save and stop. Every rank runs it in step."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from voxtral_dist import activity, checkpoint, distributed
from voxtral_dist.atomic import write_bytes
from voxtral_dist.batch import MicroBatch
from voxtral_dist.config import TrainConfig
from voxtral_dist.data import TrainData
from voxtral_dist.engine import StepResult, TrainEngine
from voxtral_dist.errors import BadSamplesError, ExitCode, NonFiniteError, VoxtralDistError
from voxtral_dist.logger import get_logger
from voxtral_dist.monitor import GpuMeter, NullMonitor, Throughput
from voxtral_dist.schedule import Schedule

MAX_BAD_SAMPLE_RATE = 0.01
"""Share of unreadable examples above which a run ends, once BAD_SAMPLES_GRACE of them were seen."""

BAD_SAMPLES_GRACE = 10

log = get_logger(__name__)


class Preempted(VoxtralDistError):
    """A signal asked the run to stop, and a whole checkpoint was written: exit code 75, the same command goes on."""

    exit_code = ExitCode.PREEMPTED


@dataclass
class TrainState:
    """Where a run is. JSON-able, in every checkpoint.

    Attributes:
        step: optimizer steps done (or skipped).
        draws_consumed: draws of the plan used up; the whole state of the data side.
        samples_seen, tokens_seen, audio_seconds_seen, bad_samples: totals over all ranks.
        task_tokens_seen: target tokens per task.
    """

    step: int = 0
    draws_consumed: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    audio_seconds_seen: float = 0.0
    bad_samples: int = 0
    task_tokens_seen: dict[str, float] = field(default_factory=dict)


Evaluate = Callable[[int], dict[str, Any] | None]
"""Decodes and scores the dev data at a step; the metrics on rank 0, None elsewhere or without dev data."""


class Trainer:
    """Trains from ``state`` to the end of the plan.

    Args:
        engine: of the run, restored when the run goes on.
        data: training data with its plan.
        config: settings of the run.
        monitor: where numbers go; does nothing on other ranks than 0.
        evaluate: called at evaluation steps on every rank.
        state: where to start.
    """

    def __init__(
        self,
        engine: TrainEngine,
        data: TrainData,
        config: TrainConfig,
        monitor: NullMonitor,
        evaluate: Evaluate,
        state: TrainState,
    ) -> None:
        self.engine = engine
        self.data = data
        self.config = config
        self.monitor = monitor
        self.evaluate = evaluate
        self.state = state
        self.run_dir = Path(config.output_dir)
        self.schedule = Schedule(
            config.learning_rate, config.warmup_ratio, config.lr_schedule == "stage", config.rewarmup_steps
        )
        self.throughput = Throughput()
        self.gpu_meter = GpuMeter()
        self._skipped_in_a_row = 0
        self._stop_requested = False

    def fit(self) -> None:
        """Run every step that is left, with evaluations and checkpoints; returns when the run is complete.

        Raises:
            Preempted: SIGTERM, SIGUSR2, SIGINT or SIGHUP reached any rank; a checkpoint was written.
            NonFiniteError: too many steps in a row were skipped.
            BadSamplesError: too many examples could not be read.
        """
        self._catch_signals()
        if self._evaluation_due():  # before training, or left undone by a run that died
            self._evaluate()
        plan, rank, world_size = self.data.plan, distributed.rank(), distributed.world_size()
        with tqdm(
            total=plan.num_steps,
            initial=self.state.step,
            desc="train",
            unit="step",
            disable=rank != 0,
            mininterval=1.0,
        ) as bar:
            for index, micro_batches in self.data.steps(self.state.step, rank, world_size):
                result = self._step(index, micro_batches)
                bar.set_postfix(loss=f"{result.loss:.3f}", refresh=False)
                bar.update()
                self._after_step(result)

    def _step(self, index: int, micro_batches: Iterator[MicroBatch]) -> StepResult:
        activity.within(f"step {index + 1}")
        rate = self.schedule.rate(self.data.plan, index)
        timed = _Timed(micro_batches)
        result = self.engine.train_step(timed, rate, stop=lambda: self._stop_requested)
        self.throughput.add(
            tokens=result.tokens,
            samples=result.samples,
            audio_seconds=result.audio_seconds,
            padding=result.positions - result.tokens,
            data_wait=timed.seconds,
        )
        self._count(result)
        self.monitor.scalars(self.state.step, self._scalars(result, rate))
        return result

    def _count(self, result: StepResult) -> None:
        state = self.state
        state.step += 1
        state.draws_consumed = self.data.plan.draws_after(state.step)
        state.samples_seen += result.samples
        state.tokens_seen += result.tokens
        state.audio_seconds_seen += result.audio_seconds
        state.bad_samples += result.bad_samples
        for name, tokens in zip(self.data.names, result.task_tokens, strict=True):
            state.task_tokens_seen[name] = state.task_tokens_seen.get(name, 0.0) + tokens
        self._skipped_in_a_row = 0 if result.applied else self._skipped_in_a_row + 1

    def _scalars(self, result: StepResult, rate: float) -> dict[str, float | None]:
        values: dict[str, float | None] = {
            "train/loss": result.loss,
            "train/learning_rate": rate,
            "train/grad_norm": result.grad_norm,
            "train/skipped": float(not result.applied),
            "data/draws_consumed": float(self.state.draws_consumed),
            "data/draw_hash": float(result.draw_hash),
            "train/bad_samples": float(self.state.bad_samples),
            "train/stage": float(self.data.plan.segment_of(self.state.step - 1).stage),
            "train/epoch": self.state.draws_consumed / max(1, sum(map(len, self.data.plan.streams))),
        }
        total_tokens = sum(result.task_tokens)
        for name, nll, tokens in zip(self.data.names, result.task_nll, result.task_tokens, strict=True):
            values[f"loss/{name}"] = nll / tokens if tokens else None
            values[f"target_token_share/{name}"] = tokens / total_tokens if total_tokens else None
        values |= {f"speed/{name}": value for name, value in self.throughput.take().items()}
        return values | self.gpu_meter.read()

    def _after_step(self, result: StepResult) -> None:
        """Everything that happens between two steps."""
        state, config, last = self.state, self.config, self.data.plan.num_steps
        self._check_health(result)
        if result.stop or self._evaluation_due() or _due(state.step, config.save_steps):
            self._save()
        if result.stop and state.step < last:
            raise Preempted(
                f"stopped by a signal after step {state.step} of {last}; the same command goes on from here"
            )
        if self._evaluation_due():
            self._evaluate()

    def _evaluation_due(self) -> bool:
        step = self.state.step
        return step in (0, self.data.plan.num_steps) or _due(step, self.config.eval_steps)

    def _check_health(self, result: StepResult) -> None:
        state = self.state
        if not result.applied:
            log.warning("step %d skipped on all ranks: its loss or gradient is not finite", state.step)
        if self._skipped_in_a_row >= self.config.max_skipped_steps:
            raise NonFiniteError(
                f"{self._skipped_in_a_row} steps in a row had a non-finite loss or gradient, the last is step "
                f"{state.step}; lower --learning_rate or look at the data of these steps"
            )
        if state.bad_samples > max(BAD_SAMPLES_GRACE, MAX_BAD_SAMPLE_RATE * state.samples_seen):
            raise BadSamplesError(
                f"{state.bad_samples} of {state.samples_seen} examples could not be read, more than "
                f"{MAX_BAD_SAMPLE_RATE:.0%}; the log names them, check the shards with tools/build_shards.py"
            )

    def _evaluate(self) -> None:
        """Decode the dev data; ``best`` then names the checkpoint with the highest macro score."""
        metrics = self.evaluate(self.state.step)
        self.throughput.take()  # the time of an evaluation is no training time
        if metrics is not None:
            self.monitor.scalars(self.state.step, _evaluation_scalars(metrics))
            best = best_checkpoint(self.run_dir)
            if best is not None:
                write_bytes(self.run_dir / "best", f"{best.name}\n".encode())

    def _save(self) -> None:
        checkpoint.save(
            self.run_dir, self.state.step, self.engine, asdict(self.state) | {"plan": self.data.history}
        )
        if distributed.rank() == 0:
            activity.now("deleting what is older")
            checkpoint.prune(self.run_dir, self.config.save_total_limit)

    def _catch_signals(self) -> None:
        """A signal only sets a flag; the next step's reduction tells every rank. A second Ctrl-C ends at once."""

        def request_stop(number: int, frame: Any) -> None:
            self._stop_requested = True
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, request_stop)


class _Timed:
    """Iterates micro-batches and adds up how long it waited for them, in seconds."""

    def __init__(self, micro_batches: Iterator[MicroBatch]) -> None:
        self._micro_batches = micro_batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[MicroBatch]:
        while True:
            started = time.perf_counter()
            batch = next(self._micro_batches, None)
            self.seconds += time.perf_counter() - started
            if batch is None:
                return
            for bad in batch.bad_samples:
                log.warning("masked example %s", bad)
            yield batch


def best_checkpoint(run_dir: Path) -> Path | None:
    """The published checkpoint whose evaluation has the highest macro score, the earlier one of equals."""
    best: tuple[float, Path] | None = None
    for path in checkpoint.published(run_dir):
        try:
            macro = json.loads((run_dir / "eval" / path.name / "metrics.json").read_text("utf-8"))["macro"]
        except (OSError, ValueError, KeyError):
            continue
        if macro is not None and (best is None or macro > best[0]):
            best = (macro, path)
    return best[1] if best else None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluation_scalars(metrics: dict[str, Any]) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        f"eval/{name}": metrics[name] for name in ("macro", "weighted", "balance", "rtfx")
    }
    for task, scores in metrics["tasks"].items():
        for name, value in scores.items():
            if isinstance(value, (int, float)):
                values[f"eval_{task}/{name}"] = value
    return values
