"""Slurm jobs as launch/submit.py writes them, and how they end; slurm's own commands are stand-ins here.

tests/test_slurm.py runs the same on a real slurm.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from demo_runs import TASKS, Demo
from harness import ROOT, load_script

from voxtral_dist import command_line
from voxtral_dist.config import EvalConfig, TrainConfig
from voxtral_dist.errors import UserError

STAND_INS = {
    "sbatch": """echo "$@" >>calls
if [ "$(basename "${@: -1}")" = "$REFUSE" ]; then echo "no such partition" >&2; exit 1; fi
echo "$((100 + $(wc -l <calls)));cluster" """,
    "scancel": 'echo "scancel $*" >>calls',
    "scontrol": 'if [ "$1" = show ]; then printf "n4\\nn5\\n"; else echo "scontrol $*" >>calls; fi',
    "squeue": 'echo "$STATE"',
    "srun": """echo "srun $* addr=$MASTER_ADDR port=$MASTER_PORT rank=${RANK:-}" >>calls
if [ -n "$STATUS" ]; then echo "{
  \\"exit_code\\": $STATUS,
  \\"message\\": \\"as rank 0 says\\"
}" >run/exit_status.json; fi
if [ -n "$LEFT" ]; then mkdir -p "run/checkpoints/step-$RANDOM$RANDOM"; fi
exit "$SRUN" """,
}
"""What the commands of slurm do here; each keeps its arguments in the file ``calls``."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("launch/submit.py")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, with a blank in its name, and slurm's commands first on PATH."""
    folder, commands = tmp_path / "a folder", tmp_path / "bin"
    for path in (folder, commands):
        path.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\ncd '{folder}'\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    for name in ("REFUSE", "STATE", "STATUS", "LEFT", "SRUN"):
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def write(demo: Demo) -> Callable[..., str]:
    """Writes the settings of a run over the demo's JSONL files, some of them changed."""

    def write_one(**values: Any) -> str:
        flags = demo.data("jsonl")
        known = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
        known |= {"output_dir": "run", "max_len": 128, "eval_max_new_tokens": 4, **values}
        Path("run.yaml").write_text(yaml.safe_dump({k: v for k, v in known.items() if v != ""}), "utf-8")
        return "run.yaml"

    return write_one


def calls() -> list[str]:
    return Path("calls").read_text().splitlines() if Path("calls").exists() else []


def options(script: Path) -> dict[str, str]:
    """The sbatch options of a job script; slurm takes the last of several."""
    lines = [line for line in script.read_text("utf-8").splitlines() if line.startswith("#SBATCH ")]
    texts = [line.removeprefix("#SBATCH ").replace("'", "").removeprefix("--") for line in lines]
    words = [text.partition("=") for text in texts]
    return {name: value for name, _, value in words}


def test_a_run_becomes_a_chain_of_jobs(tool: ModuleType, write: Callable[..., str], work: Path) -> None:
    where = ["--partition", "gpu", "--build_partition", "cpu", "--account", "speech", "--time", "04:00:00"]
    size = ["--nodes", "2", "--gpus_per_node", "h100:8", "--cpus_per_task", "12", "--slices", "16"]
    more = ["--", "--qos=long", "--signal=USR2@600", "--account=else"]
    tool.main(["--config", write(train_where="domain!=it's"), *where, *size, *more])
    folder = work / "run/slurm/1"
    assert calls() == [
        f"--parsable {folder}/build.sbatch",
        f"--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {folder}/finalize.sbatch",
        f"--parsable --dependency=afterok:102 --kill-on-invalid-dep=yes {folder}/train.sbatch",
        f"--parsable --dependency=afterok:103 --kill-on-invalid-dep=yes {folder}/evaluate.sbatch",
    ]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "logs show transcripts"
    scripts = {path.stem: path for path in folder.glob("*.sbatch")}
    for script in scripts.values():
        subprocess.run(["bash", "-n", str(script)], check=True)
    found = {name: options(script) for name, script in scripts.items()}
    common = {"time": "04:00:00", "chdir": str(work), "cpus-per-task": "12", "account": "else", "qos": "long"}
    common |= {"open-mode": "append", "requeue": "", "signal": "USR2@600"}
    gpu = {"partition": "gpu", "gpus-per-node": "h100:8", "ntasks-per-node": "8"}
    cpu = {"partition": "cpu", "ntasks": "1"}
    names = {name: {"job-name": f"run-{name}", "output": f"{folder}/{name}-%j.log"} for name in scripts}
    names["build"] |= {"output": f"{folder}/build-%A-%a.log", "array": "0-15"}
    assert found == {
        "build": common | cpu | names["build"],
        "finalize": common | cpu | names["finalize"],
        "train": common | gpu | names["train"] | {"nodes": "2"},
        "evaluate": common | gpu | names["evaluate"] | {"nodes": "1"},
    }
    told = subprocess.run(
        ["bash", "-c", f"{scripts['build'].read_text().partition('set -euo')[0]}\necho \"$where|$slices|$run\""],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout == f"domain!=it's|16|{work}/run\n"


def test_ranks_on_cpus_and_the_signal_that_comes_first(
    tool: ModuleType, write: Callable[..., str], work: Path
) -> None:
    tool.main(["--config", write(), "--steps", "train", "--nodes", "3", "--cpu_ranks_per_node", "2"])
    found = options(work / "run/slurm/1/train.sbatch")
    assert (found["ntasks-per-node"], found["nodes"], "gpus-per-node" in found) == ("2", "3", False)
    assert found["signal"] == "USR2@180", "to the ranks; B: would signal the batch shell alone"
    assert len(calls()) == 1


def test_a_later_edit_changes_no_submitted_job(
    tool: ModuleType, write: Callable[..., str], demo: Demo, work: Path
) -> None:
    shutil.copyfile(ROOT / "launch/stages.example.yaml", "stages.yaml")
    shutil.copyfile(ROOT / "ds_configs/zero2.json", "zero.json")
    first = ["--config", write(stages="stages.yaml", ds_config="zero.json"), "--gpus_per_node", "1"]
    tool.main(first)
    for name in ("run.yaml", "stages.yaml", "zero.json"):
        Path(name).write_text("{}")
    one = work / "run/slurm/1"
    config = command_line.parse(TrainConfig, ["--config", str(one / "train.yaml")], "train.py")
    assert (config.max_len, config.output_dir) == (128, "run")
    assert Path(config.stages).read_text() == (ROOT / "launch/stages.example.yaml").read_text()
    assert Path(config.ds_config).read_text() == (ROOT / "ds_configs/zero2.json").read_text()
    scored = command_line.parse(EvalConfig, ["--config", str(one / "evaluate.yaml")], "evaluate.py")
    assert scored.val_shards == ",".join(f"{work}/run/shards/{task}/dev" for task in TASKS), (
        "what the build packs"
    )
    assert (scored.lora_dir, scored.output_dir) == (f"{work}/run", f"{work}/run/evaluations/final")
    assert (scored.model_id, scored.max_len, scored.gen_max_new_tokens) == (str(demo.model), 128, 4)
    tool.main(["--config", write(max_len=256), "--gpus_per_node", "1", "--steps", "train"])
    assert "max_len: 256" in (work / "run/slurm/2/train.yaml").read_text()
    assert "max_len: 128" in (one / "train.yaml").read_text()


def test_packed_data_needs_no_build(tool: ModuleType, write: Callable[..., str], work: Path) -> None:
    packed = {"train_jsonl": "", "val_jsonl": "", "train_shards": "a,b"}
    tool.main(["--config", write(**packed), "--gpus_per_node", "1"])
    tool.main(["--config", write(**packed, val_shards="c"), "--gpus_per_node", "1"])
    assert [sorted(path.stem for path in (work / f"run/slurm/{n}").glob("*.sbatch")) for n in "12"] == [
        ["train"],
        ["evaluate", "train"],
    ]
    assert "val_shards: c\n" in (work / "run/slurm/2/evaluate.yaml").read_text()


def test_a_dry_run_shows_the_scripts_and_does_nothing(
    tool: ModuleType,
    write: Callable[..., str],
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    tool.main(["--config", write(), "--gpus_per_node", "4", "--dry-run"])
    shown = capsys.readouterr().out
    for name in ("build", "finalize", "train", "evaluate"):
        assert f"==> {work}/run/slurm/1/{name}.sbatch\n#!/usr/bin/env bash\n" in shown
    assert "#SBATCH --gpus-per-node=4\n" in shown
    assert [path.name for path in work.iterdir()] == ["run.yaml"]


def test_what_slurm_refuses_leaves_nothing(
    tool: ModuleType, write: Callable[..., str], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSE", "train.sbatch")
    message = "sbatch refused the train job, nothing is submitted: no such partition"
    with pytest.raises(UserError, match=message):
        tool.main(["--config", write(), "--gpus_per_node", "8"])
    assert calls()[-1] == "scancel 101 102" and list((work / "run/slurm").iterdir()) == []
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="there is no sbatch on PATH; submit from a login node"):
        tool.main(["--config", write(), "--gpus_per_node", "8"])
    assert list((work / "run/slurm").iterdir()) == []


WRONG: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "a slip in the settings": ({"max_lenn": 3}, [], "max_lenn"),
    "a step": (
        {},
        ["--steps", "train,eval"],
        "--steps train,eval: 'eval' cannot be done, known are build, train, ev",
    ),
    "no rows to build": (
        {"train_jsonl": "", "val_jsonl": "", "train_shards": "a"},
        ["--steps", "build"],
        "--steps build: 'build' cannot be done, run.yaml has no data for it; leave it out",
    ),
    "no ranks": ({}, ["--nodes", "2"], "--gpus_per_node is missing: the ranks of a node follow from it"),
    "no number": ({}, ["--gpus_per_node", "h100"], "--gpus_per_node h100: the ranks"),
    "both": ({}, ["--gpus_per_node", "2", "--cpu_ranks_per_node", "2"], "--gpus_per_node 2: the ranks"),
    "an option": ({}, ["--gpus_per_node", "2", "--", "qos"], "-- 'qos' is no option of sbatch; write it as"),
    "dev rows that are not there": ({"val_jsonl": "none.jsonl"}, ["--gpus_per_node", "2"], "none.jsonl"),
    "somebody's directory": (
        {"output_dir": "taken"},
        ["--gpus_per_node", "2"],
        "taken is not a run directory",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_before_anything_is_submitted(
    tool: ModuleType, write: Callable[..., str], work: Path, case: str
) -> None:
    Path("taken").mkdir()
    Path("taken/thesis.tex").touch()
    values, flags, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        tool.main(["--config", write(**values), *flags])
    assert "\n" not in str(caught.value)
    assert calls() == [] and not list(work.glob("*/slurm"))


def checkout(work: Path) -> Path:
    """A git checkout with the job scripts in it, and one commit."""
    root = work / "code"
    shutil.copytree(ROOT / "launch/slurm", root / "launch/slurm")
    shutil.copyfile(ROOT / "launch/setup.sh", root / "launch/setup.sh")
    commit = ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one", "--allow-empty"]
    for command in (["init", "-q"], ["add", "."], commit):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def start(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run lines of a job script as slurm would on the first of two nodes."""
    told = {"VOXTRAL_DIST_PYTHON": sys.executable, "SLURM_JOB_ID": "1035123", "SLURM_JOB_NODELIST": "n[4-5]"}
    told |= {
        "SLURM_CPUS_PER_TASK": "3",
        "RANK": "7",
        "folder": os.getcwd(),
        "step": "train",
        "root": str(ROOT),
    }
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{script}"],
        env=os.environ | told | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_other_code_than_at_the_submission_is_told(
    tool: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkout(work)
    monkeypatch.setattr(tool, "ROOT", root)
    code = tool._code()
    assert len(code) == 40 and capsys.readouterr().err == ""

    def log() -> str:
        return start('. "$root/launch/slurm/begin.sh"', root=str(root), code=code).stderr

    assert log() == ""
    with (root / "launch/setup.sh").open("a") as file:
        file.write("# edited\n")
    assert f"submitted with the code at {code}, this start runs it at {code}-dirty" in log()
    assert tool._code() == f"{code}-dirty"
    assert f"files differ from commit {code[:12]}; a job runs them as they are" in capsys.readouterr().err
    shutil.rmtree(root / ".git")
    assert tool._code() == "" and "is no git checkout" in capsys.readouterr().err
    assert log() == ""


RUN = '. "$root/launch/slurm/run_ranks.sh"\nrun_ranks run --wait=60 train.py --config "a b.yaml"'


def run_ranks(monkeypatch: pytest.MonkeyPatch, **environ: str) -> tuple[int, str]:
    """Exit code and messages of a training whose srun and rank 0 end as told."""
    Path("run").mkdir(exist_ok=True)
    Path("calls").unlink(missing_ok=True)
    done = start(RUN, PYTHON="python", **environ)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("status", "srun", "code"),
    [("0", "0", 0), ("2", "2", 2), ("1", "137", 1), ("", "137", 137), ("", "0", 1), ("80", "0", 80)],
)
def test_the_exit_code_is_that_of_rank_0(
    monkeypatch: pytest.MonkeyPatch, status: str, srun: str, code: int
) -> None:
    Path("run").mkdir()
    Path("run/exit_status.json").write_text('{"exit_code": 0, "message": "of an earlier start"}')
    found, log = run_ranks(monkeypatch, STATUS=status, SRUN=srun, STATE="RUNNING")
    assert found == code
    assert (f"error: exit code {code}; the ranks' logs: " in log) == bool(code)
    assert ('ended: "as rank 0 says"' in log) == bool(status) and "earlier" not in log
    assert [line.split()[0] for line in calls()] == ["srun"], "nothing is requeued"


def test_how_the_ranks_are_started(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    run_ranks(monkeypatch, STATUS="0", SRUN="0")
    assert calls() == [
        "srun --wait=60 --kill-on-bad-exit=1 --cpus-per-task=3 --input=none --open-mode=append "
        f"--output={work}/train-1035123-rank%t.log python train.py --config a b.yaml addr=n4 port=25123 rank="
    ]


def test_a_stopped_job_is_requeued_unless_it_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = {"STATUS": "75", "SRUN": "137", "LEFT": "yes"}
    assert run_ranks(monkeypatch, **stopped, STATE="RUNNING")[0] == 75
    assert calls()[-1] == "scontrol requeue 1035123"
    code, log = run_ranks(monkeypatch, **stopped, STATE="COMPLETING")
    assert (
        code == 75
        and len(calls()) == 1
        and "cancelled: not requeued; submitting the run again goes on" in log
    )


def test_three_starts_without_progress_are_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def requeued(left: str) -> bool:
        log = run_ranks(monkeypatch, STATUS="75", SRUN="75", STATE="RUNNING", LEFT=left)[1]
        assert ("3 starts in a row left no checkpoint; not requeued: give more --time" in log) == (
            len(calls()) == 1
        )
        return calls()[-1] == "scontrol requeue 1035123"

    assert [requeued(left) for left in ("", "", "yes", "", "", "", "yes")] == [True] * 5 + [False, True]


def test_an_array_packs_the_same_bytes_as_one_process(
    tool: ModuleType, write: Callable[..., str], demo: Demo, work: Path
) -> None:
    """Its tasks in any order; the job without an array finalizes."""
    tool.main(["--config", write(train_jsonl="", train_shards="a"), "--steps", "build", "--slices", "2"])
    script = (work / "run/slurm/1/build.sbatch").read_text()
    assert script != (work / "run/slurm/1/finalize.sbatch").read_text()
    for task in ("1", "0", ""):
        done = start(script, SLURM_ARRAY_TASK_ID=task)
        assert done.returncode == 0, done.stderr
        assert (work / "run/shards/asr/dev/manifest.json").exists() == (task == "")
    for task in TASKS:
        mine, theirs = (folder / "shards" / task / "dev" for folder in (work / "run", demo.folder))
        names = {path.name for path in theirs.iterdir() if not path.name.startswith("lengths")}
        assert names and all((mine / name).read_bytes() == (theirs / name).read_bytes() for name in names)
        assert json.loads((mine / "manifest.json").read_text())["examples"] == 8
