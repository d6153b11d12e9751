"""The two container files, as far as that goes without building an image: what they copy and run; they agree."""

from __future__ import annotations

import re

from harness import ROOT

DOCKER = (ROOT / "launch/container/Dockerfile").read_text("utf-8").replace("\\\n", " ")
APPTAINER = (ROOT / "launch/container/voxtral-dist.def").read_text("utf-8")
HOME = "/opt/voxtral-dist"


def section(name: str) -> list[str]:
    """The lines of a section of the Apptainer file."""
    text = re.split(rf"^%{name}$", APPTAINER, flags=re.M)[1]
    return [line.strip() for line in re.split(r"^%", text, flags=re.M)[0].splitlines() if line.strip()]


def instructions(name: str) -> list[str]:
    """What stands behind an instruction of the Dockerfile, each time."""
    return [" ".join(words.split()) for words in re.findall(rf"^{name} (.+)$", DOCKER, re.M)]


def copied() -> set[str]:
    """Files and folders that the Dockerfile copies, by their place below the home of the code."""
    assert instructions("WORKDIR") == [HOME]
    found = set()
    for line in instructions("COPY"):
        *sources, target = line.split()
        assert target == "./" or sources == [target], "copied to the same place as in the clone"
        found |= set(sources)
    return found


def test_both_copy_what_the_setup_and_the_scripts_need() -> None:
    files = dict(line.split() for line in section("files"))
    assert files == {name: f"{HOME}/{name}" for name in copied()}
    assert all((ROOT / name).exists() for name in copied())
    needed = {
        "setup.cfg",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "launch",
        "voxtral_dist",
        "tools",
        "shards",
    }
    assert needed <= copied()


def test_both_run_the_same() -> None:
    runs = [part.strip() for line in instructions("RUN") for part in line.split("&&")]
    user = [part for part in runs if part.startswith("useradd")]
    assert [line for line in section("post") if line != f"cd {HOME}"] == [p for p in runs if p not in user]
    assert len(user) == 1 and instructions("USER") == [user[0].split()[-1]], "not root, and one that exists"
    assert "PIP_NO_CACHE_DIR=1 bash launch/setup.sh run" in runs, (
        "the versions are those of every other installation"
    )


def test_both_have_the_same_base_and_interpreter() -> None:
    (base,) = instructions("ARG")
    assert base == f"BASE={re.findall(r'^From: (.+)$', APPTAINER, re.M)[0]}"
    version = tuple(map(int, re.findall(r"python:(\d+)\.(\d+)-", base)[0]))
    assert (3, 10) <= version < (3, 14)
    environment = {f"export {word}" for line in instructions("ENV") for word in line.split()}
    assert environment == set(section("environment"))
    assert f"export VOXTRAL_DIST_PYTHON={HOME}/.venv/bin/python" in environment
