"""JSONL to shards: every row accounted for, equal bytes whoever builds, nothing half-finished, bad input named."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from voxtral_dist.errors import UserError
from voxtral_dist.packing import BadRow, ScannedRow, check, pack, scan
from voxtral_dist.shards import ShardSet

ROOT = Path(__file__).resolve().parent.parent
TINY_SHARDS = 20_000  # bytes, about three clips


def write_clip(path: Path, seed: int, seconds: float = 0.2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).integers(-3000, 3000, int(16_000 * seconds)).astype(np.int16)
    soundfile.write(path, samples, 16_000, subtype="PCM_16")


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def asr_rows(folder: Path, count: int, first: int = 0) -> list[dict]:
    for number in range(first, first + count):
        write_clip(folder / f"clips/{number}.wav", number, 0.1 + 0.01 * (number % 7))
    return [
        {"audio_path": f"clips/{n}.wav", "transcript": f"문장 {n}", "language": "ko", "id": f"c{n}"}
        for n in range(first, first + count)
    ]


def tqa_rows(count: int) -> list[dict]:
    return [{"instruction": f"What is {n}+1?", "output": str(n + 1)} for n in range(count)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def cli(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/build_shards.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=child_env(), check=False)


def child_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def records(folder: Path) -> list:
    shards = ShardSet.open(folder)
    return [shards.read(index) for index in range(len(shards))]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files: ASR alone, and ASR, SQA and TQA mixed."""
    write_jsonl(tmp_path / "a.jsonl", asr_rows(tmp_path, 12))
    more = asr_rows(tmp_path, 5, first=12)
    spoken = [
        {"audio_path": f"clips/{n}.wav", "question": "what?", "answer": [f"a{n}", "b"]} for n in range(4)
    ]
    mixed = [row for rows in zip(more, [*spoken, spoken[0]], strict=True) for row in rows]
    write_jsonl(tmp_path / "b.jsonl", [*mixed, "", *tqa_rows(6)])
    return tmp_path


def corpus_files(corpus: Path) -> list[Path]:
    return [corpus / "a.jsonl", corpus / "b.jsonl"]


def pack_tiny(corpus: Path, out: Path, **options: object) -> list[Path]:
    return pack(corpus_files(corpus), out, shard_bytes=TINY_SHARDS, **options)  # type: ignore[arg-type]


def test_rows_go_to_their_tasks_in_file_order(corpus: Path) -> None:
    folders = pack_tiny(corpus, corpus / "out")
    assert [str(f.relative_to(corpus)) for f in folders] == [
        "out/asr/train",
        "out/sqa/train",
        "out/tqa/train",
    ]
    asr, sqa, tqa = (records(folder) for folder in folders)
    assert (len(asr), len(sqa), len(tqa)) == (17, 5, 6)
    by_key = {record.key: record for record in asr}
    assert sorted(by_key) == [f"asr_{n:012d}" for n in range(17)]
    for number in range(17):
        row = by_key[f"asr_{number:012d}"].row
        line = number + 1 if number < 12 else 2 * (number - 12) + 1
        name = "a" if number < 12 else "b"
        assert row["source"] == f"{name}.jsonl:{line}"
        assert (row["id"], row["task"], row["transcript"]) == (f"c{number}", "asr", f"문장 {number}")
        samples = soundfile.read(corpus / row["audio_path"], dtype="int16")[0]
        assert row["duration"] == len(samples) / 16_000
        audio = by_key[f"asr_{number:012d}"].audio
        (corpus / "x.flac").write_bytes(audio)
        assert np.array_equal(soundfile.read(corpus / "x.flac", dtype="int16")[0], samples)
    assert [record.key for record in asr] != sorted(by_key)  # shuffled
    assert {record.row["id"] for record in tqa} == {
        f"b:{line}" for line in range(12, 18)
    }  # the blank line counts
    assert len(ShardSet.open(folders[0]).shard_names) > 3
    assert str(corpus).encode() not in b"".join(files_of(corpus / "out").values())


def test_webdataset_sees_the_same_samples(corpus: Path) -> None:
    for folder in pack_tiny(corpus, corpus / "out"):
        urls = sorted(str(path) for path in folder.glob("*.tar"))
        theirs = [(s["__key__"], s.get("flac")) for s in webdataset.WebDataset(urls, shardshuffle=False)]
        assert theirs == [(record.key, record.audio) for record in records(folder)]


def test_everything_is_reproducible_wherever_it_is_built(corpus: Path) -> None:
    pack_tiny(corpus, corpus / "out")
    pack_tiny(corpus, corpus / "elsewhere/again")
    assert files_of(corpus / "out") == files_of(corpus / "elsewhere/again")


def test_unchanged_input_is_left_alone(corpus: Path) -> None:
    pack_tiny(corpus, corpus / "out")
    before = {path: path.stat().st_mtime_ns for path in (corpus / "out").rglob("*")}
    pack_tiny(corpus, corpus / "out")
    assert {path: path.stat().st_mtime_ns for path in (corpus / "out").rglob("*")} == before


def test_one_changed_file_rebuilds_one_shard(corpus: Path) -> None:
    folder = pack_tiny(corpus, corpus / "out")[0]
    before, old = ShardSet.open(folder), files_of(folder)
    changed = next(record for record in records(folder) if record.row["id"] == "c3")
    write_clip(corpus / "clips/3.wav", seed=99)
    pack_tiny(corpus, corpus / "out")
    after = ShardSet.open(folder)
    different = [a != b for a, b in zip(before.shard_sha256, after.shard_sha256, strict=True)]
    assert sum(different) == 1 and before.fingerprint != after.fingerprint
    assert changed.audio not in [record.audio for record in records(folder)]
    names = {name for name, data in files_of(folder).items() if old[name] != data}
    assert len(names) == 4  # tar, idx, marker, manifest


def test_changed_data_set_is_none_until_it_is_whole(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack_tiny(corpus, corpus / "out")[0]
    write_clip(corpus / "clips/3.wav", seed=99)
    with monkeypatch.context() as patched:
        patched.setattr("voxtral_dist.packing.to_flac", lambda path: 1 / 0)
        with pytest.raises(RuntimeError, match=r"a\.jsonl:\d+: ZeroDivisionError"):
            pack_tiny(corpus, corpus / "out")
    with pytest.raises(UserError, match="no manifest"):
        ShardSet.open(folder)


def test_row_that_got_lost_is_noticed(corpus: Path) -> None:
    folder = pack_tiny(corpus, corpus / "out")[0]
    marker = json.loads((folder / "asr-train-000001.json").read_text())
    (folder / "asr-train-000001.json").write_text(json.dumps({**marker, "examples": marker["examples"] - 1}))
    with pytest.raises(RuntimeError, match="17 rows went in, 16 are stored"):
        pack_tiny(corpus, corpus / "out")


def test_damaged_shard_is_rebuilt(corpus: Path) -> None:
    folder = pack_tiny(corpus, corpus / "out")[0]
    before = files_of(folder)
    (folder / "asr-train-000001.tar").write_bytes(before["asr-train-000001.tar"][:-1])
    (folder / "asr-train-000000.idx").unlink()
    (folder / "asr-train-000002.json").write_text("{")
    pack_tiny(corpus, corpus / "out")
    assert files_of(folder) == before


def test_fewer_rows_leave_no_strangers(corpus: Path) -> None:
    folder = pack_tiny(corpus, corpus / "out")[0]
    (folder / "asr-train-000001.tar.tmp-123-abcd").write_bytes(b"litter of a killed process")
    (folder / "notes.txt").write_text("mine")
    pack(corpus_files(corpus)[:1], corpus / "out", tasks=["asr"], shard_bytes=1 << 20)
    assert sorted(files_of(folder)) == [
        "asr-train-000000.idx",
        "asr-train-000000.json",
        "asr-train-000000.tar",
        "manifest.json",
        "notes.txt",
    ]
    assert len(ShardSet.open(folder)) == 12


def test_slices_build_what_one_process_builds(corpus: Path) -> None:
    pack_tiny(corpus, corpus / "one")
    pack_tiny(corpus, corpus / "two", slice_=(1, 2), finalize=False)
    with pytest.raises(UserError, match=r"asr-train-000000\.json.*not built"):
        pack_tiny(corpus, corpus / "two", slice_=None)
    assert not list((corpus / "two").rglob("manifest.json"))
    pack_tiny(corpus, corpus / "two", slice_=(0, 2), finalize=False)
    assert not list((corpus / "two").rglob("manifest.json"))
    pack_tiny(corpus, corpus / "two", slice_=None)
    assert files_of(corpus / "one") == files_of(corpus / "two")


def test_ranks_return_with_the_manifest_and_not_before(corpus: Path) -> None:
    for slice_ in ((0, 2), (1, 2)):
        pack_tiny(corpus, corpus / "out", slice_=slice_, finalize=False)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(pack_tiny, corpus, corpus / "out", slice_=(1, 2), wait=True)
        with pytest.raises(FutureTimeoutError):
            other.result(timeout=0.5)
        assert not list((corpus / "out").rglob("manifest.json"))
        assert pack_tiny(corpus, corpus / "out", slice_=(0, 2), wait=True) == other.result(timeout=30)


RANK = """
import sys
from voxtral_dist.errors import run_main
from voxtral_dist.packing import pack
corpus, out, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
files = [f"{corpus}/a.jsonl", f"{corpus}/b.jsonl"]
run_main(lambda: print(*pack(files, out, shard_bytes=20_000, slice_=(rank, 3), wait=True)))
"""


def run_ranks(corpus: Path, out: Path) -> list[tuple[int, str, str]]:
    """Three processes that start at different times; exit code, stdout and stderr of each."""
    processes = []
    for rank in (2, 1, 0):
        command = [sys.executable, "-c", RANK, str(corpus), str(out), str(rank)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=child_env(), text=True, **pipes))
        time.sleep(0.2)
    return [(*reversed(p.communicate(timeout=60)), p.returncode)[::-1] for p in processes]  # type: ignore[misc]


def test_ranks_wait_for_each_other_and_agree(corpus: Path) -> None:
    pack_tiny(corpus, corpus / "one")
    results = run_ranks(corpus, corpus / "ranks")
    assert [code for code, *_ in results] == [0, 0, 0], results
    assert files_of(corpus / "one") == files_of(corpus / "ranks")
    write_clip(corpus / "clips/3.wav", seed=99)  # over an old manifest: nobody may take it for the new one
    assert [code for code, *_ in run_ranks(corpus, corpus / "ranks")] == [0, 0, 0]
    pack_tiny(corpus, corpus / "again")
    assert files_of(corpus / "again") == files_of(corpus / "ranks")


def test_ranks_come_to_the_same_verdict(corpus: Path) -> None:
    (corpus / "clips/5.wav").write_bytes(b"garbage")
    results = run_ranks(corpus, corpus / "ranks")
    assert [code for code, *_ in results] == [2, 2, 2], results
    assert len({stderr for *_, stderr in results}) == 1
    assert "a.jsonl:6: audio file 'clips/5.wav': is not WAV, FLAC, Ogg or MP3" in results[0][2]
    assert not (corpus / "ranks/asr/train/manifest.json").exists()


def test_kill_at_any_moment_then_equal_bytes(corpus: Path) -> None:
    pack_tiny(corpus, corpus / "whole")
    expected = files_of(corpus / "whole")
    moments = random.Random(0)
    command = [sys.executable, "tools/build_shards.py", "--jsonl", ",".join(map(str, corpus_files(corpus)))]
    command += ["--out", str(corpus / "out"), "--shard_mb", str(TINY_SHARDS / (1 << 20))]
    killed = 0
    for attempt in range(6):
        process = subprocess.Popen(command, cwd=ROOT, env=child_env(), stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list((corpus / "out").rglob("*"))) < 5 + 6 * attempt:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        for manifest in (corpus / "out").rglob("manifest.json"):
            assert records(manifest.parent)  # published means whole
    assert killed >= 3
    subprocess.run(command, cwd=ROOT, env=child_env(), check=True, capture_output=True)
    assert files_of(corpus / "out") == expected  # and no litter


def test_rejects_within_the_rate_are_accounted_for(corpus: Path) -> None:
    rows = (corpus / "a.jsonl").read_text().splitlines()
    rows[2] = (
        rows[2]
        .replace("문장".encode("unicode_escape").decode(), "x")
        .replace("clips/2.wav", "clips/none.wav")
    )
    rows[4] = '{"audio_path": "clips/4.wav", "transcript": '
    write_jsonl(corpus / "a.jsonl", rows)
    (corpus / "clips/7.wav").write_bytes(b"RIFF")
    folder = pack_tiny(corpus, corpus / "out", max_reject_rate=0.2)[0]
    stored = records(folder)
    assert sorted(r.key for r in stored) == [f"asr_{n:012d}" for n in range(17) if n not in (2, 4, 7)]
    assert json.loads((folder / "manifest.json").read_text())["rejected"] == 3
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [(r["source"], r["id"]) for r in rejects] == [
        ("a.jsonl:3", "c2"),
        ("a.jsonl:5", "a:5"),
        ("a.jsonl:8", "c7"),
    ]
    assert "does not exist" in rejects[0]["reason"] and "invalid JSON" in rejects[1]["reason"]
    with pytest.raises(UserError, match=r"a\.jsonl:3: .*3 of 17 asr rows are bad"):
        pack_tiny(corpus, corpus / "strict", max_reject_rate=0.17)

    write_clip(corpus / "clips/7.wav", 7)
    before = ShardSet.open(folder)
    pack_tiny(corpus, corpus / "out", max_reject_rate=0.2)
    after = ShardSet.open(folder)
    assert (
        len(after) == 15
        and sum(a != b for a, b in zip(before.shard_sha256, after.shard_sha256, strict=True)) == 1
    )
    assert len((folder / "rejects.jsonl").read_text().splitlines()) == 2
    rows[2], rows[4] = (json.dumps(row) for row in asr_rows(corpus, 5)[2::2])
    write_jsonl(corpus / "a.jsonl", rows)
    pack_tiny(corpus, corpus / "out")
    assert len(ShardSet.open(folder)) == 17 and not (folder / "rejects.jsonl").exists()


def test_reject_is_reconsidered_when_its_file_returns_as_it_was_scanned(corpus: Path) -> None:
    """The scan saw a file that was gone when it was packed: same build hash, but the marker must not hold."""
    clip, hidden = corpus / "clips/3.wav", corpus / "3.hidden"
    from voxtral_dist import packing

    original = packing._build_slice

    def vanish(*args: object) -> None:
        clip.rename(hidden)
        original(*args)  # type: ignore[arg-type]

    packing._build_slice = vanish  # type: ignore[assignment]
    try:
        with pytest.raises(UserError, match=r"a\.jsonl:4: audio file 'clips/3\.wav' does not exist"):
            pack_tiny(corpus, corpus / "out")
    finally:
        packing._build_slice = original
    hidden.rename(clip)
    assert len(ShardSet.open(pack_tiny(corpus, corpus / "out")[0])) == 17


def test_all_rows_bad_is_an_error_at_any_rate(tmp_path: Path) -> None:
    rows = [{"audio_path": f"{n}.wav", "transcript": "x"} for n in range(3)]
    with pytest.raises(UserError, match="3 of 3 asr rows are bad"):
        pack([write_jsonl(tmp_path / "a.jsonl", rows)], tmp_path / "out", max_reject_rate=1.0)


GOOD = {"audio_path": "clips/0.wav", "transcript": "fine"}
BAD_INPUT: dict[str, tuple[object, str]] = {
    "missing audio": (
        {"audio_path": "gone.wav", "transcript": "x"},
        "a.jsonl:2: audio file 'gone.wav' does not exist",
    ),
    "audio is a folder": (
        {"audio_path": "clips", "transcript": "x"},
        "a.jsonl:2: audio file 'clips' does not exist",
    ),
    "NUL in the path": ({"audio_path": "a\0b", "transcript": "x"}, "a.jsonl:2: "),
    "unreadable audio": (
        {"audio_path": "noise.wav", "transcript": "x"},
        "a.jsonl:2: audio file 'noise.wav': is not WAV, FLAC, Ogg or MP3",
    ),
    "empty transcript": (
        {"audio_path": "clips/0.wav", "transcript": "  "},
        "a.jsonl:2: field 'transcript' is empty",
    ),
    "invalid JSON": ('{"audio_path": "clips/0.wav",', "a.jsonl:2: invalid JSON ("),
    "NaN": ('{"audio_path": "clips/0.wav", "transcript": "x", "meta": NaN}', "a.jsonl:2: invalid JSON (NaN"),
    "no object": ("[1, 2]", "a.jsonl:2: a JSON list where an object belongs"),
    "nested": ("[" * 200_000, "a.jsonl:2: invalid JSON (nested too deep)"),
    "lone surrogate": ('{"audio_path": "clips/0.wav", "transcript": "\\ud800"}', "a.jsonl:2: "),
    "unknown key": ({**GOOD, "transcrpt": "x", "id": "2"}, "a.jsonl:2: unknown key 'transcrpt'"),
    "ambiguous": (
        {**GOOD, "answer": "x"},
        "a.jsonl:2: keys (answer, audio_path, transcript) fit asr and sqa",
    ),
    "no task": ({"question": "x"}, "a.jsonl:2: keys (question) fit no task"),
    "unknown task": ({**GOOD, "task": "ast"}, "a.jsonl:2: unknown task 'ast'"),
    "duplicate id": ({**GOOD, "id": "a:1"}, "a.jsonl:2: id 'a:1' is that of "),
}
FATAL = ("ambiguous", "no task", "unknown task", "duplicate id")


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_rows_end_in_one_line_and_exit_code_2(tmp_path: Path, name: str) -> None:
    row, expected = BAD_INPUT[name]
    write_clip(tmp_path / "clips/0.wav", 0)
    (tmp_path / "noise.wav").write_bytes(b"noise" * 100)
    good = [GOOD, *({**GOOD, "id": f"g{n}"} for n in range(8))]
    path = write_jsonl(tmp_path / "a.jsonl", [good[0], row, *good[1:]])
    result = cli("--jsonl", path, "--out", tmp_path / "out")
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and "Traceback" not in result.stderr
    assert expected in message
    written = {Path(name).name for name in files_of(tmp_path / "out")}
    assert "manifest.json" not in written
    if name in FATAL:
        assert not written
        with pytest.raises(UserError):
            pack([path], tmp_path / "out", max_reject_rate=0.5)
        return
    assert "1 of 10 asr rows are bad" in message
    assert len((tmp_path / "out/asr/train/rejects.jsonl").read_text().splitlines()) == 1
    if name != "unreadable audio":
        assert written == {"rejects.jsonl"}  # found by the scan: not a single tar was begun
    folder = pack([path], tmp_path / "out", max_reject_rate=0.1)[0]
    assert len(ShardSet.open(folder)) == 9


def test_first_bad_row_in_file_order_is_named(tmp_path: Path) -> None:
    rows = asr_rows(tmp_path, 30)
    for number in (21, 3, 17):
        (tmp_path / f"clips/{number}.wav").write_bytes(b"bad")
    a = write_jsonl(tmp_path / "z.jsonl", rows[:15])
    b = write_jsonl(tmp_path / "a.jsonl", rows[15:])
    with pytest.raises(UserError, match=r"z\.jsonl:4: .*3 of 30"):
        pack([a, b], tmp_path / "out", shard_bytes=TINY_SHARDS)
    sources = [json.loads(line)["source"] for line in (tmp_path / "out/asr/train/rejects.jsonl").open()]
    assert sources == ["z.jsonl:4", "a.jsonl:3", "a.jsonl:7"]


def test_unread_line_belongs_to_the_task_of_its_file(tmp_path: Path) -> None:
    rows: list = [*tqa_rows(4), "{broken"]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    assert pack([path], tmp_path / "out", max_reject_rate=0.3) == [tmp_path / "out/tqa/train"]
    with pytest.raises(UserError, match=r"t\.jsonl:5: invalid JSON"):  # two tasks: whose row is it?
        write_clip(tmp_path / "clips/0.wav", 0)
        pack([write_jsonl(path, [*rows, GOOD])], tmp_path / "mixed", max_reject_rate=0.3)


def test_scan_reports_places(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips/0.wav", 0)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n\xff\n" + json.dumps(GOOD).encode()
    )
    found = list(scan(path))
    assert [type(row) for row in found] == [ScannedRow, BadRow, ScannedRow]
    assert [row.place.line for row in found] == [1, 3, 4]
    assert [row.id for row in found] == ["a:1", "a:3", "a:4"]
    assert isinstance(found[1], BadRow) and "not UTF-8" in found[1].reason
    with pytest.raises(UserError, match="no such JSONL file"):
        list(scan(tmp_path / "none.jsonl"))
    path.write_bytes(b'{"question": "' + b"x" * (2 << 20))
    with pytest.raises(UserError, match="one object a line"):
        list(scan(path))


def test_named_tasks_settle_ambiguous_rows(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips/0.wav", 0)
    path = write_jsonl(
        tmp_path / "a.jsonl", [{**GOOD, "question": "who?", "answer": "x"}, {**GOOD, "task": "asr"}]
    )
    folders = pack([path], tmp_path / "out", tasks=["sqa"], split="dev")
    assert [str(folder.relative_to(tmp_path)) for folder in folders] == ["out/asr/dev", "out/sqa/dev"]
    assert ShardSet.open(folders[1]).sample(0).prompt == "who?"


def test_check_reads_only(corpus: Path) -> None:
    write_jsonl(corpus / "a.jsonl", [*asr_rows(corpus, 3), GOOD, GOOD | {"id": "c1"}, "{", {**GOOD, "x": 1}])
    (corpus / "clips/2.wav").write_bytes(b"noise")
    before = files_of(corpus)
    first, second = check(corpus_files(corpus), [None, None])
    assert dict(first.rows) == {"asr": 3} and first.bad == 4
    assert dict(second.rows) == {"asr": 5, "sqa": 4, "tqa": 6} and second.bad == 1
    assert first.keys["audio_path"] == 6 and first.keys["x"] == 1
    assert [error.split(": ")[0].split("/")[-1] for error in first.errors] == [
        "a.jsonl:3",
        "a.jsonl:5",
        "a.jsonl:6",
        "a.jsonl:7",
    ]
    result = cli("--jsonl", f"{corpus}/a.jsonl,{corpus}/b.jsonl", "--check")
    assert result.returncode == 2 and "a.jsonl:3: audio file 'clips/2.wav': " in result.stderr
    assert "3 asr" in result.stdout and "transcript (6)" in result.stdout
    assert files_of(corpus) == before
    write_clip(corpus / "clips/2.wav", 2)
    assert cli("--jsonl", corpus / "b.jsonl", "--check").returncode == 0


def wrong_flags(corpus: Path) -> dict[str, tuple[list[object], str]]:
    out = ["--out", corpus / "out"]
    a = ["--jsonl", corpus / "a.jsonl"]
    (corpus / "empty.jsonl").write_text("\n")
    return {
        "unknown flag": ([*a, *out, "--shard_size", 3], "--shard_size"),
        "no file": (["--jsonl", corpus / "none.jsonl", *out], "none.jsonl: no such JSONL file"),
        "empty file": (["--jsonl", corpus / "empty.jsonl", *out], "empty.jsonl: has no rows"),
        "no out": (a, "--out is missing"),
        "slice": ([*a, *out, "--slice", "2/2"], "0 <= I < N"),
        "rate": ([*a, *out, "--max_reject_rate", 2], "between 0 and 1"),
        "tasks": ([*a, *out, "--tasks", "asr,sqa"], "--tasks names 2 tasks for 1 files"),
        "unknown task": ([*a, *out, "--tasks", "ast"], "unknown task 'ast'"),
        "split": ([*a, *out, "--split", "../x"], "split '../x'"),
        "model": ([*a, *out, "--model_id", corpus], "the folder has no tekken.json"),
        "finalize": ([*a, *out, "--finalize"], "not built"),
    }


def test_wrong_flags_are_exit_code_2(corpus: Path) -> None:
    for name, (flags, expected) in wrong_flags(corpus).items():
        result = cli(*flags)
        assert result.returncode == 2, name
        assert expected in result.stderr.strip().splitlines()[-1] and "Traceback" not in result.stderr, name
    assert not (corpus / "out").exists()


def test_command_line_builds_slices_and_prints_a_table(corpus: Path) -> None:
    flags = ["--jsonl", f"{corpus}/a.jsonl,{corpus}/b.jsonl", "--shard_mb", TINY_SHARDS / (1 << 20)]
    for step in (["--slice", "1/2"], ["--slice", "0/2"], ["--finalize"]):
        result = cli(*flags, "--out", corpus / "out", *step)
        assert result.returncode == 0, result.stderr
    pack_tiny(corpus, corpus / "one")
    assert files_of(corpus / "one") == files_of(corpus / "out")
    lines = result.stdout.strip().splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["17", "5", "6"]


def test_line_that_changes_meanwhile_is_noticed(corpus: Path) -> None:
    from voxtral_dist.jsonl import load_row

    row = next(iter(scan(corpus / "a.jsonl")))
    assert isinstance(row, ScannedRow) and load_row(row)["id"] == "c0"
    text = (corpus / "a.jsonl").read_text()
    change: list[Callable[[str], str]] = [lambda t: t.replace("c0", "cX"), lambda t: "\n" + t, lambda t: ""]
    for edit in change:
        (corpus / "a.jsonl").write_text(edit(text))
        with pytest.raises(UserError, match=r"a\.jsonl:1: the line changed"):
            load_row(row)
