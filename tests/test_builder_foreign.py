"""Foreign WebDataset tars: indexed where they lie, read like ours; what is dangerous or ambiguous is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from test_packing import ROOT, child_env, files_of
from test_shards import crafted_flac, wav

from voxtral_dist.audio_file import decode
from voxtral_dist.data_stats import collect
from voxtral_dist.errors import UserError
from voxtral_dist.foreign import index_tars
from voxtral_dist.packing import pack
from voxtral_dist.shards import CorruptSampleError, ShardSet
from voxtral_dist.tar_members import walk
from voxtral_dist.verify import verify

FORMATS = {
    "flac": ("FLAC", "PCM_16", 16_000),
    "wav": ("WAV", "PCM_16", 44_100),
    "mp3": ("MP3", "MPEG_LAYER_III", 22_050),
    "ogg": ("OGG", "VORBIS", 16_000),
}
PAYLOAD = "cos\nsystem\n(S'touch {}'\ntR."


def tone(suffix: str, seconds: float = 0.3) -> bytes:
    container, subtype, rate = FORMATS[suffix]
    samples = 0.3 * np.sin(np.arange(int(seconds * rate)) * 0.1)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def words(text: str = "hello", **more: object) -> bytes:
    return json.dumps({"transcript": text, "language": "en", **more}).encode()


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(data))
    return path


def good(key: str, suffix: str = "flac", **row: object) -> list[tuple[str, bytes]]:
    return [(f"{key}.json", words(key, **row)), (f"{key}.{suffix}", tone(suffix))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars of four formats, of webdataset's writer and of tarfile's; keys with folders and Hangul."""
    with webdataset.TarWriter(str(tmp_path / "set-0.tar")) as writer:
        for number, suffix in enumerate(FORMATS):
            row = {"transcript": f"w{number}", "language": "en", "domain": "x", "id": f"row {number}"}
            writer.write({"__key__": f"utt{number}", "json": row, suffix: tone(suffix), "txt": "aside"})
    long = "화자/" + "발화" * 40  # over a hundred bytes: the name stands in a header of its own
    members = [("dir.a/k.FLAC", tone("flac")), ("dir.a/k.json", words("audio first")), *good(long, "wav")]
    write_tar(tmp_path / "set-1.tar", [("__meta__", b"{}"), *members, ("README", b"no key")])
    return tmp_path


def test_tars_become_a_data_set_in_place(folder: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.tar")}
    assert index_tars(folder, "asr", workers=2) == folder
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob("*.tar")} == before
    shards = ShardSet.open(folder)
    theirs = webdataset.WebDataset(sorted(str(p) for p in folder.glob("*.tar")), shardshuffle=False)
    samples = [sample for sample in theirs if "json" in sample]
    assert len(shards) == len(samples) == 6 and shards.foreign
    for number, sample in enumerate(samples):
        record = shards.read(number)
        suffix = next(suffix for suffix in FORMATS if suffix in sample)
        row = json.loads(sample["json"])
        assert (record.key, record.audio) == (sample["__key__"], sample[suffix])
        assert record.row["transcript"] == row["transcript"]
        assert len(decode(record.audio)) == shards.n_samples[number] == record.row["duration"] * 16_000
        words_only = shards.sample(number)
        assert words_only.id == row.get("id", record.key) and words_only.task == "asr"
        assert words_only.source == f"{Path(sample['__url__']).name}:{record.key}"
    assert verify(folder, deep=True, workers=2) == []
    stats = collect(folder)
    assert stats.rows == 6 and stats.languages == {"en": 6} and stats.domains == {"x": 4, "": 2}


def test_unchanged_tars_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_tars(folder, "asr")
    first = files_of(folder)
    monkeypatch.setattr("voxtral_dist.foreign_tar.decode", lambda data: 1 / 0)
    index_tars(folder, "asr")
    assert files_of(folder) == first
    write_tar(folder / "set-1.tar", good("other"))
    with pytest.raises(RuntimeError, match=r"set-1\.tar: other: ZeroDivisionError"):
        index_tars(folder, "asr")
    with pytest.raises(UserError, match="no manifest"):
        ShardSet.open(folder)


def test_text_task(tmp_path: Path) -> None:
    rows = [(f"q{n}.json", json.dumps({"question": f"{n}?", "answer": "a"}).encode()) for n in range(3)]
    write_tar(tmp_path / "t.tar", rows)
    shards = ShardSet.open(index_tars(tmp_path, "tqa", split="dev"))
    assert [shards.sample(n).prompt for n in range(3)] == ["0?", "1?", "2?"] and shards.split == "dev"
    assert shards.read(0).audio is None and verify(tmp_path, deep=True) == []


def test_damage_is_named(folder: Path) -> None:
    index_tars(folder, "asr")
    tar, shards = folder / "set-0.tar", ShardSet.open(folder)
    clean = tar.read_bytes()
    for number in range(4):
        at = clean.index(shards.read(number).audio or b"")
        for spot in (at - 512 + 5, at + 40, at - 512 + 150):
            tar.write_bytes(clean[:spot] + bytes([clean[spot] ^ 4]) + clean[spot + 1 :])
            with pytest.raises(CorruptSampleError) as caught:
                shards.read(number)
            assert caught.value.shard == tar.name and caught.value.key == f"utt{number}"
            faults = verify(folder, deep=True)
            assert len(faults) == 1 and f"{tar}: utt{number}: " in faults[0], faults


REFUSED = {
    "pickle": ([*good("a"), ("a.pkl", PAYLOAD.encode())], "'a.pkl' is a pickle"),
    "pyd": ([*good("a"), ("b.pyd", b"x")], "'b.pyd' is a pickle"),
    "pickle behind dots": ([*good("a"), ("a.x.PTH", b"x")], "'a.x.PTH' is a pickle"),
    "npy": ([("a.npy", b"x"), *good("a")], "is a pickle"),
    "apart": ([*good("a")[:1], *good("b"), *good("a")[1:]], "key 'a' comes again"),
    "twice": ([*good("a"), *good("b"), *good("a")], "key 'a' comes again"),
    "two of a kind": ([*good("a"), ("a.json", b"{}")], "key 'a' has two json members"),
    "two audio": ([*good("a"), ("a.wav", tone("wav"))], "key 'a' has two audio members"),
    "no audio": ([*good("a"), ("b.json", words())], "t.tar:b: has no audio member"),
    "no json": ([*good("a"), ("b.flac", tone("flac"))], "t.tar:b: has no json member, only audio"),
    "dots": (
        [*good("a"), ("b.json", words()), ("b.1.flac", tone("flac"))],
        "has no audio member, only 1.flac",
    ),
    "not JSON": ([*good("a"), ("b.json", b"{"), ("b.flac", tone("flac"))], "t.tar:b: invalid JSON"),
    "wrong row": (good("a", transcrpt="x"), "t.tar:a: unknown key 'transcrpt'"),
    "wrong task": (good("a", task="sqa"), "t.tar:a: its task is 'sqa'"),
    "same id": ([*good("a", id="x"), *good("b", id="x")], "t.tar:b: id 'x' is that of t.tar:a too"),
    "empty": ([], "no KEY.json members"),
    "cut FLAC": ([("a.json", words()), ("a.flac", tone("flac")[:200])], "t.tar:a: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path: Path, name: str) -> None:
    members, expected = REFUSED[name]
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(UserError) as caught:
        index_tars(tmp_path, "asr")
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


def test_cut_tar_is_refused(tmp_path: Path) -> None:
    """Wherever it is cut; webdataset and tarfile read what is left and say nothing."""
    tar = write_tar(tmp_path / "t.tar", [*good("a"), *good("b")])
    clean = tar.read_bytes()
    with tar.open("rb") as file:
        members = list(walk(file, len(clean)))
    for member in members:
        for cut in (member.start + 512, member.content, member.end - 1, member.end):
            tar.write_bytes(clean[:cut])
            with pytest.raises(UserError, match=r"t\.tar: .*(ends at byte|no tar header)"):
                index_tars(tmp_path, "asr", max_reject_rate=0.9)


def test_bad_rows_within_the_rate_are_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", [*good("a"), ("b.json", words()), *good("c"), *good("d", "wav")])
    with pytest.raises(UserError, match="1 of 4 rows are bad"):
        index_tars(tmp_path, "asr", max_reject_rate=0.2)
    shards = ShardSet.open(index_tars(tmp_path, "asr", max_reject_rate=0.25))
    assert [shards.read(n).key for n in range(3)] == ["a", "c", "d"]
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["id"] == "b"
    assert verify(tmp_path, deep=True) == []


def test_nothing_of_others_is_overwritten(folder: Path) -> None:
    (folder / "set-0.json").write_text('{"__kind__": "wids"}')
    with pytest.raises(UserError, match=r"set-0\.json: exists and is not of this program"):
        index_tars(folder, "asr")
    (folder / "set-0.json").unlink()
    index_tars(folder, "asr")
    (folder / "rows.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    inside = folder.parent / "packed/tqa/train"
    inside.parent.mkdir(parents=True)
    folder.rename(inside)
    before = files_of(inside)
    with pytest.raises(UserError, match="indexed, not built"):
        pack([inside / "rows.jsonl"], inside.parent.parent)
    assert files_of(inside) == before
    built = pack([inside / "rows.jsonl"], inside.parent / "own")[0]
    with pytest.raises(UserError, match="build_shards built this data set"):
        index_tars(built, "tqa")


def gzip_bomb(folder: Path, marker: Path) -> None:
    with gzip.open(folder / "t.tar", "wb", compresslevel=1) as file:
        for _ in range(512):
            file.write(bytes(1 << 20))


def lying_size(folder: Path, marker: Path) -> None:
    """A header that claims 8 GiB, with no body."""
    info = tarfile.TarInfo("a.json")
    info.size = (8 << 30) - 1
    (folder / "t.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))


def member(suffix: str, data: bytes):
    return lambda folder, marker: write_tar(folder / "t.tar", [("a.json", words()), (f"a.{suffix}", data)])


def pickled(folder: Path, marker: Path) -> None:
    write_tar(folder / "t.tar", [*good("a"), ("a.pyd", PAYLOAD.format(marker).encode())])


def pipe_tar(folder: Path, marker: Path) -> None:
    write_tar(folder / "t.tar", good("a")).rename(folder / f"pipe:touch {marker.name};.tar")


BOMBS = {
    "FLAC of 256 GiB": (member("flac", crafted_flac((1 << 36) - 1)), "minutes of audio, at most"),
    "1000 channels": (member("wav", wav(np.zeros((50, 1000)))), "1000 channels"),
    "NaN": (member("wav", wav(np.array([0.0, np.nan]), subtype="FLOAT")), "NaN or infinite"),
    "gzip": (gzip_bomb, "compressed with gzip"),
    "8 GiB": (lying_size, "ends at byte"),
    "pickle": (pickled, "is a pickle"),
    "pipe": (pipe_tar, "take for a URL"),
}

MEASURED = """
import resource, sys
from voxtral_dist.errors import run_main
from voxtral_dist.foreign import index_tars
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    index_tars(sys.argv[1], "asr")
except Exception as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, type(error).__name__, error)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_cost(tmp_path: Path, name: str) -> None:
    make, expected = BOMBS[name]
    marker, folder = tmp_path / "executed", tmp_path / "in"
    folder.mkdir()
    make(folder, marker)
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder)],
        cwd=tmp_path,
        env=child_env(),
        capture_output=True,
        text=True,
        check=True,
    )
    rise_kib, kind, message = result.stdout.split(" ", 2)
    assert kind == "UserError" and expected in message, result.stdout
    assert int(rise_kib) < 200_000
    assert not marker.exists() and not (folder / "executed").exists() and not (ROOT / "executed").exists()
    assert not (folder / "manifest.json").exists()
    assert {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")
    } == hashes


def test_pipe_names_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for refuses in (lambda name: index_tars(name, "asr"), ShardSet.open, lambda name: pack([name], "out")):
        with pytest.raises(UserError):
            refuses("pipe:touch executed; cat a.tar")
    write_tar(tmp_path / "in/t.tar", good("a"))
    index_tars(tmp_path / "in", "asr")
    manifest = json.loads((tmp_path / "in/manifest.json").read_text())
    manifest["shards"][0]["name"] = "pipe:touch executed;.tar"
    (tmp_path / "in/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged manifest"):
        ShardSet.open(tmp_path / "in")
    assert not list(tmp_path.rglob("executed*"))


def test_command_line(folder: Path) -> None:
    def cli(*flags: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/build_shards.py", *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=child_env(), check=False)

    for flags, expected in (
        (("--index_only", folder), "--task is missing"),
        (("--index_only", folder, "--task", "ast"), "unknown task 'ast'"),
        (("--index_only", folder, "--task", "asr", "--out", "x"), "leave out --out"),
        (("--task", "asr", "--jsonl", "x"), "--task belongs to --index_only"),
        (("--index_only", folder / "none", "--task", "asr"), "is no folder"),
    ):
        result = cli(*flags)
        assert result.returncode == 2 and expected in result.stderr and "Traceback" not in result.stderr
    result = cli("--index_only", folder, "--task", "asr", "--split", "dev", "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1].split()[:2] == [str(folder), "6"]
