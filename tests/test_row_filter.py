"""Packing a part of the rows: the filter keeps what it says, says what it left out, and keeps packing what it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, load_script
from hypothesis import given
from hypothesis import strategies as st
from test_packing import asr_rows, child_env, files_of, tqa_rows, write_jsonl

from voxtral_dist.command_line import parse
from voxtral_dist.config import TrainConfig
from voxtral_dist.errors import UserError
from voxtral_dist.packing import pack
from voxtral_dist.row_filter import FILTER_FIELDS, RowFilter
from voxtral_dist.shards import ShardSet

REQUIRED = ["--model_id", "m", "--output_dir", "o"]
DOMAINS = ("call", "clinic", "school", None)
Condition = tuple[str, bool, list[str]]


def about(number: int, task: str) -> dict[str, Any]:
    """Fields to filter by, in a pattern of their own each; every fourth domain is missing, every third language."""
    fields = {
        "domain": DOMAINS[number % 4],
        "language": ("ko", "EN", "")[number % 3],
        "speaker": f"s{number % 5}",
    }
    return {**{name: value for name, value in fields.items() if value is not None}, "task": task}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 ASR and 8 TQA rows in two files."""
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "a.jsonl", [{**r, **about(n, "asr")} for n, r in enumerate(asr_rows(folder, 12))])
    write_jsonl(folder / "t.jsonl", [{**row, **about(n, "tqa")} for n, row in enumerate(tqa_rows(8))])
    return folder


def rows_of(corpus: Path) -> dict[str, dict[str, Any]]:
    """Every row by the place it is packed from."""
    return {
        f"{path.name}:{line}": json.loads(text)
        for path in sorted(corpus.glob("*.jsonl"))
        for line, text in enumerate(path.read_text("utf-8").splitlines(), 1)
    }


def packed(corpus: Path, out: Path, where: str) -> set[str]:
    """The places of the rows that were packed."""
    folders = pack(sorted(corpus.glob("*.jsonl")), out, where=RowFilter(where))
    return {
        ShardSet.open(folder).read(number).row["source"]
        for folder in folders
        for number in range(len(ShardSet.open(folder)))
    }


def expected(corpus: Path, conditions: list[Condition]) -> set[str]:
    """The same by Python."""

    def meets(row: dict[str, Any], name: str, equal: bool, values: list[str]) -> bool:
        value = row.get(name, "")
        return ((value.lower() if name == "language" else value) in values) == equal

    return {place for place, row in rows_of(corpus).items() if all(meets(row, *one) for one in conditions)}


CASES: dict[str, list[Condition]] = {
    "": [],
    "domain!=call": [("domain", False, ["call"])],
    " domain = call , clinic ;language=KO": [
        ("domain", True, ["call", "clinic"]),
        ("language", True, ["ko"]),
    ],
    "language=en": [("language", True, ["en"])],
    "speaker!=s1,s2; task=asr": [("speaker", False, ["s1", "s2"]), ("task", True, ["asr"])],
}


@pytest.mark.parametrize("where", CASES)
def test_the_rows_that_match_are_packed(corpus: Path, tmp_path: Path, where: str) -> None:
    kept = packed(corpus, tmp_path, where)
    assert kept == expected(corpus, CASES[where])
    assert 0 < len(kept) <= 20 and (len(kept) < 20) == bool(where)


conditions = st.tuples(
    st.sampled_from(["domain", "language", "speaker"]),
    st.booleans(),
    st.lists(st.sampled_from(["call", "clinic", "ko", "en", "s0", "s1", "s3"]), min_size=1, max_size=3),
)


@given(st.lists(conditions, min_size=1, max_size=3))
def test_any_conditions_mean_what_python_makes_of_them(corpus: Path, chosen: list[Condition]) -> None:
    text = "; ".join(f"{name}{'=' if equal else '!='}{','.join(values)}" for name, equal, values in chosen)
    where, rows = RowFilter(text), rows_of(corpus)
    kept = {place for place, row in rows.items() if where(row, row["task"])}
    assert kept == expected(corpus, chosen)
    assert (where.seen, where.left_out) == (20, 20 - len(kept))


def test_a_row_left_out_is_neither_bad_nor_missing(corpus: Path, tmp_path: Path) -> None:
    """Its audio is not there, its key unknown, its id taken: none of it matters. A line that is no JSON still does."""
    good = [json.loads(line) for line in (corpus / "a.jsonl").read_text("utf-8").splitlines()]
    bad = [
        {**good[0], "audio_path": "none.wav", "id": "x", "domain": "call"},
        {**good[1], "typo": 1, "id": "y", "domain": "call"},
        {**good[2], "domain": "call"},
    ]
    path = write_jsonl(corpus / "mixed.json", [*good, *bad])
    assert len(ShardSet.open(pack([path], tmp_path / "out", where=RowFilter("domain!=call"))[0])) == 9
    with pytest.raises(UserError, match=r"mixed.json:13: audio file 'none.wav' does not exist"):
        pack([path], tmp_path / "out")
    path.write_text(path.read_text("utf-8") + "{no json\n")
    with pytest.raises(UserError, match=r"mixed.json:16: invalid JSON"):
        pack([path], tmp_path / "out", where=RowFilter("domain!=call"))


def test_a_filter_gives_the_bytes_of_the_filtered_file(corpus: Path, tmp_path: Path) -> None:
    """As if the rows were not there, but for the line numbers; and twice the same."""
    lines = (corpus / "t.jsonl").read_text("utf-8").splitlines()
    kept = [line for line in lines if json.loads(line).get("domain") != "call"]
    (tmp_path / "t.jsonl").write_text("".join(f"{line}\n" for line in kept))
    pack([tmp_path / "t.jsonl"], tmp_path / "by_hand")
    for out in ("out", "again"):
        pack([corpus / "t.jsonl"], tmp_path / out, where=RowFilter("domain!=call"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")
    ids = [
        [shards.read(number).row["output"] for number in range(len(shards))]
        for shards in (ShardSet.open(tmp_path / name / "tqa/train") for name in ("out", "by_hand"))
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 6


def test_a_task_without_rows_has_no_data_set_and_none_at_all_is_an_error(
    corpus: Path, tmp_path: Path
) -> None:
    files = sorted(corpus.glob("*.jsonl"))
    assert pack(files, tmp_path, where=RowFilter("task=tqa")) == [tmp_path / "tqa/train"]
    assert not (tmp_path / "asr").exists()
    with pytest.raises(UserError, match="--train_where 'domain=x' leaves none of the 20 rows"):
        pack(files, tmp_path, where=RowFilter("domain=x", "--train_where"))


@pytest.mark.parametrize(
    "text",
    [
        "domain",
        "domain==",
        "domain=",
        "domain=a,,b",
        "colour=red",
        "domain=a;",
        ";",
        "=a",
        "domain<a",
        "task=x",
    ],
)
def test_a_malformed_filter_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^--where") as caught:
        RowFilter(text)
    assert "FIELD=VALUE" in str(caught.value) or "known tasks are asr" in str(caught.value)


def test_a_value_may_hold_an_equals_sign() -> None:
    assert RowFilter("domain=a=b")({"domain": "a=b"}, None)


def test_packed_training_sets_cannot_be_filtered() -> None:
    flags = [*REQUIRED, "--train_where", "domain!=call"]
    assert parse(TrainConfig, [*flags, "--train_jsonl", "a.jsonl"], "t").train_where == "domain!=call"
    with pytest.raises(UserError, match=r"--train_where 'domain!=call': packed sets .* filter when packing"):
        parse(TrainConfig, [*flags, "--train_shards", "s"], "t")


def test_the_builder_filters_and_says_so(corpus: Path, tmp_path: Path) -> None:
    def build(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/build_shards.py", "--jsonl", str(corpus / "t.jsonl"), *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=child_env(), check=False)

    done = build("--out", str(tmp_path), "--where", "domain!=call")
    assert done.returncode == 0 and "left out by --where: 2 of 8 rows" in done.stdout, done.stderr
    assert len(ShardSet.open(tmp_path / "tqa/train")) == 6
    checked = build("--check", "--where", "domain!=call")
    assert checked.returncode == 0 and "t.jsonl: 6 tqa" in checked.stdout
    wrong = build("--out", str(tmp_path), "--where", "colour=red")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --where 'colour=red'")
    assert not wrong.stderr.strip().count("\n")


def test_tars_taken_as_they_are_cannot_be_filtered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out --where"):
        load_script("tools/build_shards.py").main(
            ["--index_only", str(tmp_path), "--task", "asr", "--where", "task=asr"]
        )


def test_every_field_of_the_help_can_be_filtered_by() -> None:
    row = {"language": "ko", "domain": "d", "speaker": "s", "document": "c"}
    for name in FILTER_FIELDS:
        value = row.get(name, "asr")
        assert RowFilter(f"{name}={value}")(row, "asr") and not RowFilter(f"{name}!={value}")(row, "asr")
