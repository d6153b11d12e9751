"""Compose the demo data from the word bank: ``python tools/compose_demo.py OUT [--train_rows 2000] [--seed 0]``

Writes ``OUT/{asr,sqa,tqa}.{train,dev}.jsonl``, ``OUT/asr.unseen_voice.jsonl``, ``OUT/audio/*.flac`` and
``OUT/composition.json``. An utterance is one to three digits of one language, spoken by one voice at one speed,
shorter than the 2-s chunk of the demo's model. One in five word sequences of each length is kept for the dev sets:
it occurs in no training row of any task. The SQA rows ask about the audio of the ASR rows. The domain of a spoken row
is its speed, slow or fast, that of a written one digits. The same settings and bank give the same bytes; called again
on a finished OUT it says so and does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import soundfile
from tqdm import tqdm

from voxtral_dist.atomic import holds, new_folder
from voxtral_dist.errors import UserError, run_main

VERSION = "demo/2"
"""Part of the fingerprint. Changing what is composed from the same settings and bank must change it."""

RECORD = "composition.json"
"""What was composed."""

BANK = Path(__file__).resolve().parent.parent / "shards" / "demo" / "bank"
SAMPLE_RATE = 16_000
LENGTH_SHARES = (0.1, 0.4, 0.5)  # of utterances of one, two and three words
HELD_OUT = 0.2  # of the word sequences of each length
GAP_SECONDS = (0.02, 0.1)
GAIN = (0.4, 1.0)
NOISE = 0.003  # standard deviation, of full scale
MAX_SECONDS = 2.0

Digits = tuple[int, ...]
Pool = dict[str, list[list[Digits]]]
"""The digit sequences of one split: language to the sequences of one, of two and of three digits."""

Row = dict[str, str]
Clip = npt.NDArray[np.float32]
T = TypeVar("T")

DOMAINS = {"s1": "slow", "s2": "fast"}
"""Domain of the utterances of each speed of the bank; written rows have the domain :data:`WRITTEN`."""

WRITTEN = "digits"

PICK: dict[str, Callable[[Digits], int]] = {"first": lambda d: d[0], "last": lambda d: d[-1], "largest": max}
QUESTIONS = {
    "ko": {"first": "첫 단어는?", "last": "끝 단어는?", "largest": "가장 큰 수는?"},
    "en": {"first": "First word?", "last": "Last word?", "largest": "Largest number?"},
}


@dataclass(frozen=True)
class Settings:
    """What decides the composition, next to the bank. Rows are per task."""

    train_rows: int = 2000
    dev_rows: int = 120
    seed: int = 0


@dataclass(frozen=True)
class Bank:
    """The word bank.

    Attributes:
        words: per language the ten digit words, in order.
        voices: names of the voices of training and dev, and ``unseen_voice``, which occurs in neither.
        speeds: names of the speeds.
        clips: name of a clip to (samples,) float32, 16 kHz.
    """

    words: dict[str, list[str]]
    voices: tuple[str, ...]
    unseen_voice: str
    speeds: tuple[str, ...]
    clips: dict[str, Clip]


def load_bank(folder: Path) -> Bank:
    """Read the bank at ``folder``; :class:`UserError` when a file of it is missing."""
    try:
        about = json.loads((folder / "words.json").read_text("utf-8"))
        words = {language: entry["words"] for language, entry in about["languages"].items()}
        keys = [words, range(10), about["voices"], about["speeds"]]
        names = ["_".join(map(str, key)) for key in itertools.product(*keys)]
        clips = {name: soundfile.read(folder / f"{name}.flac", dtype="float32")[0] for name in names}
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"the demo bank {folder} is not whole ({error}); restore the folder") from error
    unseen = about["unseen_voice"]
    voices = tuple(voice for voice in about["voices"] if voice != unseen)
    return Bank(words, voices, unseen, tuple(about["speeds"]), clips)


def fingerprint(settings: Settings, bank: Bank) -> str:
    """Hash of everything that the bytes of a composition depend on: 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{VERSION} {settings} {bank.words} {bank.unseen_voice}".encode())
    for name, clip in sorted(bank.clips.items()):
        digest.update(name.encode() + clip.tobytes())
    return digest.hexdigest()


def split_sequences(languages: Iterable[str], seed: int) -> dict[str, Pool]:
    """All sequences of one to three digits, shuffled by ``seed``; :data:`HELD_OUT` of each length are "dev"."""
    split: dict[str, Pool] = {"train": {}, "dev": {}}
    for number, language in enumerate(sorted(languages)):
        rng = np.random.default_rng([seed, 0, number])
        split["train"][language], split["dev"][language] = [], []
        for length in (1, 2, 3):
            known = list(itertools.product(range(10), repeat=length))
            shuffled = [known[i] for i in rng.permutation(len(known))]
            held_out = round(HELD_OUT * len(known))
            split["dev"][language].append(shuffled[:held_out])
            split["train"][language].append(shuffled[held_out:])
    return split


def choose(rng: np.random.Generator, options: Iterable[T]) -> T:
    """One of ``options``, all equally likely."""
    known = list(options)
    return known[rng.integers(len(known))]


def draw(rng: np.random.Generator, pool: Pool) -> tuple[str, Digits]:
    """A language, and one of its digit sequences with the lengths in :data:`LENGTH_SHARES`."""
    language = choose(rng, sorted(pool))
    return language, choose(rng, pool[language][rng.choice(3, p=LENGTH_SHARES)])


def speak(rng: np.random.Generator, clips: Sequence[Clip]) -> Clip:
    """The clips one after the other, each (samples,) float32, with random gaps, gain and noise."""
    pieces = [clips[0]]
    for clip in clips[1:]:
        pieces += [np.zeros(int(rng.uniform(*GAP_SECONDS) * SAMPLE_RATE), np.float32), clip]
    speech = np.concatenate(pieces) * rng.uniform(*GAIN)
    return np.clip(speech + rng.normal(0, NOISE, len(speech)), -1, 1).astype(np.float32)


def ask(rng: np.random.Generator, language: str, digits: Digits, kinds: Iterable[str]) -> tuple[str, int]:
    """A question about ``digits`` in ``language``, its kind one of ``kinds``, and the digit that answers it."""
    kind = choose(rng, kinds)
    return QUESTIONS[language][kind], PICK[kind](digits)


def audio_rows(
    out: Path, name: str, count: int, stream: tuple[int, int], pool: Pool, bank: Bank
) -> tuple[list[Row], list[Row]]:
    """Write ``count`` utterances to ``out/audio`` and return their ASR and SQA rows.

    Args:
        stream: seed and number of the set; with them row i depends on i alone.

    Raises:
        UserError: an utterance does not fit :data:`MAX_SECONDS`.
    """
    asr, sqa = [], []
    for i in tqdm(range(count), desc=f"{name} audio", unit="clip", disable=None):
        rng = np.random.default_rng([*stream, i])
        language, digits = draw(rng, pool)
        voice = bank.unseen_voice if name == "unseen_voice" else choose(rng, bank.voices)
        speed = choose(rng, bank.speeds)
        sound = speak(rng, [bank.clips[f"{language}_{digit}_{voice}_{speed}"] for digit in digits])
        path = f"audio/{name}-{i:05d}.flac"
        if len(sound) >= MAX_SECONDS * SAMPLE_RATE:
            raise UserError(f"{path} does not fit {MAX_SECONDS} s: the bank's clips are too long, restore it")
        soundfile.write(out / path, sound, SAMPLE_RATE, subtype="PCM_16")
        question, answer = ask(rng, language, digits, ("first", "last"))
        words = bank.words[language]
        about = {"language": language, "speaker": voice, "domain": DOMAINS[speed], "audio_path": path}
        asr.append({"id": f"asr-{name}-{i:05d}", **about, "transcript": " ".join(words[d] for d in digits)})
        sqa.append({"id": f"sqa-{name}-{i:05d}", **about, "question": question, "answer": words[answer]})
    return asr, sqa


def text_rows(name: str, count: int, stream: tuple[int, int], pool: Pool, bank: Bank) -> list[Row]:
    """``count`` TQA rows over the words as text; see :func:`audio_rows`."""
    rows = []
    for i in range(count):
        rng = np.random.default_rng([*stream, i])
        language, digits = draw(rng, pool)
        question, answer = ask(rng, language, digits, PICK)
        words = bank.words[language]
        about = {"language": language, "domain": WRITTEN, "instruction": question, "output": words[answer]}
        rows.append({"id": f"tqa-{name}-{i:05d}", **about, "input": " ".join(words[d] for d in digits)})
    return rows


def compose(out: Path, settings: Settings, bank: Bank) -> dict[str, int]:
    """Write audio and rows into the empty folder ``out``; returns the number of rows of each JSONL file."""
    (out / "audio").mkdir()
    pools, seed = split_sequences(bank.words, settings.seed), settings.seed
    files: dict[str, list[Row]] = {}
    for number, (name, count) in enumerate((("train", settings.train_rows), ("dev", settings.dev_rows))):
        asr, sqa = audio_rows(out, name, count, (seed, 1 + number), pools[name], bank)
        tqa = text_rows(name, count, (seed, 3 + number), pools[name], bank)
        files |= {f"asr.{name}.jsonl": asr, f"sqa.{name}.jsonl": sqa, f"tqa.{name}.jsonl": tqa}
    unseen, _ = audio_rows(out, "unseen_voice", settings.dev_rows, (seed, 5), pools["dev"], bank)
    files["asr.unseen_voice.jsonl"] = unseen
    for file, rows in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / file).write_text("".join(lines), encoding="utf-8")
    return {file: len(rows) for file, rows in files.items()}


def publish(out: Path, settings: Settings, bank: Bank) -> bool:
    """Compose beside ``out`` and rename; False when ``out`` already holds this composition.

    Raises:
        UserError: ``out`` holds something else, or a setting makes no data.
    """
    if min(settings.train_rows, settings.dev_rows) < 1 or settings.seed < 0:
        raise UserError(f"{settings} makes no data; rows must be at least 1 and the seed at least 0")
    mark = fingerprint(settings, bank)
    if holds(out, RECORD, mark):
        return False
    with new_folder(out) as aside:
        rows = compose(aside, settings, bank)
        about = {"fingerprint": mark, "settings": asdict(settings), "rows": rows}
        (aside / RECORD).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return True


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = vars(parser.parse_args())
    out = args.pop("out")
    new = publish(out, Settings(**args), load_bank(BANK))
    print(f"demo data {'composed in' if new else 'already in'} {out}")


if __name__ == "__main__":
    run_main(main)
