"""The two READMEs say what the code does: flags, defaults, commands, data rows, exit codes, paths; and they agree."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from harness import ROOT, load_script

from voxtral_dist import command_line
from voxtral_dist.config import DataConfig, EvalConfig, TrainConfig
from voxtral_dist.errors import ExitCode
from voxtral_dist.tasks import parse_row

READMES = ("README.md", "README.ko.md")
OF_SCRIPT: dict[str, type[DataConfig]] = {"train": TrainConfig, "evaluate": EvalConfig}
OF_OTHERS = {
    "--num_gpus",
    "--nproc-per-node",
    "--ntasks-per-node",
    "--logdir",
    "--host",
    "--signal",
    "--help",
}
"""Flags of launchers, slurm and TensorBoard that the READMEs name."""

FLAG_ROW = re.compile(r"^\| `--(\w+)` \| (.+?) \| (.+) \|$", re.M)
LINK = re.compile(r"\]\(([^)#]+)\)")
HERE = re.compile(r"`((?:launch|tools|tests|voxtral_dist|ds_configs|shards)/[\w./-]*)`")


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """Every command line as words, continued lines joined, comments left out."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def flag_rows(text: str) -> list[dict[str, str]]:
    """Default by flag of each of the three flag tables: of both scripts, of train.py, of evaluate.py."""
    last = re.split(r"^## ", text, flags=re.M)[-3]
    tables = last.split("|---|---|---|")[1:]
    rows = [FLAG_ROW.findall(table) for table in tables]
    assert all(len(dict((r[0], r) for r in table)) == len(table) for table in rows), "a flag occurs twice"
    return [{name: default for name, default, _ in table} for table in rows]


def is_default(cell: str, value: object) -> bool:
    """Whether a cell of the default column stands for a field's default."""
    words = {"": "–", None: "auto", True: "true", False: "false"}
    if isinstance(value, (str, bool)) or value is None:
        return cell.strip("`") == words.get(value, value)
    return isinstance(value, (int, float)) and float(cell) == value


def layout(text: str) -> list[Path]:
    """Every path of the layout tree."""
    tree = next(block for block in blocks(text, "text") if "quickstart.sh" in block)
    paths, folder = [], Path()
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split(" ")
        if not line.startswith(" "):
            folder = Path(names[0]) if names[0].endswith("/") else Path()
            paths.append(Path(names[0]))
        else:
            paths += [folder / name for name in names]
    return paths


@pytest.mark.parametrize("name", READMES)
def test_flag_tables_are_complete_and_name_the_defaults(name: str) -> None:
    shared, train, evaluate = flag_rows(read(name))
    for config_class, own in ((DataConfig, {}), (TrainConfig, train), (EvalConfig, evaluate)):
        fields = {field.name: field.default for field in dataclasses.fields(config_class)}
        documented = shared | own
        assert set(documented) == set(fields), f"{config_class.__name__}: flags missing or unknown"
        wrong = {n: (documented[n], v) for n, v in fields.items() if not is_default(documented[n], v)}
        assert not wrong, f"{config_class.__name__}: default in the table and in the code {wrong}"


@pytest.mark.parametrize("name", READMES)
def test_no_unknown_flag_is_named(name: str) -> None:
    builder = load_script("tools/build_shards.py")._parser()
    known = OF_OTHERS | {"--config", "--no_bf16"} | {f for a in builder._actions for f in a.option_strings}
    for tool in (
        "rescore",
        "analyze_errors",
        "compare_runs",
        "report_run",
        "run_experiment",
        "export_adapter",
    ):
        known |= set(re.findall(r'"(--[a-z_]+)"', (ROOT / f"tools/{tool}.py").read_text("utf-8")))
    known |= {f for a in load_script("launch/submit.py")._parser()._actions for f in a.option_strings}
    known |= {f"--{field.name}" for c in OF_SCRIPT.values() for field in dataclasses.fields(c)}
    named = set(re.findall(r"`(--[\w-]+)", prose(read(name))))
    assert named and named <= known, f"unknown: {sorted(named - known)}"


@pytest.mark.parametrize("name", READMES)
def test_commands_parse(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bash accepts every block; train, evaluate and build_shards accept their flags; the files they start exist."""
    for block in blocks(read(name), "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text("model_id: m\noutput_dir: r\ntrain_shards: a,b\n")
    builder = load_script("tools/build_shards.py")._parser()
    seen = []
    for words in commands(read(name)):
        place = next((i for i, word in enumerate(words) if word.startswith(("launch/", "tools/"))), None)
        if place is None:
            continue
        assert (ROOT / words[place]).is_file(), words[place]
        script = Path(words[place]).stem
        seen.append(script)
        if script in OF_SCRIPT:
            command_line.parse(OF_SCRIPT[script], words[place + 1 :], script)
        elif script == "build_shards":
            builder.parse_args(words[place + 1 :])
        elif script == "submit":
            load_script("launch/submit.py")._parser().parse_args(words[place + 1 :])
    assert seen.count("train") >= 4 and {"evaluate", "build_shards", "setup"} <= set(seen)
    starts = [words[:2] for words in commands(read(name))]
    assert starts[:2] == [["bash", "launch/quickstart.sh"], ["bash", "launch/test.sh"]]


@pytest.mark.parametrize("name", READMES)
def test_rows_are_accepted(name: str) -> None:
    rows = [json.loads(line) for block in blocks(read(name), "json") for line in block.splitlines()]
    assert [parse_row(row, "README", "1").task for row in rows] == ["asr", "sqa", "tqa"]


@pytest.mark.parametrize("name", READMES)
def test_exit_codes(name: str) -> None:
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", read(name), re.M)]
    assert codes == [int(code) for code in ExitCode]


@pytest.mark.parametrize("name", READMES)
def test_links_and_paths_exist(name: str) -> None:
    text = read(name)
    named = {Path(match) for match in LINK.findall(text) + HERE.findall(prose(text))} | set(layout(text))
    missing = sorted(str(path) for path in named if not (ROOT / path).exists())
    assert not missing


@pytest.mark.parametrize("name", READMES)
def test_layout_leaves_nothing_out(name: str) -> None:
    files = [ROOT.glob(f"{pattern}") for pattern in ("launch/*.*", "tools/*.py", "voxtral_dist/[a-z]*.py")]
    there = {path.relative_to(ROOT) for group in files for path in group if path.is_file()}
    assert there <= set(layout(read(name))), sorted(map(str, there - set(layout(read(name)))))


def test_modules_import_only_what_the_layout_allows() -> None:
    """A module uses the modules of its own line of the tree and of the lines above."""
    lines = [
        line.split("  ")[1].split(" ") for line in read("README.md").splitlines() if line.startswith("  ")
    ]
    groups = [
        [n.removesuffix(".py") for n in names] for names in lines if len(names) > 2 and ".py" in names[0]
    ]
    level = {module: number for number, names in enumerate(groups) for module in names}
    assert len(level) > 30
    for module, number in level.items():
        used = imports(ROOT / f"voxtral_dist/{module}.py") & set(level)
        assert not [n for n in used if level[n] > number], f"{module} imports a module of a line below"


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "voxtral_dist":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("voxtral_dist."):
            found.add(node.module.split(".")[1])
    return found


def test_both_languages_say_the_same() -> None:
    """Same headings, commands, examples, result table, layout, links, flags and numbers in the same order."""
    english, korean = map(read, READMES)

    def headings(text: str) -> list[str]:
        return re.findall(r"^#+ ", text, re.M)

    def result(text: str) -> str:
        return text.split("<!-- quickstart-output -->")[1].split("```")[1]

    def names(text: str) -> list[set[str]]:
        sections = re.split(r"^## ", prose(text), flags=re.M)
        return [set(re.findall(r"`([^`\n가-힣]+)`", section)) - {"file:line"} for section in sections]

    assert headings(english) == headings(korean)
    assert commands(english) == commands(korean)
    assert blocks(english, "json") == blocks(korean, "json")
    assert result(english) == result(korean)
    assert layout(english) == layout(korean)
    assert flag_rows(english) == flag_rows(korean)
    assert names(english) == names(korean)
    assert set(LINK.findall(english)) - {READMES[1]} == set(LINK.findall(korean)) - {READMES[0]}


@pytest.mark.parametrize("name", READMES)
def test_nothing_of_one_machine(name: str) -> None:
    """No address of a host, no path that exists on one machine only."""
    assert not re.findall(r"\w+://\S+|(?<![\w.-])/(?:home|root|tmp|work|mnt|data)\b\S*", read(name))
