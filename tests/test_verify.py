"""Verification: a whole data set has no fault, and every damage is one line that names the shard and the example."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_packing import ROOT, asr_rows, child_env, tqa_rows, write_jsonl

from voxtral_dist.data_stats import collect, details, table
from voxtral_dist.errors import UserError
from voxtral_dist.packing import pack
from voxtral_dist.shard_format import read_columns
from voxtral_dist.shards import ShardSet
from voxtral_dist.tar_members import Member, walk
from voxtral_dist.verify import find_data_sets, verify

ASR = "asr-train-000001.tar"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``out/asr/train`` with 12 rows in a few shards, ``out/tqa/train`` with 6 in one."""
    folder = tmp_path_factory.mktemp("built")
    rows = [{**row, "domain": f"d{n % 2}"} for n, row in enumerate(asr_rows(folder, 12))]
    write_jsonl(folder / "a.jsonl", [*rows, *tqa_rows(6), {"audio_path": "gone.wav", "transcript": "x"}])
    pack([folder / "a.jsonl"], folder / "out", shard_bytes=20_000, max_reject_rate=0.1)
    return folder / "out"


@pytest.fixture
def out(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "out"))


def keys(folder: Path, name: str) -> list[str]:
    shards = ShardSet.open(folder)
    number = shards.shard_names.index(name)
    return [shards.read(at).key for at in range(int(shards.starts[number]), int(shards.starts[number + 1]))]


def cli(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/verify_shards.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=child_env(), check=False)


@pytest.mark.parametrize("deep", [False, True])
def test_whole_data_sets_have_no_fault(out: Path, deep: bool) -> None:
    folders = find_data_sets(out)
    assert [str(folder.relative_to(out)) for folder in folders] == ["asr/train", "tqa/train"]
    assert [verify(folder, deep=deep, workers=2) for folder in folders] == [[], []]
    assert find_data_sets(out / "asr/train") == [out / "asr/train"]


def test_command_line(out: Path) -> None:
    result = cli(out)
    assert result.returncode == 0 and result.stdout.count("\n") == 1, result.stderr
    assert result.stdout.startswith("2 data sets, ") and "18 rows" in result.stdout
    assert cli(out, "--deep").returncode == 0
    (out / "asr/train" / ASR).unlink()
    (out / "tqa/train/manifest.json").unlink()
    result = cli(out, "--workers", 1)
    assert result.returncode == 2 and result.stderr.startswith("error: 2 faults in 2 data sets")
    assert [line.split(" ")[0].rstrip(":") for line in result.stdout.splitlines()] == [
        str(out / "asr/train" / ASR),
        str(out / "tqa/train"),
    ]
    for flags, words in (((out / "none",), "no folder"), ((out, "--deep", "--stats"), "both given")):
        result = cli(*flags)
        assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def owner_of(tar: Path, members: list[Member], offset: int, names: list[str]) -> str:
    """Key of the example to which a byte of a tar belongs, or what stands for the end of the archive."""
    columns, _ = read_columns(tar.with_suffix(".idx"))
    starts = columns["json_offset"].astype(int) - 512
    return "end of the archive" if offset >= members[-1].end else names[int((starts <= offset).sum()) - 1]


@pytest.mark.parametrize(("task", "name"), [("asr", ASR), ("tqa", "tqa-train-000000.tar")])
def test_every_flipped_byte_is_found_and_named(out: Path, task: str, name: str) -> None:
    folder = out / task / "train"
    names, tar = keys(folder, name), folder / name
    ids = {
        r.key: r.row["id"] for r in (ShardSet.open(folder).read(n) for n in range(len(ShardSet.open(folder))))
    }
    clean, draw = tar.read_bytes(), random.Random(7)
    with tar.open("rb") as file:
        members = list(walk(file, len(clean)))
    spots = [draw.randrange(len(clean)) for _ in range(40)]
    for member in members:  # name, checksum's last byte, type, owner, first and last byte, padding
        spots += [member.start + at for at in (2, 155, 156, 270, 511)]
        spots += [member.content, member.content + member.size - 1, member.end - 1]
    for spot in spots:
        damaged = bytearray(clean)
        damaged[spot] ^= 1 << draw.randrange(8)
        tar.write_bytes(damaged)
        faults = verify(folder, deep=True)
        owner = owner_of(tar, members, spot, names)
        assert len(faults) == 1, (spot, faults)
        assert faults[0].startswith(f"{tar}: "), faults
        assert owner in faults[0] or f"(id {ids.get(owner)!r})" in faults[0], (spot, owner, faults)
        assert verify(folder) == []  # the size is right: only --deep can see it
    tar.write_bytes(clean)
    assert verify(folder, deep=True) == []


@pytest.mark.parametrize(("task", "name"), [("asr", ASR), ("tqa", "tqa-train-000000.tar")])
def test_cut_at_every_member_is_found_and_named(out: Path, task: str, name: str) -> None:
    folder = out / task / "train"
    names, tar = keys(folder, name), folder / name
    clean = tar.read_bytes()
    with tar.open("rb") as file:
        members = list(walk(file, len(clean)))
    for member in members:
        for cut, lost in ((member.start, member.name), (member.end, None), (member.content + 1, member.name)):
            tar.write_bytes(clean[:cut])
            faults = verify(folder, deep=True)
            assert faults[0].startswith(f"{tar} has {cut} bytes where the manifest says {len(clean)}")
            assert len(faults) >= 2 and all(fault.startswith(str(tar)) for fault in faults)
            if lost:
                at = names.index(lost.split(".")[0])
                assert any(re.search(rf": ({names[at]}|example {at})\b", f) for f in faults[1:]), (
                    cut,
                    faults,
                )
            assert len(verify(folder)) == 1


def test_other_damage_to_a_tar(out: Path) -> None:
    folder = out / "asr/train"
    tar, names = folder / ASR, keys(folder, ASR)
    clean = tar.read_bytes()
    with tar.open("rb") as file:
        members = list(walk(file, len(clean)))
    second = members[2].start

    def faults(data: bytes) -> list[str]:
        tar.write_bytes(data)
        return verify(folder, deep=True)

    found = faults(clean[:second] + bytes(1024) + clean[second + 1024 :])
    assert any(re.search(rf": ({names[1]}|example 1)\b", fault) for fault in found), found
    found = faults(clean + clean)
    assert any("data behind them" in fault for fault in found), found
    found = faults(clean + bytes(10_240))
    assert any("end of the archive" in fault and "belong there" in fault for fault in found), found
    found = faults(clean[: members[1].start] + clean[members[2].start :])  # a .flac is gone
    assert any(names[0] in fault for fault in found), found


def test_damage_to_the_small_files(out: Path) -> None:
    folder = out / "asr/train"
    marker, index = (folder / ASR).with_suffix(".json"), (folder / ASR).with_suffix(".idx")
    clean_marker, clean_index = marker.read_bytes(), index.read_bytes()

    def only(words: str, deep: bool = False) -> None:
        found = verify(folder, deep=deep)
        assert len(found) == 1 and words in found[0], found

    marker.unlink()
    only("marker missing or damaged")
    for change in ({"sha256": "0"}, {"examples": 99}, {"schema": "x"}):
        marker.write_text(json.dumps({**json.loads(clean_marker), **change}))
        only(f"differ in {next(iter(change))}")
    marker.write_text(json.dumps({**json.loads(clean_marker), "audio_seconds": 1.0}))
    only("1.0 s of audio of the marker")
    marker.write_text(json.dumps({**json.loads(clean_marker), "languages": {"en": 3}}))
    only("the marker's languages", deep=True)
    marker.write_bytes(clean_marker)
    index.write_bytes(clean_index[:-1] + bytes([clean_index[-1] ^ 1]))
    only(f"{index}: damaged")
    only(f"{index}: damaged", deep=True)
    index.unlink()
    only(f"{index} is missing", deep=True)
    index.write_bytes(clean_index)
    (folder / "stranger.tar").write_bytes(b"")
    only("stranger.tar: is not in the manifest")
    (folder / "stranger.tar").unlink()
    (folder / "rejects.jsonl").write_text("")
    only("0 lines, the manifest says 1 rows")
    (folder / "manifest.json").write_text("{")
    only("damaged manifest")
    (folder / "manifest.json").unlink()
    only("no manifest")
    with pytest.raises(UserError, match="no data set"):
        (out / "empty").mkdir()
        find_data_sets(out / "empty")


def test_stats(out: Path) -> None:
    stats = collect(out / "asr/train")
    assert (stats.rows, stats.rejected, stats.task, stats.unit) == (12, 1, "asr", "s")
    assert stats.languages == {"ko": 12} and stats.domains == {"d0": 6, "d1": 6}
    assert stats.seconds == pytest.approx(sum(0.1 + 0.01 * (n % 7) for n in range(12)))
    assert stats.lengths == [(0, 1, 12)]
    assert stats.bytes == sum(path.stat().st_size for path in (out / "asr/train").glob("*.tar"))
    text = collect(out / "tqa/train")
    assert text.unit == "B" and sum(n for *_, n in text.lengths) == 6 and text.seconds == 0.0
    lines = table([stats, text]).splitlines()
    assert len(lines) == 3 and lines[1].split()[1:3] == ["12", "1"] and lines[1].endswith("ko 12")
    assert "0-1 s" in details(stats) and "d0 6, d1 6" in details(stats)
    result = cli(out, "--stats")
    assert result.returncode == 0 and "seconds of audio" in result.stdout and "ko 12" in result.stdout
    (out / "tqa/train/tqa-train-000000.json").unlink()
    assert "marker missing" in cli(out, "--stats").stderr
