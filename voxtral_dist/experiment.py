"""Several trainings that differ in a few flags, as one YAML file says (launch/experiment.example.yaml).

    experiment = Experiment.read(Path("experiment.yaml"))    every flag of every arm checked, nothing written
    for job in experiment.jobs:                              the base model, then each arm under each seed
        for step in job.left(): ...                          of training, final and guard evaluation what is not done

tools/run_experiment.py starts the jobs, here or under slurm. :mod:`voxtral_dist.arm_comparison` compares what they
leave.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist import config as settings
from voxtral_dist.arm_flags import (
    Flags,
    check_names,
    named_tasks,
    named_tasks_only,
    parsed,
    read_arms,
    read_base,
    to_yaml,
)
from voxtral_dist.atomic import write_bytes
from voxtral_dist.config import DataConfig, EvalConfig, TrainConfig
from voxtral_dist.errors import UserError

KEYS = "output_dir base arms seeds evaluate guard leave_one_out slurm nproc launcher".split()
"""What the file may hold."""

TRAIN, FINAL, GUARD = "train", "final", "guard"
"""What a job does, in this order."""

DERIVED = ("output_dir", "lora_dir")
"""Flags that follow from where the experiment lies."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One arm under one seed, or the base model, which is only evaluated.

    Attributes:
        arm: its name, "" for the base model.
        seed: of the training.
        folder: the run directory; settings, log and batch script lie beside it.
        steps: flags of :data:`TRAIN`, :data:`FINAL` and :data:`GUARD`, as far as it does them.
    """

    arm: str
    seed: int
    folder: Path
    steps: dict[str, Flags]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.arm}, seed {self.seed}" if self.arm else "base model"

    def beside(self, ending: str) -> Path:
        """A file beside the run directory, for example ``seed-0.log``."""
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    def evaluation(self, step: str) -> Path:
        """The folder of an evaluation."""
        return self.folder / "evaluations" / step

    def is_done(self, step: str) -> bool:
        """Whether the outcome of a step is there; that of a training is its evaluation."""
        return (self.evaluation(FINAL if step == TRAIN else step) / "metrics.json").is_file()

    def left(self) -> list[str]:
        """The steps that are not done."""
        return [step for step in self.steps if not self.is_done(step)]

    def write_flags(self) -> None:
        """Write the flags of each step that is left for ``--config``, as ``seed-0.train.yaml``."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for step in self.left():
            write_bytes(self.beside(f"{step}.yaml"), to_yaml(self.steps[step]).encode())

    def check_unchanged(self) -> None:
        """Refuse to take what is done for an outcome of other flags.

        Raises:
            UserError: names each flag that differs, with both values.
        """
        for step in self.steps:
            file = self.beside(f"{step}.yaml")
            if not (self.is_done(step) and file.is_file()):
                continue
            then, now = settings.load_yaml(file), self.steps[step]
            changed = [name for name in now if name not in DERIVED and then.get(name, now[name]) != now[name]]
            if changed:
                shown = "; ".join(f"{name}: {then[name]!r} -> {now[name]!r}" for name in changed)
                where = self.folder if step == TRAIN else self.evaluation(step)
                raise UserError(
                    f"{self.name} is finished, but with other flags ({shown}); give another output_dir, or remove "
                    f"{where} to do it again"
                )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What the YAML file says, resolved.

    Attributes:
        folder: ``output_dir``.
        arms: by name, what each changes of the base.
        single_task: by task, the arm that trains it alone.
        without: by value of ``field``, the arm whose training rows lack it.
        field: ``leave_one_out``.
        seeds: arms are compared under the first.
        jobs: the base model, then the arms, seed by seed.
        slurm: sbatch options, "" for one without a value.
        environment: NPROC and LAUNCHER, where they are given.
    """

    folder: Path
    arms: dict[str, Flags]
    single_task: dict[str, str]
    without: dict[str, str]
    field: str
    seeds: list[int]
    jobs: list[Job]
    slurm: dict[str, str]
    environment: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Experiment:
        """Read and check an experiment.

        Raises:
            UserError: an unknown key or flag, a flag that training or evaluation would refuse, no arm.
        """
        try:
            return cls._resolved(settings.load_yaml(path))
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix(f'{path} ')}") from error

    @classmethod
    def _resolved(cls, values: Mapping[str, Any]) -> Experiment:
        unknown = sorted(set(map(str, values)) - set(KEYS))
        if unknown:
            raise UserError(f"unknown key {unknown[0]!r}; known keys are {', '.join(KEYS)}")
        if not values.get("output_dir") or not isinstance(values["output_dir"], str):
            raise UserError("output_dir is missing; it says where the experiment goes")
        folder, base = Path(values["output_dir"]), read_base(values.get("base"))
        field = str(values.get("leave_one_out") or "")
        arms, without = read_arms(_mapping(values, "arms"), base, field)
        seeds = _seeds(values.get("seeds", [base.get("seed", 0)]))
        trained = {name: named_tasks_only({**base, **changes}) for name, changes in arms.items()}
        tasks = {name: named_tasks(flags) for name, flags in trained.items()}
        evaluations = {FINAL: _mapping(values, "evaluate")}
        if "guard" in values:
            evaluations[GUARD] = _mapping(values, "guard")
        return cls(
            folder=folder,
            arms=arms,
            single_task={names[0]: name for name, names in tasks.items() if len(names) == 1},
            without=without,
            field=field,
            seeds=seeds,
            jobs=[
                _job(folder / "base", "", 0, base, evaluations),
                *(
                    _job(folder / "arms" / name / f"seed-{seed}", name, seed, flags, evaluations)
                    for seed in seeds
                    for name, flags in trained.items()
                ),
            ],
            slurm=_slurm(_mapping(values, "slurm")),
            environment={key.upper(): str(values[key]) for key in ("nproc", "launcher") if key in values},
        )

    def write(self) -> None:
        """Write the resolved experiment into its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {"output_dir": str(self.folder), "seeds": self.seeds, "leave_one_out": self.field}
        flags = {job.beside("train.yaml").relative_to(self.folder).as_posix() for job in self.jobs if job.arm}
        text = to_yaml({**values, "arms": {**self.arms}, "flags": sorted(flags)})
        write_bytes(self.folder / "experiment.yaml", text.encode())


def _mapping(values: Mapping[str, Any], key: str) -> Flags:
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{key} is {value!r}; it holds lines of 'name: value'")
    return value or {}


def _seeds(value: Any) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(seed) is int for seed in value):
        raise UserError(f"seeds {value!r} is no list of whole numbers such as [0, 1, 2]")
    return list(dict.fromkeys(value))


def _slurm(options: Flags) -> dict[str, str]:
    out = {}
    for name, value in options.items():
        option = str(name).lstrip("-").replace("_", "-")
        if option == "nodes" and str(value) != "1":
            raise UserError(f"slurm: {name}: {value}: an arm trains on one machine; leave it out")
        if option == "time" and not isinstance(value, str):
            raise UserError(f"slurm: time is {value!r}: YAML takes 4:00:00 for a number; put it in quotes")
        if not re.fullmatch(r"[a-z][a-z-]*", option) or isinstance(value, (dict, list)) or "\n" in str(value):
            raise UserError(f"slurm: {name}: {value!r} is no option of sbatch")
        if value is not False:
            out[option] = "" if value is True else str(value)
    return out


def _job(folder: Path, arm: str, seed: int, flags: Flags, evaluations: Mapping[str, Flags]) -> Job:
    where = f"arm {arm}" if arm else "base"
    trained = parsed(TrainConfig, {**flags, "output_dir": str(folder), "seed": seed}, where)
    steps = {TRAIN: trained} if arm else {}
    for step, told in evaluations.items():
        key = "guard" if step == GUARD else "evaluate"
        check_names(told, EvalConfig, key)
        evaluated = as_trained(trained) | ({} if step == FINAL else {"val_shards": "", "val_jsonl": ""})
        if {"val_shards", "val_jsonl"} & told.keys():
            evaluated |= {"val_shards": "", "val_jsonl": "", "tasks": ""}
        place = {"lora_dir": str(folder) if arm else "", "output_dir": str(folder / "evaluations" / step)}
        steps[step] = parsed(EvalConfig, {**evaluated, **told, **place}, key)
    return Job(arm, seed, folder, steps)


def as_trained(trained: Flags) -> Flags:
    """The flags of an evaluation that decodes as the training decoded its own dev sets."""
    shared = {field.name for field in dataclasses.fields(DataConfig)} - {"seed"}
    flags = {name: value for name, value in trained.items() if name in shared}
    return flags | {"gen_max_new_tokens": trained["eval_max_new_tokens"]}


def batch_script(commands: Sequence[str], name: str, log: Path, options: Mapping[str, str], cwd: Path) -> str:
    """A script for sbatch.

    Args:
        commands: its lines.
        name: of the job.
        log: where its output goes, behind what is there.
        options: of sbatch, "" for one without a value.
        cwd: where it runs.
    """
    head = {"job-name": name, "output": str(log), "open-mode": "append", **options}
    directives = [f"#SBATCH --{option}{'=' * bool(value)}{value}" for option, value in head.items()]
    go = ["set -euo pipefail", f"cd {shlex.quote(str(cwd))}"]
    return "\n".join(["#!/usr/bin/env bash", *directives, *go, *commands, ""])
