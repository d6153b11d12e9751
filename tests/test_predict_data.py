"""What is predicted: any mixture of rows and files, every piece once, long recordings cut and read without loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from harness import ROOT

from voxtral_dist import evaluator
from voxtral_dist import model as modeling
from voxtral_dist.audio import AudioSpec, log_mel
from voxtral_dist.audio_file import AudioError, Samples, decode, read_mono, resampled_length, to_16k, to_flac
from voxtral_dist.batch import DecodeCaps
from voxtral_dist.collator import Collator
from voxtral_dist.decode_share import DecodeSettings
from voxtral_dist.errors import UserError
from voxtral_dist.mpeg import count_frames
from voxtral_dist.plan import Int64
from voxtral_dist.predict_data import PredictData
from voxtral_dist.recordings import measure, read_piece
from voxtral_dist.tokenizer import TekkenVocabulary

RATE = 16_000
MAX_LEN = 128
CAPS = DecodeCaps(rows=4, tokens=300)
BANK = ROOT / "shards/demo/bank"

FORMATS = {".wav": "PCM_16", ".flac": "PCM_16", ".ogg": "VORBIS", ".opus": "OPUS", ".mp3": "MPEG_LAYER_III"}


def limit_of(task: str, n_samples: Int64) -> Int64:
    """32 tokens and 12.5 a second for a transcript, 20 for an answer."""
    return 32 + n_samples * 25 // (2 * RATE) if task == "asr" else n_samples * 0 + 20


@pytest.fixture(scope="module")
def collator(tiny_model: Path) -> Collator:
    spec = AudioSpec.from_config(modeling.read_config(str(tiny_model)))
    return Collator(TekkenVocabulary.load(str(tiny_model)), spec)


Open = Callable[..., PredictData]


@pytest.fixture
def open_data(collator: Collator) -> Open:
    """``open_data(*inputs, **flags)`` with the tiny model's collator."""

    def call(*inputs: Path, max_len: int = MAX_LEN, spoken: bool = False, **flags: Any) -> PredictData:
        mine = Collator(collator.vocabulary, collator.spec, spoken)
        return PredictData.open(list(map(str, inputs)), mine, max_len, limit_of=limit_of, **flags)

    return call


@lru_cache
def bank() -> Samples:
    """The Korean demo clips with half a second of silence between them, over a minute and a half."""
    clips = [soundfile.read(path, dtype="float32")[0] for path in sorted(BANK.glob("ko_*.flac"))]
    return np.concatenate([part for clip in clips for part in (clip, np.zeros(RATE // 2, np.float32))])


def spoken(seconds: float) -> Samples:
    """The beginning of the bank."""
    return bank()[: int(seconds * RATE)]


def write_audio(path: Path, audio: Samples, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    format_ = "OGG" if path.suffix in (".ogg", ".opus") else path.suffix[1:].upper()
    channels = 1 if audio.ndim == 1 else audio.shape[1]
    with soundfile.SoundFile(path, "w", rate, channels, FORMATS[path.suffix], format=format_) as file:
        for first in range(0, len(audio), rate):  # libsndfile's Vorbis encoder overflows its stack on more
            file.write(audio[first : first + rate])
    return path


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_rows_of_every_kind_in_input_order(tmp_path: Path, open_data: Open) -> None:
    """Targets are optional, files and folders take the flags, a row's own words win over them."""
    for name in (
        "clips/a.wav",
        "clips/b.mp3",
        "clips/deep/c.flac",
        "clips/.d/e.wav",
        "clips/.f.wav",
        "x.opus",
    ):
        write_audio(tmp_path / name, spoken(1))
    (tmp_path / "clips/notes.txt").write_text("none")
    rows = write_jsonl(
        tmp_path / "calls.jsonl",
        {"audio_path": "clips/a.wav"},
        "",
        {"audio_path": "clips/b.mp3", "question": "When?", "id": 7, "language": "EN", "meta": {"x": 1}},
        {"instruction": "Add.", "input": "1 1", "output": ""},
        {"audio_path": "x.opus", "transcript": "kept", "task": "asr", "speaker": "s", "question": None},
        {"audio_path": "x.opus", "answer": ["yes", "ja"], "question": "Is it?"},
    )
    data = open_data(rows, tmp_path / "clips", tmp_path / "x.opus", task="", language="ko", question="Who?")
    found = [
        (row.task, row.id, row.language, row.prompt, row.audio_path, row.references) for row in data.rows
    ]
    assert found == [
        ("sqa", "calls:1", "ko", "Who?", "clips/a.wav", ()),
        ("sqa", "7", "en", "When?", "clips/b.mp3", ()),
        ("tqa", "calls:4", "ko", "Add.\n1 1", "", ()),
        ("asr", "calls:5", "ko", "", "x.opus", ("kept",)),
        ("sqa", "calls:6", "ko", "Is it?", "x.opus", ("yes", "ja")),
        ("sqa", "a.wav", "ko", "Who?", "a.wav", ()),
        ("sqa", "b.mp3", "ko", "Who?", "b.mp3", ()),
        ("sqa", "deep/c.flac", "ko", "Who?", "deep/c.flac", ()),
        ("sqa", "x", "ko", "Who?", "x.opus", ()),
    ]
    assert data.items == [(row, 0) for row in range(9)] and len(data) == 9
    assert data.describe((2, 0)) == "tqa/calls:4"


def test_a_task_flag_holds_for_rows_that_do_not_say_theirs(tmp_path: Path, open_data: Open) -> None:
    write_audio(tmp_path / "a.wav", spoken(1))
    rows = write_jsonl(
        tmp_path / "r.jsonl",
        {"audio_path": "a.wav", "question": "When?"},
        {"task": "tqa", "question": "What?"},
        {"task": "sqa", "audio_path": "a.wav", "question": "When?"},
    )
    assert [row.task for row in open_data(rows, task="asr").rows] == ["asr", "tqa", "sqa"]
    assert open_data(tmp_path / "a.wav", task="sqa", spoken=True).rows[0].prompt == ""


def test_without_a_flag_or_question_the_target_tells_the_task(tmp_path: Path, open_data: Open) -> None:
    write_audio(tmp_path / "a.wav", spoken(1))
    heard = [{"audio_path": "a.wav", "transcript": "x"}, {"audio_path": "a.wav", "output": "x"}]
    data = open_data(write_jsonl(tmp_path / "r.jsonl", *heard), spoken=True)
    assert [row.task for row in data.rows] == ["asr", "sqa"]


@pytest.mark.parametrize(
    ("suffix", "rate"), [(s, r) for s in FORMATS for r in (RATE, 44_100) if r == RATE or s != ".opus"]
)
def test_a_recording_is_cut_and_read_without_loss(tmp_path: Path, suffix: str, rate: int) -> None:
    """All pieces together are the recording; one piece is what :func:`decode` makes of the file."""
    audio = spoken(8).repeat(-(-rate // RATE))
    stereo = np.stack([audio, np.zeros_like(audio)], 1)
    path = write_audio(tmp_path / f"a{suffix}", stereo, rate)
    whole = decode(path)
    one = measure(path, None)
    assert one.cuts == (0, len(stereo)) and one.piece_samples == [len(whole)] and not one.error
    np.testing.assert_allclose(read_piece(path, one, 0), whole, atol=1e-6)
    cut = measure(path, 2 * RATE)
    pieces = [read_piece(path, cut, n) for n in range(len(cut.piece_samples))]
    assert 4 <= len(pieces) <= 9 and (cut.cuts[0], cut.cuts[-1]) == (0, len(stereo))
    assert [len(piece) for piece in pieces] == cut.piece_samples and max(cut.piece_samples) <= 2 * RATE
    with soundfile.SoundFile(path) as file:
        native = read_mono(file)
    for piece, (start, end) in zip(pieces, pairwise(cut.cuts), strict=True):
        np.testing.assert_allclose(piece, to_16k(native[start:end], rate), atol=1e-6)


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 16_001])
def test_the_resampled_length_is_known_beforehand(rate: int) -> None:
    random = np.random.default_rng(rate)
    for frames in [*range(1, 40), *random.integers(1, 100_000, 20).tolist()]:
        assert len(to_16k(np.zeros(frames, np.float32), rate)) == resampled_length(frames, rate)


def xing(path: Path, factor: float) -> bytes:
    """The file with another number of frames in its Xing header."""
    data = bytearray(path.read_bytes())
    at = data.find(b"Xing") + 8
    data[at : at + 4] = int(int.from_bytes(data[at : at + 4], "big") * factor).to_bytes(4, "big")
    return bytes(data)


def test_an_mp3_that_says_less_than_it_holds_is_refused(tmp_path: Path) -> None:
    """The decoder would drop the rest in silence; one that says more, or was cut off, is read to its end."""
    path = write_audio(tmp_path / "a.mp3", spoken(20))
    data = path.read_bytes()
    counted = count_frames(data)
    assert counted is not None and 0 <= counted[0] * counted[1] - 20 * RATE <= 8 * counted[1]
    tags = b"ID3\x04\0\0\0\0\x02\x01" + b"\xff\xf3\x84" * 85 + b"xx"
    false_start = data[:4] + bytes(60)
    assert count_frames(tags + data + b"TAG" + false_start * 20) == counted
    assert count_frames(b"no frames") is None
    for name, content in {"less": xing(path, 0.3), "twice": data + data}.items():
        bad = tmp_path / f"{name}.mp3"
        bad.write_bytes(content)
        found = measure(bad, None)
        assert "the rest would be lost" in found.error and found.piece_samples == [0]
        for read in (lambda bad=bad, found=found: read_piece(bad, found, 0), lambda bad=bad: to_flac(bad)):
            with pytest.raises(AudioError, match="would be lost"):
                read()
    for name, content in {"more": xing(path, 3), "half": data[: len(data) // 2]}.items():
        odd = tmp_path / f"{name}.mp3"
        odd.write_bytes(content)
        found = measure(odd, 4 * RATE)
        whole = decode(odd)
        assert sum(found.piece_samples) == len(whole) and not found.error
        pieces = [read_piece(odd, found, n) for n in range(len(found.piece_samples))]
        np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-6)


def test_a_gap_in_a_file_is_no_shorter_recording(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.ogg", spoken(30))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(data)
    found = measure(path, None)
    assert not found.error and found.piece_samples == [30 * RATE]
    with pytest.raises(AudioError, match=r"truncated: \d+ of 480000 frames"):
        read_piece(path, found, 0)


def test_a_long_recording_is_transcribed_in_pieces(
    tmp_path: Path, open_data: Open, collator: Collator
) -> None:
    """Pieces of whole 2-s chunks that leave room for the longest transcript; joined in order."""
    audio = spoken(31.3)
    long, short = write_audio(tmp_path / "long.wav", audio), write_audio(tmp_path / "short.wav", spoken(4.0))
    data = open_data(long, short, task="asr", language="ko", max_len=170)
    words = len(collator.prompt(data.rows[0], 0))
    assert words + 2 * 25 + 32 + 50 <= 170 < words + 3 * 25 + 32 + 75
    mine = [item for item in data.items if item[0] == 0]
    times = data.seconds(0)
    assert len(mine) == len(times) >= 8 and data.seconds(1) == [(0.0, 4.0)]
    assert times[0][0] == 0 and times[-1][1] == 31.3
    assert all(end == start for (_, end), (start, _) in pairwise(times))
    assert max(end - start for start, end in times) <= 4.0
    examples = [data.read(item) for item in mine]
    assert max(len(collator.prompt(e.sample, e.n_samples)) for e in examples) <= 170 - 82
    for example, (start, end) in zip(examples, times, strict=True):
        expected = log_mel(decode(long)[round(start * RATE) : round(end * RATE)], collator.spec)
        assert example.mel is not None and torch.equal(example.mel, expected) and not example.error
    assert data.describe((0, 3)) == "asr/long piece 4"


def test_pieces_are_joined_in_order(tmp_path: Path, open_data: Open) -> None:
    for name in ("a", "b"):
        write_audio(tmp_path / f"{name}.wav", spoken(12))
    rows = write_jsonl(
        tmp_path / "r.jsonl", {"audio_path": "a.wav", "language": "ja"}, {"audio_path": "b.wav"}
    )
    data = open_data(rows, task="asr")
    assert data.join(0, ["あ ", " い", None, ""]) == "あい"
    assert data.join(1, [" one", None, "", "two ", "three"]) == "one two three"
    assert data.join(1, [None, None]) is None
    assert data.join(1, [" as it came "]) == " as it came "


def test_the_longest_piece_is_half_an_hour(tmp_path: Path, open_data: Open) -> None:
    path = write_audio(tmp_path / "a.wav", np.zeros(8_000 * 31 * 60, np.float32), 8_000)
    data = open_data(path, task="asr", max_len=10**6)
    assert len(data) == 2 and max(end - start for start, end in data.seconds(0)) <= 1800
    assert len(open_data(path, task="sqa", question="Who?", max_len=10**6)) == 1, (
        "a question is about the whole"
    )


def test_every_item_once_for_any_ranks(tmp_path: Path, open_data: Open) -> None:
    for n, seconds in enumerate((1, 3, 30, 2)):
        write_audio(tmp_path / f"{n}.flac", spoken(seconds))
    text = [{"question": f"{n} and " * (n + 1)} for n in range(5)]
    heard = [{"task": "asr", "audio_path": f"{n}.flac"} for n in range(4)]
    asked = {"audio_path": "1.flac", "question": "Who?"}
    data = open_data(write_jsonl(tmp_path / "r.jsonl", *text, asked, *heard))
    assert len(data) > 20
    examples = {item: data.read(item) for item in data.items}
    for world_size in (1, 2, 3, 40):
        shares = [data.batches(rank, world_size, CAPS, limit_of) for rank in range(world_size)]
        assert sorted(item for share in shares for batch in share for item in batch) == data.items
        assert min(map(len, shares)) > 0 or world_size == 40
        for batch in (batch for share in shares for batch in share):
            found = [examples[item] for item in batch]
            prompts = [len(data.collator.prompt(e.sample, e.n_samples)) for e in found]
            limits = [int(limit_of(e.sample.task, np.array([e.n_samples]))[0]) for e in found]
            limits = [min(limit, MAX_LEN - prompt) for limit, prompt in zip(limits, prompts, strict=True)]
            assert len(batch) <= CAPS.rows and min(limits) >= 1
            assert len(batch) == 1 or len(batch) * (max(prompts) + max(limits)) <= CAPS.tokens


def test_ranks_share_the_measuring(tmp_path: Path, open_data: Open) -> None:
    """Each measures its rows alone; with what the other has measured, through JSON, both know the same."""
    for n in range(3):
        write_audio(tmp_path / f"clips/{n}.flac", spoken(1 + 4 * n))
    (tmp_path / "clips/3.flac").write_bytes(b"fLaC?")
    rows = write_jsonl(tmp_path / "r.jsonl", {"task": "tqa", "question": "What?"})
    alone = open_data(tmp_path / "clips", rows, task="asr")
    parts = [json.loads(json.dumps(part)) for part in measured(open_data, tmp_path, rows)]
    assert [len(part) for part in parts] == [3, 2]
    for rank in range(2):

        def exchange(mine: list[Any], rank: int = rank) -> list[list[Any]]:
            assert json.loads(json.dumps(mine)) == parts[rank]
            return parts

        data = open_data(tmp_path / "clips", rows, task="asr", slice_=(rank, 2), exchange=exchange)
        assert data.fingerprint == alone.fingerprint and data.items == alone.items
        assert [data.seconds(row) for row in range(5)] == [alone.seconds(row) for row in range(5)]


def measured(open_data: Open, folder: Path, rows: Path) -> list[list[Any]]:
    """What each of two ranks measures."""

    class Stop(Exception):
        """Ends a rank before it would need the other."""

    def exchange(mine: list[Any]) -> list[list[Any]]:
        parts.append(mine)
        raise Stop

    parts: list[list[Any]] = []
    for rank in range(2):
        with pytest.raises(Stop):
            open_data(folder / "clips", rows, task="asr", slice_=(rank, 2), exchange=exchange)
    return parts


def test_unreadable_audio_is_masked_with_its_reason(tmp_path: Path, open_data: Open) -> None:
    for name in ("a", "b", "c", "d"):
        write_audio(tmp_path / f"clips/{name}.flac", spoken(3))
    (tmp_path / "clips/a.flac").write_bytes(b"not audio")
    whole = (tmp_path / "clips/b.flac").read_bytes()
    (tmp_path / "clips/b.flac").write_bytes(whole[: len(whole) // 2])
    data = open_data(tmp_path / "clips", task="sqa", question="Who?")
    (tmp_path / "clips/c.flac").unlink()
    write_audio(tmp_path / "clips/d.flac", spoken(2.5))
    examples = [data.read(item) for item in data.items]
    reasons = ["is not WAV, FLAC, Ogg or MP3", "", "", "changed"]
    for example, name, reason in zip(examples, "abcd", reasons, strict=True):
        assert example.weight == 0 and f"{name}.flac" in example.error and reason in example.error
        assert str(tmp_path) not in example.error
    assert examples[0].mel is None and examples[0].n_samples == 0
    assert examples[1].mel is not None and len(examples[1].mel) == 2, (
        "the planned size, or the batch would not fit"
    )
    assert "changed" in examples[2].error


def test_what_decides_the_predictions_changes_the_fingerprint(tmp_path: Path, open_data: Open) -> None:
    path = write_audio(tmp_path / "a.wav", spoken(9))
    flags: dict[str, Any] = {"task": "asr", "language": "ko"}
    first = open_data(path, **flags).fingerprint
    assert open_data(path, **flags).fingerprint == first
    others = [
        open_data(path, task="asr", language="en").fingerprint,
        open_data(path, task="sqa", question="Who?", max_len=400).fingerprint,
        open_data(path, **flags, max_len=400).fingerprint,
        open_data(path, **flags, spoken=True).fingerprint,
    ]
    write_audio(path, spoken(9) * 0.5)
    others.append(open_data(path, **flags).fingerprint)
    assert len({first, *others}) == 6


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ("{", {}, r"r\.jsonl:1: invalid JSON .* repair or remove the line"),
        ("[1]", {}, r"r\.jsonl:1: a JSON list where an object belongs"),
        ({"audio_path": "a.wav"}, {}, r"r\.jsonl:1: fields \(audio_path\) fit asr and sqa; give --task"),
        ({"id": 3}, {}, r"r\.jsonl:1: fields \(id\) fit no task; give --task"),
        ({"audio_path": "a.wav", "transcipt": "x"}, {"task": "asr"}, r"r\.jsonl:1: unknown key 'transcipt'"),
        ({"audio_path": "no.wav"}, {"task": "asr"}, r"r\.jsonl:1: audio file 'no\.wav' does not exist"),
        ({"audio_path": 5}, {"task": "asr"}, r"r\.jsonl:1: field 'audio_path' is int"),
        ({"audio_path": "a.wav", "language": "kor"}, {"task": "asr"}, r"r\.jsonl:1: language 'kor' is not"),
        ({"audio_path": "a.wav"}, {"task": "sqa"}, r"r\.jsonl:1: task sqa needs a question; give --question"),
        (
            {"audio_path": "a.wav"},
            {"task": "tqa"},
            r"r\.jsonl:1: task tqa takes no audio; give another --task",
        ),
        ({"question": "Who?"}, {"task": "asr"}, r"r\.jsonl:1: task asr needs the field 'audio_path'"),
        ({"audio_path": "a.wav", "task": "ast"}, {}, r"r\.jsonl:1: unknown task 'ast'; known tasks are asr"),
        (
            {"question": "Who? " * 70},
            {},
            r"r\.jsonl:1: its prompt has \d+ positions and --max_len 128 leaves no room",
        ),
        ({"audio_path": "b.wav", "question": "Who?"}, {}, r"r\.jsonl:1: its prompt has .*; raise --max_len"),
        (
            {"audio_path": "a.wav"},
            {"task": "asr", "max_len": 20},
            r"r\.jsonl:1: its prompt has .*; raise --max_len",
        ),
        ("", {}, r"r\.jsonl: has no rows"),
    ],
)
def test_rows_that_cannot_be_predicted(
    tmp_path: Path, open_data: Open, row: Any, flags: dict[str, Any], message: str
) -> None:
    write_audio(tmp_path / "a.wav", spoken(1))
    write_audio(tmp_path / "b.wav", spoken(12))
    with pytest.raises(UserError, match=message) as error:
        open_data(write_jsonl(tmp_path / "r.jsonl", row), **flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "flags", "message"),
    [
        (["none.wav"], {"task": "asr"}, r"none\.wav: no such file or folder"),
        (["t.txt"], {"task": "asr"}, r"t\.txt: neither \.jsonl nor audio \(\.wav \.flac"),
        (["empty"], {"task": "asr"}, r"empty: the folder holds no audio"),
        (["a.wav"], {}, r"a\.wav: fields \(audio_path\) fit asr and sqa; give --task"),
        (["a.wav"], {"task": "tqa", "question": "Who?"}, r"a\.wav: task tqa takes no audio"),
        (["a.wav"], {"task": "sqa"}, r"a\.wav: task sqa needs a question; give --question"),
        (
            ["a.wav"],
            {"task": "asr", "question": "Who?"},
            r"--question with --task asr: that task asks nothing",
        ),
        (["a.wav"], {"task": "tts"}, r"--task: unknown task 'tts'"),
        (
            ["a.wav"],
            {"task": "asr", "language": "korean"},
            r"--language: language 'korean' is not a two-letter",
        ),
        (["a.wav", "x/a.wav"], {"task": "asr"}, r"x/a\.wav: id 'a' is that of .*a\.wav too"),
        (["r.jsonl"], {}, r"r\.jsonl:2: id '1' is that of .*r\.jsonl:1 too"),
    ],
)
def test_inputs_that_cannot_be_predicted(
    tmp_path: Path, open_data: Open, inputs: list[str], flags: dict[str, Any], message: str
) -> None:
    for name in ("a.wav", "x/a.wav"):
        write_audio(tmp_path / name, spoken(1))
    (tmp_path / "t.txt").write_text("text")
    write_jsonl(tmp_path / "r.jsonl", {"question": "Who?", "id": 1}, {"question": "What?", "id": "1"})
    write_audio(tmp_path / "empty/.hidden.wav", spoken(1))
    with pytest.raises(UserError, match=message):
        open_data(*(tmp_path / name for name in inputs), **flags)


def test_limits_of_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than any shard may hold, not longer than twelve hours, and a sample at least."""
    empty = measure(write_audio(tmp_path / "b.wav", np.zeros(2, np.float32), 96_000), None)
    assert empty.error == "has no samples" and empty.piece_samples == [0]
    path = write_audio(tmp_path / "a.flac", np.zeros(4_000 * 41 * 60, np.float32), 4_000)
    with pytest.raises(AudioError, match="at most 40 are accepted"):
        decode(path)
    assert measure(path, None).piece_samples == [41 * 60 * RATE]
    monkeypatch.setattr("voxtral_dist.audio_file.LONG_SECONDS", 40 * 60 + 1)
    assert "41.0 minutes" in measure(path, None).error


def test_a_recording_of_many_chunks_is_decoded_piece_by_piece(
    tiny_model: Path, tmp_path: Path, open_data: Open
) -> None:
    """Through the evaluator, whatever the rows of a batch; the pieces in their places."""
    path = write_audio(tmp_path / "long.flac", spoken(17))
    data = open_data(path, task="asr", language="ko", max_len=170)
    model = modeling.load(str(tiny_model), torch.float32)
    found = []
    for rows in (1, 3):
        decodings = evaluator.decode(model, data, DecodeSettings(rows, max_new_tokens=6), {})
        assert decodings is not None
        found.append({tuple(record["place"]): record["prediction"] for record in decodings.records})
    assert found[0] == found[1] and sorted(found[0]) == data.items and len(data) >= 5
    texts = [found[0][item] for item in data.items]
    assert len(set(texts)) > 1, "the pieces must differ, or a mix-up would go unseen"
    assert data.join(0, texts) == " ".join(text.strip() for text in texts if text.strip())
