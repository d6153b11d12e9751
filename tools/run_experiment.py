"""Train several arms that differ in a few flags, evaluate them alike, and compare them.

    python tools/run_experiment.py EXPERIMENT.yaml             one arm after another on this machine
    python tools/run_experiment.py EXPERIMENT.yaml --dry_run   check everything, show the arms, write nothing
    python tools/run_experiment.py EXPERIMENT.yaml --slurm     a job per arm and seed, and one that compares
    python tools/run_experiment.py EXPERIMENT.yaml --compare   only compare what is finished

Called again it goes on: what is finished stays. It ends in OUTPUT_DIR/comparison.html and comparison.json. Exit code 0:
all arms are there; 1: some failed, the others are compared; 75: stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from voxtral_dist import arm_comparison, dev_sound, predictions
from voxtral_dist.arm_comparison import Arms
from voxtral_dist.arm_flags import FULL
from voxtral_dist.errors import ExitCode, Preempted, UserError, VoxtralDistError, run_main
from voxtral_dist.experiment import FINAL, GUARD, TRAIN, Experiment, Job, batch_script
from voxtral_dist.predictions import EvalResult

ROOT = Path(__file__).resolve().parent.parent
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
POLL_S = 0.5
ACCOUNTING = ("account", "partition", "qos", "reservation", "mail-user", "mail-type")
"""sbatch options that the comparing job takes over; it needs no GPU."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and do what they ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help="the experiment, see launch/experiment.example.yaml")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--dry_run", action="store_true", help="check and show the arms, write nothing")
    modes.add_argument("--slurm", action="store_true", help="submit a job per arm and seed with sbatch")
    modes.add_argument("--compare", action="store_true", help="start nothing, compare what is finished")
    flags = parser.parse_args(argv)
    experiment = Experiment.read(flags.file)
    for job in experiment.jobs:
        job.check_unchanged()
    print("\n".join(overview(experiment)), flush=True)
    if flags.dry_run:
        return
    experiment.write()
    if flags.slurm:
        submit(experiment, flags.file)
        return
    failed = {} if flags.compare else Runner(experiment).run()
    try:
        compare(experiment)
    except UserError as error:
        if not failed:
            raise
        print(f"not compared: {error}", flush=True)
    if failed:
        named = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        raise VoxtralDistError(
            f"{len(failed)} of {len(experiment.jobs)} failed: {named}; the same command tries again"
        )


def overview(experiment: Experiment) -> list[str]:
    """A line per job: what it changes, and what is left to do."""
    lines = [f"experiment in {experiment.folder}: {len(experiment.jobs)} jobs"]
    for job in experiment.jobs:
        changes = " ".join(f"--{name} {value}" for name, value in experiment.arms.get(job.arm, {}).items())
        left = job.left()
        state = f"to do: {', '.join(left)}" if left else "finished"
        lines.append(f"  {job.name}: {changes or 'as the base'}; {state}")
    return lines


def command(job: Job, step: str) -> list[str]:
    """The command line of a step."""
    script = "train" if step == TRAIN else "evaluate"
    return ["bash", str(ROOT / "launch" / f"{script}.sh"), "--config", str(job.beside(f"{step}.yaml"))]


class Runner:
    """Runs the jobs one after another; a signal reaches the one that runs, and then nothing more is started."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.failed: dict[str, int] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._seconds: list[float] = []

    def run(self) -> dict[str, int]:
        """Run what is left.

        Returns:
            The exit codes of the jobs that failed, by name.

        Raises:
            Preempted: a signal stopped it.
        """
        before = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        try:
            left = [job for job in self.experiment.jobs if job.left()]
            for number, job in enumerate(left, 1):
                started = time.monotonic()
                self._run(job, number, len(left))
                self._seconds.append(time.monotonic() - started)
        finally:
            for number_, handler in before.items():
                signal.signal(number_, handler)
        return self.failed

    def _run(self, job: Job, number: int, count: int) -> None:
        job.write_flags()
        for step in job.left():
            code = self._start(job, step, f"{number} of {count}: {job.name}, {step}", count - number)
            if self._stopped or code == ExitCode.PREEMPTED:
                raise Preempted(f"stopped in {job.name}, {step}; the same command goes on")
            if code:
                self.failed[job.name] = code
                last = _last_line(job.beside("log"))
                print(
                    f"{job.name}: {step} failed with exit code {code}: {last}; see {job.beside('log')}",
                    flush=True,
                )
                return

    def _start(self, job: Job, step: str, title: str, to_come: int) -> int:
        """Run one step to its end; its exit code."""
        print(title, flush=True)
        started = time.monotonic()
        log = job.beside("log")
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)  # it shows transcripts
        with open(descriptor, "ab") as output:
            self._child = subprocess.Popen(
                command(job, step),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | self.experiment.environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
        while self._child.poll() is None:
            self._show(job, time.monotonic() - started, to_come)
            time.sleep(POLL_S)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return self._child.returncode

    def _pass_on(self, number: int, frame: Any) -> None:
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _show(self, job: Job, elapsed: float, to_come: int) -> None:
        """The progress line of a terminal: what has passed, and what is expected by the jobs so far and by the run."""
        if not sys.stderr.isatty():
            return
        step, rest = progress(job.folder / "metrics.jsonl")
        per_job = sum(self._seconds) / len(self._seconds) if self._seconds else elapsed + (rest or 0.0)
        expected = (rest if rest is not None else max(0.0, per_job - elapsed)) + to_come * per_job
        at = f"step {step}, " if step else ""
        text = f"  {at}{_clock(elapsed)} so far, about {_clock(expected)} to the end of all"
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def progress(record: Path) -> tuple[int | None, float | None]:
    """Step and expected rest in seconds that a run's metrics.jsonl states last; None where it does not."""
    try:
        with record.open("rb") as file:
            file.seek(max(0, record.stat().st_size - 8192))
            lines = [json.loads(line) for line in file.read().splitlines()[1:] if line.endswith(b"}")]
    except (OSError, ValueError):
        return None, None
    step = next((line["step"] for line in reversed(lines)), None)
    hours = next(
        (line["speed/eta_hours"] for line in reversed(lines) if line.get("speed/eta_hours") is not None), None
    )
    return step, None if hours is None else 3600 * hours


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _last_line(log: Path) -> str:
    """The last error of a log, else its last line."""
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1][:400]


def compare(experiment: Experiment) -> None:
    """Write the comparison of what is finished and print the scores."""
    arms = collected(experiment)
    path = experiment.folder / "comparison.html"
    print(f"\n{arm_comparison.score_table(arms)}", flush=True)
    done = [job for job in experiment.jobs if job.arm and job.is_done(FINAL)]
    sound = dev_sound.find(done[0].evaluation(FINAL)) if done else None
    arm_comparison.write_comparison(arms, experiment.seeds[0], path, sound)
    print(f"\nwritten: {path} and {path.with_suffix('.json').name}", flush=True)


def collected(experiment: Experiment) -> Arms:
    """The results that are there."""
    results: dict[str, dict[int, EvalResult]] = {arm: {} for arm in experiment.arms}
    guards: dict[str, EvalResult] = {}
    base: dict[str, EvalResult] = {}
    for job in experiment.jobs:
        for step in (FINAL, GUARD):
            if step not in job.steps or not job.is_done(step):
                continue
            result = replace(predictions.load(job.evaluation(step)), name=job.arm or "base model")
            if not job.arm:
                base[step] = result
            elif step == FINAL:
                results[job.arm][job.seed] = result
            elif job.seed == experiment.seeds[0]:
                guards[job.arm] = result
    return Arms(
        settings=experiment.arms,
        results=results,
        base=base.get(FINAL),
        guards=guards,
        base_guard=base.get(GUARD),
        single_task=experiment.single_task,
        without=experiment.without,
        field=experiment.field,
        full=FULL,
    )


def submit(experiment: Experiment, file: Path) -> None:
    """Submit a job for each that is not finished, and one that compares when they have ended."""
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: there is no sbatch on PATH; submit from a login node of the cluster")
    ids = []
    for job in experiment.jobs:
        if not job.left():
            continue
        job.write_flags()
        variables = [f"export {name}={shlex.quote(value)}" for name, value in experiment.environment.items()]
        commands = variables + [shlex.join(command(job, step)) for step in job.left()]
        ids.append(_sbatch(job.beside("sbatch"), commands, job.name, job.beside("log"), experiment.slurm))
        print(f"{job.name}: job {ids[-1]}", flush=True)
    options = {name: value for name, value in experiment.slurm.items() if name in ACCOUNTING}
    after = [f"--dependency=afterany:{':'.join(ids)}"] if ids else []
    setup = f". {shlex.quote(str(ROOT / 'launch' / 'setup.sh'))} run"
    tool = shlex.join([str(ROOT / "tools" / "run_experiment.py"), str(file.absolute()), "--compare"])
    script, log = experiment.folder / "comparison.sbatch", experiment.folder / "comparison.log"
    last = _sbatch(script, [setup, f'"$PYTHON" {tool}'], "comparison", log, options, after)
    print(f"comparison: job {last}, when they have ended; repeat one with sbatch SCRIPT", flush=True)


def _sbatch(
    script: Path,
    commands: list[str],
    name: str,
    log: Path,
    options: dict[str, str],
    flags: Sequence[str] = (),
) -> str:
    """Write a batch script and submit it; the id of its job."""
    title = f"{script.parent.name}-{name}".replace(", ", "-").replace(" ", "-")
    script.write_text(batch_script(commands, title, log.absolute(), options, Path.cwd()), "utf-8")
    done = subprocess.run(
        ["sbatch", "--parsable", *flags, str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise VoxtralDistError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


if __name__ == "__main__":
    run_main(main)
