"""The shard format: what is written is read back, by us and by webdataset; what is damaged or hostile is refused."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from voxtral_dist import atomic, audio_file
from voxtral_dist.audio_file import AudioError, decode, probe, to_flac
from voxtral_dist.errors import UserError
from voxtral_dist.shard_format import columns_bytes, example_key, make_manifest, read_columns, write_shard
from voxtral_dist.shards import CorruptSampleError, ShardSet, _reader

ROOT = Path(__file__).resolve().parent.parent


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def flac(seconds: float) -> tuple[bytes, int]:
    buffer = io.BytesIO()
    samples = tone(seconds)
    soundfile.write(buffer, samples, 16_000, format="FLAC", subtype="PCM_16")
    return buffer.getvalue(), len(samples)


def asr_row(number: int) -> dict[str, object]:
    return {
        "id": f"clip-{number}",
        "task": "asr",
        "audio_path": f"clips/{number}.wav",
        "transcript": f"안녕하세요 {number}\u2028",
        "language": "KO",
        "meta": {"x": [1, None]},
        "source": f"a.jsonl:{number + 1}",
        "duration": 0.5,
    }


def make_examples(sizes: list[int]) -> list[list[tuple]]:
    ordinals = iter(range(sum(sizes)))
    return [
        [(example_key("asr", n), asr_row(n), *flac(0.1 + 0.05 * n)) for n in _take(ordinals, size)]
        for size in sizes
    ]


def _take(ordinals, size: int) -> list[int]:
    return [next(ordinals) for _ in range(size)]


def write_data_set(folder: Path, shards: list[list[tuple]]) -> ShardSet:
    folder.mkdir(parents=True, exist_ok=True)
    markers = [write_shard(folder, f"asr-train-{n:06d}", iter(rows)) for n, rows in enumerate(shards)]
    atomic.write_json(folder / "manifest.json", make_manifest("asr", "train", markers, 0))
    return ShardSet.open(folder)


@pytest.fixture
def data_set(tmp_path: Path) -> ShardSet:
    return write_data_set(tmp_path / "set", make_examples([3, 0, 2]))


def test_reads_back_what_was_written(data_set: ShardSet) -> None:
    written = [example for shard in make_examples([3, 0, 2]) for example in shard]
    assert len(data_set) == 5
    assert data_set.shard_sizes.tolist() == [3, 0, 2]
    assert data_set.n_samples.tolist() == [example[3] for example in written]
    assert data_set.audio_seconds == sum(example[3] for example in written) / 16_000
    for index, (key, row, audio, n_samples) in enumerate(written):
        record = data_set.read(index)
        assert (record.key, record.row, record.audio) == (key, row, audio)
        assert decode(record.audio).shape == (n_samples,)
    sample = data_set.sample(3)
    assert (sample.id, sample.task, sample.language, sample.source) == ("clip-3", "asr", "ko", "a.jsonl:4")
    assert sample.references == ("안녕하세요 3\u2028",)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            data_set.read(index)


def test_webdataset_reads_the_same_in_file_order(data_set: ShardSet) -> None:
    urls = [str(data_set.folder / name) for name in data_set.shard_names]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(theirs) == len(data_set)
    for index, sample in enumerate(theirs):
        record = data_set.read(index)
        assert sample["__key__"] == record.key
        assert json.loads(sample["json"]) == record.row
        assert sample["flac"] == record.audio


def test_tar_is_plain_ustar_with_fixed_fields(data_set: ShardSet) -> None:
    path = data_set.folder / "asr-train-000000.tar"
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:2]] == ["asr_000000000000.json", "asr_000000000000.flac"]
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname, m.type) for m in members} == {
        (0, 0, 0, 0o644, "", "", tarfile.REGTYPE)
    }
    assert not any(m.pax_headers for m in members)
    blocks = sum(512 + -(-m.size // 512) * 512 for m in members)
    assert path.stat().st_size == -(-(blocks + 1024) // 10_240) * 10_240
    assert path.read_bytes()[257:265] == b"ustar\x0000"


def test_equal_examples_give_equal_bytes(data_set: ShardSet, tmp_path: Path) -> None:
    again = write_data_set(tmp_path / "again", make_examples([3, 0, 2]))
    assert again.fingerprint == data_set.fingerprint
    names = sorted(path.name for path in data_set.folder.iterdir())
    assert names == sorted(path.name for path in again.folder.iterdir())
    for name in names:
        assert (again.folder / name).read_bytes() == (data_set.folder / name).read_bytes(), name


def test_text_rows_have_no_audio(tmp_path: Path) -> None:
    row = {
        "id": "q",
        "task": "tqa",
        "question": "2+2?",
        "answer": ["4", "four"],
        "source": "t.jsonl:1",
        "duration": 0.0,
    }
    shards = write_data_set(tmp_path, [[(example_key("tqa", 0), row, None, 0)]])
    assert shards.read(0).audio is None
    assert shards.sample(0).references == ("4", "four")
    assert shards.n_samples.tolist() == [0]


def test_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    def broken():
        yield from make_examples([2])[0]
        raise RuntimeError("source fails")

    write_shard(tmp_path, "asr-train-000000", make_examples([1])[0])
    before = (tmp_path / "asr-train-000000.tar").read_bytes()
    with pytest.raises(RuntimeError, match="source fails"):
        write_shard(tmp_path, "asr-train-000000", broken())
    assert (tmp_path / "asr-train-000000.tar").read_bytes() == before
    assert not (tmp_path / "asr-train-000000.json").exists()  # the old marker must not vouch for what follows
    assert not list(tmp_path.glob("*.tmp-*"))
    with pytest.raises(ValueError, match="key"):
        write_shard(tmp_path, "asr-train-000001", [("spk1.utt1", {}, None, 0)])


def test_every_flipped_byte_is_noticed(data_set: ShardSet) -> None:
    path = data_set.folder / "asr-train-000000.tar"
    clean = path.read_bytes()
    columns, _ = read_columns(path.with_suffix(".idx"))
    json_at, audio_at = int(columns["json_offset"][1]), int(columns["audio_offset"][1])
    spots = {
        "json body": (json_at + 5, "asr_000000000001"),
        "audio body": (audio_at + 700, "asr_000000000001"),
        "json header": (json_at - 512 + 3, "example 1"),
        "audio header": (audio_at - 512 + 150, "asr_000000000001"),
    }
    for where, (offset, key) in spots.items():
        damaged = bytearray(clean)
        damaged[offset] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CorruptSampleError) as caught:
            data_set.read(1)
        assert (caught.value.shard, caught.value.key) == (path.name, key), where
        assert path.name in str(caught.value) and key in str(caught.value)
        assert data_set.read(0).key and data_set.read(2).key
        if where.startswith("audio"):
            assert data_set.sample(1).id == "clip-1"  # words are readable without the audio
    path.write_bytes(clean[: audio_at + 10])
    with pytest.raises(CorruptSampleError):
        data_set.read(1)


def test_other_members_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    payload = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    write_data_set(tmp_path, make_examples([1]))
    tar = tmp_path / "asr-train-000000.tar"
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in (("asr_000000000000.json", b"{}"), ("asr_000000000000.pkl", payload)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    hostile = json.loads((tmp_path / "asr-train-000000.json").read_text())
    columns = {name: np.array(values) for name, values in read_columns(tar.with_suffix(".idx"))[0].items()}
    columns["json_size"][0], columns["audio_size"][0], columns["audio_offset"][0] = 2, len(payload), 1536
    columns["json_crc32"][0] = __import__("zlib").crc32(b"{}")
    rewrite(tmp_path, tar, columns, hostile)
    with pytest.raises(CorruptSampleError, match=r"\.pkl"):
        ShardSet.open(tmp_path).read(0)
    assert not marker.exists()
    columns["audio_size"][0] = 1 << 31  # refused before it allocates
    rewrite(tmp_path, tar, columns, hostile)
    with pytest.raises(CorruptSampleError, match="limits"):
        ShardSet.open(tmp_path).read(0)
    columns["audio_offset"][0] = 1 << 40  # far behind the end
    columns["audio_size"][0] = 2
    rewrite(tmp_path, tar, columns, hostile)
    with pytest.raises(CorruptSampleError, match="no tar header"):
        ShardSet.open(tmp_path).read(0)


def rewrite(folder: Path, tar: Path, columns: dict[str, np.ndarray], marker: dict) -> None:
    """A hostile data set whose hashes are all in order."""
    import hashlib

    index = columns_bytes(columns, {"schema": "x"})
    tar.with_suffix(".idx").write_bytes(index)
    marker.update(bytes=tar.stat().st_size, sha256=hashlib.sha256(tar.read_bytes()).hexdigest())
    marker.update(index_bytes=len(index), index_sha256=hashlib.sha256(index).hexdigest())
    atomic.write_json(folder / "manifest.json", make_manifest("asr", "train", [marker], 0))


def test_open_names_what_is_wrong(data_set: ShardSet) -> None:
    folder, first = data_set.folder, data_set.folder / "asr-train-000000.tar"
    manifest = json.loads((folder / "manifest.json").read_text())

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            ShardSet.open(folder)

    def with_manifest(**changes: object) -> None:
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    with_manifest(schema="voxtral-dist/shards/9")
    refused("shards/9")
    with_manifest(shards=manifest["shards"][:1])
    refused("damaged manifest")
    with_manifest(
        shards=[{**manifest["shards"][0], "name": "../../etc-train-000000.tar"}, *manifest["shards"][1:]]
    )
    refused("damaged manifest")
    (folder / "manifest.json").write_text('{"schema": ')
    refused("damaged manifest")
    with_manifest()
    clean = first.read_bytes()
    first.write_bytes(clean[:-512])
    refused(r"asr-train-000000.tar has \d+ bytes where the manifest says \d+")
    first.unlink()
    refused("asr-train-000000.tar is missing")
    first.write_bytes(clean)
    (folder / "manifest.json").unlink()
    refused("no manifest: not a finished data set, run build_shards")


def test_damaged_index_is_refused(data_set: ShardSet) -> None:
    path = data_set.folder / "asr-train-000002.idx"
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"asr-train-000002\.idx: damaged"):
        _ = data_set.n_samples
    with pytest.raises(UserError, match=r"asr-train-000002\.idx: damaged"):
        data_set.read(4)
    assert data_set.read(0).key
    for junk in (b"", b"\xff" * 64, (20).to_bytes(8, "little") + b'{"a": [1, 2, 3]}    '):
        path.write_bytes(junk)
        with pytest.raises(UserError, match="damaged index"):
            read_columns(path)


def test_threads_read_the_same_and_descriptors_close(data_set: ShardSet) -> None:
    expected = [data_set.read(index) for index in range(5)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda index: data_set.read(index % 5), range(200))) == expected * 40
    reader = _reader(
        data_set.folder / data_set.shard_names[0], data_set.shard_sha256[0], data_set._index_sha256[0], ""
    )
    _reader.cache_clear()
    assert reader.example(1, with_audio=True) == expected[1]  # evicted while in use
    descriptor = reader.descriptor
    del reader
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_temporaries_of_the_dead_are_swept_those_of_the_living_stay(tmp_path: Path) -> None:
    (tmp_path / "a.tar.tmp-1-00ff").write_bytes(b"litter")
    with atomic.replacing(tmp_path / "b.tar", private=True) as file:
        file.write(b"x")
        atomic.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b.tar"]
    assert (tmp_path / "b.tar").stat().st_mode & 0o777 == 0o600
    with pytest.raises(atomic.VoxtralDistError, match=r"c\.tar"):
        atomic.wait_for(lambda: ["c.tar"], poll_s=0.01, patience_s=0.05)


def test_modules_are_light() -> None:
    code = (
        "import sys, voxtral_dist.packing, voxtral_dist.lengths, voxtral_dist.tokenizer;"
        "print([m for m in ('torch', 'transformers', 'mistral_common', 'webdataset') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# audio


@pytest.mark.parametrize(
    ("name", "container", "subtype", "rate", "channels"),
    [
        ("a.wav", "WAV", "FLOAT", 44_100, 2),
        ("a.wav", "WAV", "ULAW", 8_000, 1),
        ("a.wav", "WAVEX", "PCM_24", 48_000, 8),
        ("a.flac", "FLAC", "PCM_24", 22_050, 1),
        ("a.ogg", "OGG", "VORBIS", 44_100, 1),
        ("a.opus", "OGG", "OPUS", 48_000, 2),
        ("a.mp3", "MP3", "MPEG_LAYER_III", 44_100, 2),
    ],
)
def test_accepted_formats_become_the_same_tone(
    tmp_path: Path, name: str, container: str, subtype: str, rate: int, channels: int
) -> None:
    path = tmp_path / name
    soundfile.write(path, np.stack([tone(1.0, rate)] * channels, 1), rate, format=container, subtype=subtype)
    assert abs(probe(path) - 1.0) < 0.1
    samples = decode(path)
    assert samples.dtype == np.float32 and abs(len(samples) - 16_000) < 1_600
    assert np.array_equal(samples, decode(path.read_bytes()))
    middle = samples[4_000:12_000]
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() * 2 == 440
    assert abs(np.sqrt(np.mean(middle**2)) - 0.5 / np.sqrt(2)) < 0.02
    data, n_samples = to_flac(path)
    info = soundfile.info(io.BytesIO(data))
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
    assert info.frames == n_samples == len(samples)
    assert np.abs(decode(data) - np.clip(samples, -1, 1)).max() <= 0.5 / 32768 + 1e-7


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(0.2), tone(0.2, hertz=700.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    assert np.allclose(decode(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)


def test_sixteen_bit_samples_stay_exact_and_flac_passes_untouched(tmp_path: Path) -> None:
    integers = np.random.default_rng(0).integers(-32768, 32768, 4_000).astype(np.int16)
    integers[:2] = -32768, 32767
    soundfile.write(tmp_path / "a.wav", integers, 16_000, subtype="PCM_16")
    data, n_samples = to_flac(tmp_path / "a.wav")
    assert n_samples == 4_000
    assert np.array_equal(soundfile.read(io.BytesIO(data), dtype="int16")[0], integers)
    with soundfile.SoundFile(tmp_path / "b.flac", "w", 16_000, 1, "PCM_16") as file:
        file.title = "what another encoder would not write"
        file.write(integers)
    assert to_flac(tmp_path / "b.flac") == ((tmp_path / "b.flac").read_bytes(), 4_000)


def crafted_flac(total_samples: int) -> bytes:
    """A FLAC whose header states another length: 36 bits at bit 108 of STREAMINFO."""
    data = bytearray(flac(0.2)[0])
    word = struct.unpack(">Q", data[18:26])[0]
    data[18:26] = struct.pack(">Q", word >> 36 << 36 | total_samples)
    return bytes(data)


def wav(samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def aiff() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(0.1), 16_000, format="AIFF", subtype="PCM_16")
    return buffer.getvalue()


def with_rate(data: bytes, rate: int) -> bytes:
    return data[:24] + rate.to_bytes(4, "little") + data[28:]


HOSTILE = {
    "1000 channels": (lambda: wav(np.zeros((50, 1000))), "1000 channels"),
    "NaN": (lambda: wav(np.array([0.0, np.nan, 0.0]), subtype="FLOAT"), "NaN"),
    "infinity": (lambda: wav(np.array([0.0, np.inf, 0.0]), subtype="FLOAT"), "NaN or infinite"),
    "integers as floats": (lambda: wav(tone(0.1) * 32768, subtype="FLOAT"), "floating-point audio lies in"),
    "FLAC of 256 GiB": (lambda: crafted_flac((1 << 36) - 1), "minutes of audio"),
    "FLAC of unknown length": (lambda: crafted_flac(0), "length|no samples|cannot be decoded"),
    "FLAC that promises more": (lambda: crafted_flac(10_000), "truncated|cannot be decoded"),
    "FLAC cut": (lambda: flac(0.5)[0][:-300], "truncated|cannot be decoded"),
    "WAV cut": (lambda: wav(tone(1.0))[:16_000], "truncated: 16000 of 32044 bytes"),
    "WAV without samples": (lambda: wav(np.zeros(0)), "no samples"),
    "one sample at 192 kHz": (lambda: wav(np.zeros(1), 192_000), "no samples"),
    "ADPCM": (lambda: wav(tone(0.5), subtype="IMA_ADPCM"), "codec 0x0011"),
    "2 GHz": (lambda: with_rate(wav(tone(0.1)), (1 << 31) - 1), "sampling rate"),
    "100 Hz": (lambda: wav(tone(0.1), 100), "sampling rate"),
    "41 minutes": (lambda: wav(np.zeros(41 * 60 * 4_000, np.int16), 4_000, "PCM_U8"), "41.0 minutes"),
    "AIFF": (aiff, "not WAV, FLAC, Ogg or MP3"),
    "empty file": (lambda: b"", "empty"),
    "garbage": (lambda: b"garbage" * 100, "not WAV, FLAC, Ogg or MP3"),
    "garbage in a FLAC": (lambda: b"fLaC" + b"\xff" * 500, "cannot be decoded"),
    "WAV header alone": (lambda: b"RIFF\xff\xff\xff\xffWAVE", "format chunk"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_audio_is_refused_before_it_costs(tmp_path: Path, name: str) -> None:
    make, reason = HOSTILE[name]
    data = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AudioError, match=reason):
        decode(data)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(AudioError, match=reason):
        to_flac(tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_streamed_wav_with_placeholder_sizes_is_accepted() -> None:
    data = bytearray(wav(tone(0.5)))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert len(decode(bytes(data))) == 8_000


def test_large_files_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.wav"
    with path.open("wb") as file:
        file.truncate(2 << 30)  # sparse
    for function in (decode, to_flac, probe):
        with pytest.raises(AudioError, match="bytes"):
            function(path)
    monkeypatch.setattr(audio_file, "MAX_DECODED_BYTES", 1_000)
    with pytest.raises(AudioError, match="too many bytes"):
        decode(wav(tone(1.0)))
