"""Building in parallel: the same bytes for any number of workers, kills and races; errors that name the row."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_packing import asr_rows, child_env, files_of, records, tqa_rows, write_clip, write_jsonl

from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.packing import pack
from voxtral_dist.shards import ShardSet
from voxtral_dist.verify import verify
from voxtral_dist.workers import Tick, run_jobs

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 30_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 spoken and 30 written rows, which make about 12 shards."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", [*asr_rows(folder, 60), *tqa_rows(30)])
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path) -> dict[str, bytes]:
    """The files that one process writes."""
    pack([corpus / "a.jsonl"], corpus / "expected", shard_bytes=SHARD_BYTES)
    return files_of(corpus / "expected")


def command(corpus: Path, out: Path, *flags: object) -> list[str]:
    script = [sys.executable, "tools/build_shards.py", "--jsonl", str(corpus / "a.jsonl"), "--out", str(out)]
    return [*script, "--shard_mb", str(SHARD_BYTES / (1 << 20)), *map(str, flags)]


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=ROOT, env=child_env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    assert sum(name.endswith(".tar") for name in expected) > 6
    pack([corpus / "a.jsonl"], tmp_path, shard_bytes=SHARD_BYTES, workers=workers)
    assert files_of(tmp_path) == expected


def test_builders_that_race_on_the_same_slice_do_no_harm(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    for lead_s in (0.0, 0.15):
        out = tmp_path / str(lead_s)
        builders = []
        for _ in range(2):
            builders.append(start(command(corpus, out, "--workers", 2)))
            time.sleep(lead_s)
        for builder in builders:
            _, stderr = builder.communicate(timeout=120)
            assert builder.returncode == 0, stderr
        assert files_of(out) == expected


def kill_at_random(corpus: Path, out: Path, moments: int, seed: int) -> int:
    """Start a build and SIGKILL it, again and again, at moments spread over its work; how many were killed."""
    draw, killed = random.Random(seed), 0
    for _ in range(moments):
        before = len(files_of(out)) if out.exists() else 0
        builder = start(command(corpus, out, "--workers", draw.choice([1, 2])))
        while builder.poll() is None and (len(list(out.rglob("*"))) if out.exists() else 0) <= before:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        builder.send_signal(signal.SIGKILL)
        builder.communicate(timeout=60)
        killed += builder.returncode == -signal.SIGKILL
        for manifest in out.rglob("manifest.json"):
            assert verify(manifest.parent, deep=True) == []  # published means whole
    return killed


def assert_kills_do_no_harm(corpus: Path, expected: dict[str, bytes], out: Path, rounds: int) -> int:
    """Rounds of three kills and a run to the end."""
    killed = 0
    for number in range(rounds):
        killed += kill_at_random(corpus, out / str(number), 3, seed=number)
        last = start(command(corpus, out / str(number), "--workers", 2))
        _, stderr = last.communicate(timeout=120)
        assert last.returncode == 0, stderr
        assert files_of(out / str(number)) == expected  # and no litter
    return killed


def test_three_kills_then_the_same_bytes(corpus: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    assert assert_kills_do_no_harm(corpus, expected, tmp_path, rounds=1) >= 1


@pytest.mark.slow
def test_twenty_kills_then_the_same_bytes(corpus: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    killed = assert_kills_do_no_harm(corpus, expected, tmp_path, rounds=8)
    print(f"{killed} of 24 builds were killed while they worked")
    assert killed >= 20


def processes_of(folder: Path) -> list[str]:
    """Workers of builds that run now and have a file of ``folder`` open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            for entry in (process / "fd").iterdir():
                with suppress(OSError):  # it has closed the file
                    found.append(os.readlink(entry))
    return [target for target in found if target.startswith(str(folder))]


def test_killed_build_leaves_no_workers(tmp_path: Path) -> None:
    rows = asr_rows(tmp_path, 40)
    for row in rows:
        path = tmp_path / row["audio_path"]
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16_000 * 60), 16_000, subtype="PCM_16")
    write_jsonl(tmp_path / "a.jsonl", rows)
    out = tmp_path / "out"
    builder = start(command(tmp_path, out, "--workers", 2, "--shard_mb", 10))
    while builder.poll() is None and len(processes_of(out)) < 2:
        time.sleep(0.01)
    assert builder.poll() is None
    builder.kill()
    builder.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while processes_of(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(out) == []


SMALL_FILES = """
import resource, signal, sys
from voxtral_dist.errors import run_main
from voxtral_dist.packing import pack

if __name__ == "__main__":
    folder, workers = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    run_main(lambda: pack([folder + "/a.jsonl"], folder + "/out", shard_bytes=20_000, workers=workers))
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_full_disk_in_a_worker_is_one_line_with_file_and_row(tmp_path: Path, workers: int) -> None:
    """The disk is full at one long clip: line 18."""
    rows = asr_rows(tmp_path, 30)
    write_clip(tmp_path / "clips/17.wav", 17, seconds=5)
    write_jsonl(tmp_path / "a.jsonl", rows)
    script = tmp_path / "build.py"
    script.write_text(SMALL_FILES)
    builder = start([sys.executable, str(script), str(tmp_path), str(workers)])
    _, stderr = builder.communicate(timeout=120)
    assert builder.returncode == 1 and "Traceback" not in stderr, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "a.jsonl:18: " in line and "File too large" in line, line
    assert not list((tmp_path / "out").rglob("manifest.json"))
    assert not list((tmp_path / "out").rglob("*.tmp-*"))


def _dies(job: int, tick: Tick) -> int:
    tick(f"rows.jsonl:{job}")
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return job


def _fails(job: int, tick: Tick) -> int:
    for row in range(6000):
        tick(f"rows.jsonl:{row}")
        if job == 1 and row == 5:
            raise OSError("the disk is gone")
        if job == 2 and row == 5:
            raise KeyError("a bug")
        time.sleep(0.01)
    return job


def _squares(job: int, tick: Tick) -> int:
    tick("here")
    return job * job


def run(function, jobs: list[int], workers: int) -> list[int]:
    return run_jobs(function, jobs, workers=workers, desc="", unit="", total=len(jobs), progress=False)


def test_dead_worker_is_told_with_the_rows_at_hand() -> None:
    with pytest.raises(VoxtralDistError, match=r"a worker process died .*rows\.jsonl:3"):
        run(_dies, list(range(6)), 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_first_error_ends_all_jobs_at_once(workers: int) -> None:
    begun = time.monotonic()
    with pytest.raises(VoxtralDistError, match=r"rows\.jsonl:5: the disk is gone"):
        run(_fails, [1, 3, 4], workers)
    with pytest.raises(RuntimeError, match=r"rows\.jsonl:5: KeyError: 'a bug'"):
        run(_fails, [2, 3, 4], workers)
    assert time.monotonic() - begun < 40  # one job alone takes a minute
    assert run(_squares, [3, 1, 2], workers) == [9, 1, 4]


def test_one_broken_row_in_ten_is_accounted_for_exactly(tmp_path: Path) -> None:
    rows: list = asr_rows(tmp_path, 60)
    odd_ids = ["spk.1/utt.2", "../../etc/passwd", "한국어.발화", "a b\tc", "pipe:touch x", "-rf"]
    for number, id_ in enumerate(odd_ids):
        rows[7 + number]["id"] = id_
    bad = {3: "missing", 13: "cut", 23: "json", 33: "empty file", 43: "no samples", 53: "noise"}
    for number, kind in bad.items():
        path = tmp_path / f"clips/{number}.wav"
        if kind == "missing":
            path.unlink()
        elif kind == "json":
            rows[number] = '{"audio_path": "clips/23.wav", "transcript": }'
        elif kind == "cut":
            samples = np.random.default_rng(0).normal(0, 0.1, 8_000)
            soundfile.write(tmp_path / "cut.flac", samples, 16_000)
            whole = (tmp_path / "cut.flac").read_bytes()
            (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
            rows[number]["audio_path"] = "cut.flac"
        else:
            path.write_bytes({"empty file": b"", "noise": b"noise" * 100}.get(kind, b""))
            if kind == "no samples":
                soundfile.write(path, np.zeros(0), 16_000, subtype="PCM_16")
    write_jsonl(tmp_path / "a.jsonl", rows)
    for shard_bytes in (1, 20_000):  # one example a shard, and several
        out = tmp_path / f"out{shard_bytes}"
        options = {"shard_bytes": shard_bytes, "workers": 2}
        with pytest.raises(UserError, match="6 of 60 asr rows are bad"):
            pack([tmp_path / "a.jsonl"], out, max_reject_rate=0.099, **options)
        folder = pack([tmp_path / "a.jsonl"], out, max_reject_rate=0.1, **options)[0]
        rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
        assert [reject["source"] for reject in rejects] == [f"a.jsonl:{n + 1}" for n in sorted(bad)]
        stored = records(folder)
        assert sorted(r.key for r in stored) == [f"asr_{n:012d}" for n in range(60) if n not in bad]
        ids = {record.key: record.row["id"] for record in stored}
        assert [ids[f"asr_{7 + n:012d}"] for n in range(6)] == odd_ids
        assert verify(folder, deep=True, workers=2) == []
        if shard_bytes == 1:
            assert ShardSet.open(folder).shard_sizes.max() == 1
    assert not Path("x").exists()


def test_clip_of_one_sample_is_kept(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips/0.wav", 0, seconds=1 / 16_000)
    path = write_jsonl(tmp_path / "a.jsonl", [{"audio_path": "clips/0.wav", "transcript": "x"}])
    folder = pack([path], tmp_path / "out")[0]
    assert ShardSet.open(folder).n_samples.tolist() == [1] and verify(folder, deep=True) == []
