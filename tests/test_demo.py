"""The embedded demo: the bank is whole, the composition is deterministic and fair, the tiny model loads."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from harness import ROOT, load_script
from transformers import VoxtralForConditionalGeneration, VoxtralProcessor
from transformers.tokenization_mistral_common import MistralCommonBackend

from voxtral_dist.errors import UserError
from voxtral_dist.tasks import parse_row

BANK = ROOT / "shards" / "demo" / "bank"
TRAIN_ROWS, DEV_ROWS = 150, 120
CHUNK = {"audio_kwargs": {"pad_to_multiple_of": 32_000, "max_source_positions": 200}}
"""What the official processor must be told about 2-s chunks: it assumes 30 s."""


@pytest.fixture(scope="module")
def composer() -> ModuleType:
    return load_script("tools/compose_demo.py")


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    return load_script("tools/build_tiny_voxtral.py")


@pytest.fixture(scope="module")
def bank(composer: ModuleType) -> Any:
    return composer.load_bank(BANK)


@pytest.fixture(scope="module")
def demo(composer: ModuleType, bank: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    assert composer.publish(out, composer.Settings(TRAIN_ROWS, DEV_ROWS), bank)
    return out


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sequences(folder: Path, pattern: str) -> set[str]:
    """The word sequences, spoken or written, of all tasks."""
    found = [row for path in folder.glob(pattern) for row in rows(path)]
    return {row.get("transcript") or row["input"] for row in found if "question" not in row}


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_the_bank_is_whole_and_small() -> None:
    clips = sorted(BANK.glob("*.flac"))
    assert len(clips) == 200
    for clip in clips:
        info = soundfile.info(clip)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16"), clip.name
        assert 0.1 < info.duration <= 0.58, clip.name
        assert np.abs(soundfile.read(clip)[0]).max() > 0.2, clip.name
    assert sum(path.stat().st_size for path in BANK.iterdir()) < 1_600_000
    about = json.loads((BANK / "words.json").read_text("utf-8"))
    assert {"made_with", "command", "processing", "licence"} <= about.keys()


def test_no_two_clips_are_the_same_sound(bank: Any) -> None:
    assert len({clip.tobytes() for clip in bank.clips.values()}) == 200


def test_a_missing_clip_is_named(composer: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_bytes((BANK / "words.json").read_bytes())
    with pytest.raises(UserError, match="ko_0_v1_s1"):
        composer.load_bank(tmp_path)


def test_remaking_the_bank_without_espeak_ng_is_exit_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_demo_bank.py"), str(tmp_path / "bank")]
    done = subprocess.run(
        command,
        env={"PATH": "/nonexistent", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "espeak-ng is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_tool_has_the_words_of_the_bank() -> None:
    about = json.loads((BANK / "words.json").read_text("utf-8"))
    assert {**load_script("tools/make_demo_bank.py").WORDS, "made_with": about["made_with"]} == about


def test_same_settings_same_bytes(composer: ModuleType, bank: Any, demo: Path, tmp_path: Path) -> None:
    composer.publish(tmp_path / "again", composer.Settings(TRAIN_ROWS, DEV_ROWS), bank)
    assert digests(tmp_path / "again") == digests(demo)


def test_another_seed_composes_other_data(
    composer: ModuleType, bank: Any, demo: Path, tmp_path: Path
) -> None:
    composer.publish(tmp_path / "other", composer.Settings(TRAIN_ROWS, DEV_ROWS, seed=1), bank)
    same = digests(tmp_path / "other").items() & digests(demo).items()
    assert not same


def test_a_finished_composition_is_left_alone(composer: ModuleType, bank: Any, demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert not composer.publish(demo, composer.Settings(TRAIN_ROWS, DEV_ROWS), bank)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before
    assert list(demo.parent.iterdir()) == [demo]


def test_anything_else_is_not_overwritten(
    composer: ModuleType, bank: Any, demo: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds something else"):
        composer.publish(demo, composer.Settings(TRAIN_ROWS + 1, DEV_ROWS), bank)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        composer.publish(tmp_path, composer.Settings(), bank)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(
    composer: ModuleType, bank: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composer, "MAX_SECONDS", 0.6)
    with pytest.raises(UserError, match=r"does not fit 0\.6 s"):
        composer.publish(tmp_path / "demo", composer.Settings(5, 5), bank)
    assert not list(tmp_path.iterdir())


def test_no_dev_utterance_occurs_in_training_in_any_task(demo: Path) -> None:
    train, dev = sequences(demo, "*.train.jsonl"), sequences(demo, "*.dev.jsonl")
    dev |= sequences(demo, "*.unseen_voice.jsonl")
    assert len(train) > 100
    assert len(dev) > 100
    assert not train & dev


@pytest.mark.parametrize("seed", range(20))
def test_a_fifth_of_each_length_is_held_out_and_every_word_is_trained_everywhere(
    composer: ModuleType, seed: int
) -> None:
    split = composer.split_sequences(["ko", "en"], seed)
    for language in ("ko", "en"):
        dev, train = split["dev"][language], split["train"][language]
        assert [len(known) for known in dev] == [2, 20, 200]
        assert [len(known) for known in train] == [8, 80, 800]
        assert not {*chain.from_iterable(dev)} & {*chain.from_iterable(train)}
        for known in train[1:]:
            for position in range(len(known[0])):
                assert {digits[position] for digits in known} == set(range(10))


@pytest.mark.parametrize("name", ["asr.dev", "asr.unseen_voice", "tqa.dev", "asr.train", "tqa.train"])
def test_both_languages_have_utterances_of_one_two_and_three_words(demo: Path, name: str) -> None:
    shapes = [
        (row["language"], len((row.get("transcript") or row["input"]).split()))
        for row in rows(demo / f"{name}.jsonl")
    ]
    assert {(language, length) for language in ("ko", "en") for length in (1, 2, 3)} == set(shapes)


def test_the_unseen_voice_is_heard_only_in_its_own_set(demo: Path) -> None:
    voices = {path.name: {row.get("speaker") for row in rows(path)} for path in demo.glob("*.jsonl")}
    assert voices.pop("asr.unseen_voice.jsonl") == {"v5"}
    assert voices["asr.dev.jsonl"] == voices["sqa.train.jsonl"] == {"v1", "v2", "v3", "v4"}


def test_the_domain_of_a_row_is_how_it_is_spoken(demo: Path, composer: ModuleType) -> None:
    """Both speeds in every language of every set, and the slow one takes longer for the same words."""
    speeds = json.loads((BANK / "words.json").read_text("utf-8"))["speeds"]
    assert [composer.DOMAINS[name] for name in sorted(speeds, key=speeds.get)] == ["slow", "fast"]
    for path in demo.glob("[as]*.jsonl"):
        found = {(row["domain"], row["language"]) for row in rows(path)}
        assert found == {(domain, language) for domain in ("slow", "fast") for language in ("ko", "en")}
    for path in demo.glob("tqa*.jsonl"):
        assert {row["domain"] for row in rows(path)} == {"digits"}
    asr, sqa = rows(demo / "asr.train.jsonl"), rows(demo / "sqa.train.jsonl")
    assert [row["domain"] for row in asr] == [row["domain"] for row in sqa]
    per_word: dict[str, list[float]] = {"slow": [], "fast": []}
    for row in asr:
        seconds = soundfile.info(demo / row["audio_path"]).duration
        per_word[row["domain"]].append(seconds / len(row["transcript"].split()))
    assert np.mean(per_word["slow"]) > 1.1 * np.mean(per_word["fast"])


def test_every_utterance_is_mono_16_khz_and_under_two_seconds(demo: Path) -> None:
    named = {row["audio_path"] for path in demo.glob("[as]*.jsonl") for row in rows(path)}
    assert named == {str(path.relative_to(demo)) for path in demo.glob("audio/*")}
    for path in named:
        info = soundfile.info(demo / path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert info.duration < 2.0


def test_the_longest_possible_utterance_fits_the_chunk(composer: ModuleType, bank: Any) -> None:
    longest = max(len(clip) for clip in bank.clips.values()) / composer.SAMPLE_RATE
    assert 3 * longest + 2 * composer.GAP_SECONDS[1] < composer.MAX_SECONDS


@pytest.mark.parametrize("task", ["asr", "sqa", "tqa"])
def test_rows_are_recognised_and_valid(demo: Path, task: str) -> None:
    for split in ("train", "dev"):
        path = demo / f"{task}.{split}.jsonl"
        samples = [parse_row(row, f"{path.name}:{i}", f"{i}") for i, row in enumerate(rows(path), start=1)]
        assert len(samples) == {"train": TRAIN_ROWS, "dev": DEV_ROWS}[split]
        assert {sample.task for sample in samples} == {task}
        assert len({sample.id for sample in samples}) == len(samples)


def test_answers_are_right(demo: Path) -> None:
    about = json.loads((BANK / "words.json").read_text("utf-8"))["languages"]
    transcripts = {row["audio_path"]: row["transcript"] for row in rows(demo / "asr.train.jsonl")}
    asked = set()
    for row in rows(demo / "sqa.train.jsonl") + rows(demo / "tqa.train.jsonl"):
        question = row.get("question") or row["instruction"]
        words = (row.get("input") or transcripts[row["audio_path"]]).split()
        order = about[row["language"]]["words"].index
        right = {"F": words[0], "첫": words[0], "L": words[-1], "끝": words[-1]}
        expected = (
            max(words, key=order) if question in {"Largest number?", "가장 큰 수는?"} else right[question[0]]
        )
        assert (row.get("answer") or row["output"]) == expected, row
        asked.add((row["language"], question))
    assert len(asked) == 6


def test_the_tiny_model_is_built_once_and_reproducibly(
    builder: ModuleType, tiny_model: Path, tmp_path: Path
) -> None:
    assert not builder.build(tiny_model)
    assert builder.build(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tiny_model)
    with pytest.raises(UserError, match="holds something else"):
        builder.build(tiny_model, seed=1)
    assert builder.build(tmp_path / "seed1", seed=1)
    name = "model.safetensors"
    assert digests(tmp_path / "seed1")[name] != digests(tiny_model)[name]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_source_positions": 150}, "150 is no multiple of 100"),
        ({"vocab_size": 1200}, "1200 is below 1256"),
    ],
)
def test_sizes_that_make_no_model(
    builder: ModuleType, tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        builder.build(tmp_path / "model", **sizes)
    assert not list(tmp_path.iterdir())


def test_the_tiny_model_transcribes_offline_through_the_official_classes(tiny_model: Path) -> None:
    model = VoxtralForConditionalGeneration.from_pretrained(tiny_model).eval()
    processor = VoxtralProcessor.from_pretrained(tiny_model)
    assert model.dtype == torch.float32
    assert processor.feature_extractor.n_samples == 32_000
    second = soundfile.read(BANK / "en_7_v1_s1.flac", frames=16_000, fill_value=0.0, dtype="float32")[0]
    inputs = processor.apply_transcription_request(
        audio=[second], model_id="tiny", language="ko", sampling_rate=16_000, format="wav", **CHUNK
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids[: 3 + 25 + 1] == [1, 3, 25] + [24] * 25 + [4]
    assert ids[-1] == 34
    assert inputs["input_features"].shape == (1, 128, 200)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 2


def test_the_weights_are_drawn_so_that_lora_alone_can_learn(tiny_model: Path) -> None:
    model = VoxtralForConditionalGeneration.from_pretrained(tiny_model)
    tower, embeddings = model.model.audio_tower, model.get_input_embeddings().weight
    assert not model.config.text_config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, embeddings)
    assert model.lm_head.weight.std().item() == pytest.approx(0.15, rel=0.02)
    assert embeddings.std().item() == pytest.approx(0.15, rel=0.02)
    assert tower.conv1.weight.std().item() == pytest.approx(0.08, rel=0.02)
    assert tower.embed_positions.weight.abs().max().item() == pytest.approx(0.1, rel=0.02)


def test_korean_survives_the_short_vocabulary(tiny_model: Path) -> None:
    tokenizer = MistralCommonBackend.from_pretrained(tiny_model)
    ids = tokenizer.encode("끝 단어는? 칠", add_special_tokens=False)
    assert max(ids) < 4096
    assert tokenizer.decode(ids) == "끝 단어는? 칠"
