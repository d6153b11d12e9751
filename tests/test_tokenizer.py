"""The Tekken vocabulary and the token counts made with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import mistral_common
import numpy as np
import pytest

from voxtral_dist import lengths
from voxtral_dist.errors import UserError
from voxtral_dist.lengths import example_lengths
from voxtral_dist.packing import pack
from voxtral_dist.shard_format import read_columns
from voxtral_dist.shards import ShardSet
from voxtral_dist.tasks import prompt_ids, target_ids
from voxtral_dist.tokenizer import TekkenVocabulary

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
NAMED = {1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 11: "<pad>", 24: "[AUDIO]", 25: "[BEGIN_AUDIO]"}
NAMED |= {34: "[TRANSCRIBE]"}
TEXTS = [
    "lang:english text",
    "안녕하세요 반갑습니다",
    "e\u0301 👩‍👩‍👧 \n\t x  ",
    "[INST]</s>[AUDIO]",
    "",
    "lang:ko",
]


def write_tekken(folder: Path, vocab_size: int) -> Path:
    """A Voxtral-like ``tekken.json`` from a prefix of the rank-ordered vocabulary in mistral-common's wheel."""
    source = json.loads(SOURCE.read_text("utf-8"))
    specials = [
        {"rank": rank, "token_str": NAMED.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
        for rank in range(35)
    ]
    config = source["config"] | {"num_vocab_tokens": vocab_size - 1000, "default_vocab_size": vocab_size}
    config |= {"default_num_special_tokens": 1000, "version": "v11"}
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"config": config, "vocab": source["vocab"][: vocab_size - 1000], "special_tokens": specials}
    (folder / "tekken.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tekken(tmp_path_factory.mktemp("small"), 4096)


def test_full_vocabulary_has_the_released_ids(tmp_path: Path) -> None:
    vocabulary = TekkenVocabulary.load(str(write_tekken(tmp_path, 131_072)))
    assert vocabulary.encode("lang:en") == [9909, 1058, 1262]
    assert vocabulary.encode("lang:ko") == [9909, 1058, 3505]
    assert vocabulary.encode("The quick brown fox.") == [1784, 7586, 22980, 94137, 1046]


def test_text_round_trips_and_special_tokens_stay_apart(small: Path) -> None:
    vocabulary = TekkenVocabulary.load(str(small))
    assert [vocabulary.special(token) for token in NAMED.values()] == list(NAMED)
    for text in TEXTS:
        ids = vocabulary.encode(text)
        assert all(1000 <= i < 4096 for i in ids)
        assert vocabulary.decode(ids) == text
        assert vocabulary.decode(np.array([1, *ids, 2, 11])) == text  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NOPE"):
        vocabulary.special("[NOPE]")


def test_fingerprint_is_that_of_the_file(small: Path, tmp_path: Path) -> None:
    fingerprint = TekkenVocabulary.load(str(small)).fingerprint
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    assert TekkenVocabulary.load(str(write_tekken(tmp_path / "same", 4096))).fingerprint == fingerprint
    assert TekkenVocabulary.load(str(write_tekken(tmp_path / "other", 4097))).fingerprint != fingerprint


def test_what_is_no_vocabulary_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"the folder has no tekken\.json"):
        TekkenVocabulary.load(str(tmp_path))
    for junk in ("{}", "[]", '{"config": {"version": "v99"}}', "no json"):
        (tmp_path / "tekken.json").write_text(junk)
        with pytest.raises(UserError, match="not a Tekken vocabulary"):
            TekkenVocabulary.load(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", "/no/such/folder"):
        with pytest.raises(UserError, match=f"--model_id {name}: no local folder") as caught:
            TekkenVocabulary.load(name)
        assert "\n" not in str(caught.value)


# token counts


@pytest.fixture
def data_set(tmp_path: Path) -> ShardSet:
    rows = [{"question": f"{text}?", "answer": [text * n + "x ", "other"]} for n, text in enumerate(TEXTS)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ShardSet.open(pack([tmp_path / "t.jsonl"], tmp_path / "out", shard_bytes=4_000)[0])


def expected(shards: ShardSet, vocabulary: TekkenVocabulary) -> list[list[int]]:
    samples = [shards.sample(index) for index in range(len(shards))]
    prompts = [len(prompt_ids(sample, vocabulary, audio_tokens=0)) for sample in samples]
    targets = [len(target_ids(sample.target, vocabulary)) for sample in samples]
    return [prompts, targets, [0] * len(samples)]


def test_counts_are_those_of_the_ids_and_are_cached(
    data_set: ShardSet, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = TekkenVocabulary.load(str(small))
    prompt, target, samples = example_lengths(data_set, vocabulary)
    assert len(data_set.shard_names) > 2
    assert prompt.dtype == target.dtype == np.uint32
    assert [prompt.tolist(), target.tolist(), samples.tolist()] == expected(data_set, vocabulary)
    files = sorted(data_set.folder.glob("*.tokens.*.safetensors"))
    assert len(files) == len(data_set.shard_names)
    before = [file.read_bytes() for file in files]
    (whole,) = data_set.folder.glob("lengths.*.npy")
    table = whole.read_bytes()

    monkeypatch.setattr(lengths._Counter, "_count", None)  # counting again would fail
    again = example_lengths(data_set, vocabulary)
    assert isinstance(again, np.memmap)
    assert again[:2].tolist() == [prompt.tolist(), target.tolist()]
    whole.unlink()
    assert example_lengths(data_set, vocabulary)[:2].tolist() == again[:2].tolist()
    monkeypatch.undo()

    files[0].write_bytes(before[1])  # of another tar
    files[1].write_bytes(b"damaged")
    whole.write_bytes(table[:-4])
    assert example_lengths(data_set, vocabulary)[1].tolist() == target.tolist()
    assert [file.read_bytes() for file in files] == before and whole.read_bytes() == table
    example_lengths(data_set, vocabulary, spoken_question=True)
    assert len(list(data_set.folder.glob("lengths.*.npy"))) == 2
    assert len(list(data_set.folder.glob("*.tokens.*"))) == 2 * len(files)
    assert read_columns(files[0])[1] == {"tar_sha256": data_set.shard_sha256[0]}


def test_spoken_question_leaves_the_question_out(small: Path, tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16_000)
    row = {"audio_path": "a.wav", "question": "a long question?", "answer": "x"}
    (tmp_path / "s.jsonl").write_text(json.dumps(row))
    shards = ShardSet.open(pack([tmp_path / "s.jsonl"], tmp_path / "out")[0])
    vocabulary = TekkenVocabulary.load(str(small))
    assert example_lengths(shards, vocabulary, spoken_question=True)[:, 0].tolist()[::2] == [4, 1600]
    written = 4 + len(vocabulary.encode("a long question?"))
    assert example_lengths(shards, vocabulary)[0].tolist() == [written]


RANK = """
import sys
from voxtral_dist.lengths import example_lengths
from voxtral_dist.shards import ShardSet
from voxtral_dist.tokenizer import TekkenVocabulary
shards, vocabulary = ShardSet.open(sys.argv[1]), TekkenVocabulary.load(sys.argv[2])
counts = example_lengths(shards, vocabulary, slice_=(int(sys.argv[3]), 2))
print([column.tolist() for column in counts])
"""


def test_ranks_share_the_counting(data_set: ShardSet, small: Path) -> None:
    processes = []
    for rank in (1, 0):
        command = [sys.executable, "-c", RANK, str(data_set.folder), str(small), str(rank)]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        time.sleep(0.3)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == [f"{expected(data_set, TekkenVocabulary.load(str(small)))}\n"] * 2


def test_folder_that_cannot_be_written_is_counted_in_memory(
    data_set: ShardSet, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = TekkenVocabulary.load(str(small))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    counts = example_lengths(data_set, vocabulary, slice_=(1, 2))
    assert [column.tolist() for column in counts] == expected(data_set, vocabulary)
    assert not list(data_set.folder.glob("*.tokens.*"))


def test_build_shards_counts_for_a_model(small: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"question": "x", "answer": "y"}))
    command = [sys.executable, "tools/build_shards.py", "--jsonl", str(tmp_path / "t.jsonl")]
    command += ["--out", str(tmp_path / "out"), "--model_id", str(small)]
    subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert len(list((tmp_path / "out/tqa/train").glob("tqa-train-000000.tokens.*.safetensors"))) == 1
