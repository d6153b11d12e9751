"""Submit the steps of a run to slurm, each once the one before has succeeded.

    python launch/submit.py --config run.yaml --nodes 2 --gpus_per_node 8 --time 04:00:00 --partition gpu
    python launch/submit.py --config run.yaml --nodes 2 --cpu_ranks_per_node 1            training on CPUs
    python launch/submit.py --config run.yaml --steps train --gpus_per_node 8 -- --qos=long --mem=200G

run.yaml holds flags of launch/train.py. Steps: build packs its JSONL files as a job array, train trains, evaluate
scores the dev sets with the best checkpoint, into RUN/evaluations/final. What stands behind -- are options of sbatch
for every job, which count more than those that are set here. Job scripts, settings and logs go to RUN/slurm/1, those of
the next submission to RUN/slurm/2: a later edit of run.yaml changes no job that waits or is requeued. The same command
again goes on with the run; a single job is repeated with sbatch RUN/slurm/1/train.sbatch.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist import atomic, command_line, run_dir
from voxtral_dist import config as settings
from voxtral_dist.arm_flags import parsed, to_yaml
from voxtral_dist.config import EvalConfig, TrainConfig, split_list
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.experiment import as_trained
from voxtral_dist.row_filter import RowFilter, values_of
from voxtral_dist.tasks import parse_task_list

ROOT = Path(__file__).resolve().parent.parent
MARK = "# launch/submit.py: options and settings\n"
FILES = {"stages": "stages.yaml", "ds_config": "ds_config.json"}
"""Settings that may name a file, and what its copy is called."""


@dataclass(frozen=True)
class Job:
    """A job script: one of launch/slurm with what this run needs.

    Attributes:
        name: of the script and its logs.
        template: its file in launch/slurm.
        options: of sbatch.
        variables: what the script is told.
        slices: number of array tasks, 0 for a plain job.
    """

    name: str
    template: str
    options: dict[str, str]
    variables: dict[str, str]
    slices: int = 0

    def script(self, more: Sequence[str]) -> str:
        """The text, with ``more`` options of sbatch."""
        lines = [f"#SBATCH --{name}={shlex.quote(value)}" for name, value in self.options.items() if value]
        lines += [f"#SBATCH --array=0-{self.slices - 1}"] if self.slices else []
        lines += [f"#SBATCH {shlex.quote(option)}" for option in more]
        lines += [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        head, body = (ROOT / "launch" / "slurm" / f"{self.template}.sbatch").read_text("utf-8").split(MARK)
        return head + "".join(f"{line}\n" for line in lines) + body


def main(argv: Sequence[str] | None = None) -> None:
    """Check the settings, write the job scripts and submit them."""
    flags = _parser().parse_args(argv)
    config = command_line.parse(TrainConfig, ["--config", flags.config], "train.py")
    run = Path(config.output_dir).absolute()
    run_dir.check_output_dir(run)
    steps = _steps(flags, config)
    taken = [int(path.name) for path in run.glob("slurm/*") if path.name.isdecimal()]
    folder = run / "slurm" / str(max(taken, default=0) + 1)
    values, copies = _frozen(settings.to_dict(config), folder)
    texts = {"train.yaml": to_yaml(values)}
    if "evaluate" in steps:
        texts["evaluate.yaml"] = to_yaml(_evaluation(config, values, run))
    code = _code()
    jobs = [job for step in steps for job in _jobs(step, flags, config, folder, code)]
    scripts = {f"{job.name}.sbatch": job.script(flags.options) for job in jobs}
    if flags.dry_run:
        print("".join(f"\n==> {folder / name}\n{text}" for name, text in scripts.items()), end="")
        return
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on PATH; submit from a login node of the cluster, or give --dry_run"
        )
    with atomic.new_folder(folder) as aside:
        aside.chmod(0o700)  # logs show transcripts
        for name, text in (texts | scripts).items():
            (aside / name).write_text(text, "utf-8")
        for name, file in copies.items():
            shutil.copyfile(file, aside / name)
    submit(jobs, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", required=True, help="YAML file of train flags")
    add("--steps", default="", help="some of build,train,evaluate; default: all that there is data for")
    add("--nodes", type=_count, default=1, help="nodes that train (default: 1); one evaluates")
    add("--gpus_per_node", default="", metavar="[TYPE:]N", help="GPUs of a node, a rank each")
    add("--cpu_ranks_per_node", type=_count, metavar="N", help="no GPUs, N ranks a node instead")
    add("--cpus_per_task", type=_count, default=4, help="cores of a rank, and of a slice (default: 4)")
    add("--slices", type=_count, default=8, help="array tasks of the build (default: 8)")
    add("--time", default="", help="time limit of each job; a training goes on after it by itself")
    add("--partition", default="", help="of slurm")
    add("--build_partition", default="", help="partition of the build (default: as --partition)")
    add("--account", default="", help="of slurm")
    add("--dry_run", "--dry-run", action="store_true", help="print the job scripts, write and submit nothing")
    add("options", nargs="*", metavar="-- OPTIONS", help="other options of sbatch, --NAME=VALUE or --NAME")
    return parser


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _steps(flags: argparse.Namespace, config: TrainConfig) -> list[str]:
    """The steps in their order.

    Raises:
        UserError: an unknown one, one without data, no ranks, an option that is none.
    """
    data = {
        "build": split_list(config.train_jsonl) + split_list(config.val_jsonl),
        "train": ["always"],
        "evaluate": split_list(config.val_shards) + split_list(config.val_jsonl),
    }
    asked = split_list(flags.steps)
    for step in asked:
        if not data.get(step):
            reason = f"{flags.config} has no data for it" if step in data else f"known are {', '.join(data)}"
            raise UserError(f"--steps {flags.steps}: {step!r} cannot be done, {reason}; leave it out")
    steps = [step for step in data if data[step] and (step in asked or not asked)]
    if steps != ["build"] and bool(_gpus(flags)) == bool(flags.cpu_ranks_per_node):
        raise UserError(
            f"--gpus_per_node {flags.gpus_per_node or 'is missing'}: the ranks of a node follow from it; give a number "
            "or TYPE:NUMBER, or --cpu_ranks_per_node alone to train without GPUs"
        )
    for option in flags.options:
        if not option.startswith("-") or "\n" in option:
            raise UserError(f"-- {option!r} is no option of sbatch; write it as --NAME=VALUE")
    return steps


def _gpus(flags: argparse.Namespace) -> int:
    number = flags.gpus_per_node.rpartition(":")[2]
    return int(number) if number.isdecimal() else 0


def _frozen(values: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Settings in which files that may be edited later are copies in ``folder``, and the files by name of the copy."""
    copies = {}
    for setting, name in FILES.items():
        if values[setting] and Path(values[setting]).is_file():
            copies[name] = Path(values[setting])
            values = values | {setting: str(folder / name)}
    return values, copies


def _evaluation(config: TrainConfig, values: dict[str, Any], run: Path) -> dict[str, Any]:
    """The flags of the evaluation; dev sets of JSONL are those that the run packs."""
    where = {"lora_dir": str(run), "output_dir": str(run / "evaluations" / "final")}
    files = split_list(config.val_jsonl)
    if files:
        named = parse_task_list(split_list(config.tasks), files, "val_jsonl")
        tasks = values_of(files, named, "task", RowFilter())
        packed = ",".join(str(run / "shards" / task / "dev") for task in tasks)
        where |= {"val_shards": packed, "val_jsonl": "", "tasks": ""}
    return parsed(EvalConfig, as_trained(values) | where, "evaluate")


def _jobs(step: str, flags: argparse.Namespace, config: TrainConfig, folder: Path, code: str) -> list[Job]:
    """The jobs of a step."""
    run = folder.parent.parent
    variables = {"root": str(ROOT), "code": code, "run": str(run), "folder": str(folder), "step": step}
    common = {"account": flags.account, "time": flags.time, "chdir": str(Path.cwd())}
    common |= {"partition": flags.partition, "cpus-per-task": str(flags.cpus_per_task)}

    def names(name: str, number: str = "%j") -> dict[str, str]:
        return {"job-name": f"{run.name}-{name}", "output": f"{folder}/{name}-{number}.log"}

    if step == "build":
        one = common | {"ntasks": "1", "partition": flags.build_partition or flags.partition}
        rows = {"slices": str(flags.slices), "where": config.train_where, "model_id": config.model_id}
        for name in ("train_jsonl", "val_jsonl", "tasks"):
            rows[name] = ",".join(split_list(getattr(config, name)))
        build = Job("build", "build_shards", one | names("build", "%A-%a"), variables | rows, flags.slices)
        return [build, Job("finalize", "build_shards", one | names("finalize"), variables | rows)]
    common |= {"nodes": str(flags.nodes if step == "train" else 1), "gpus-per-node": flags.gpus_per_node}
    common |= {"ntasks-per-node": str(flags.cpu_ranks_per_node or _gpus(flags))}
    return [Job(step, step, common | names(step), variables)]


def _code() -> str:
    """The commit of the code, with ``-dirty`` where files differ from it, "" without git; says so."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        print(
            f"warning: {ROOT} is no git checkout, so nothing records which code the jobs run", file=sys.stderr
        )
        return ""
    if code.endswith("-dirty"):
        print(
            f"warning: files differ from commit {code[:12]}; a job runs them as they are then",
            file=sys.stderr,
        )
    return code


def submit(jobs: Sequence[Job], folder: Path) -> None:
    """Submit job scripts, each to begin when the one before has succeeded; all or none.

    Raises:
        UserError: slurm refused one; those before it are cancelled.
    """
    ids: list[str] = []
    lines = [f"job scripts, settings and logs: {folder}"]
    for job in jobs:
        after = [f"--dependency=afterok:{ids[-1]}", "--kill-on-invalid-dep=yes"] if ids else []
        command = ["sbatch", "--parsable", *after, str(folder / f"{job.name}.sbatch")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if ids:
                subprocess.run(["scancel", *ids], check=False)
            shutil.rmtree(folder)
            raise UserError(f"sbatch refused the {job.name} job, nothing is submitted: {done.stderr.strip()}")
        many = f", {job.slices} array tasks" if job.slices else ""
        when = f", when {ids[-1]} has succeeded" if ids else ""
        ids.append(done.stdout.strip().split(";")[0])
        lines.append(f"{job.name}: job {ids[-1]}{many}{when}")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    run_main(main)
