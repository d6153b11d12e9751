"""The encoder's states on disk: the same loss and gradient, the encoder at rest, bounded, robust against damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from demo_runs import Demo, alone, losses
from harness import run_ranks
from safetensors.torch import save
from test_model import tuned, watched

from voxtral_dist import distributed, encoder_cache
from voxtral_dist import model as modeling
from voxtral_dist.audio import AudioSpec
from voxtral_dist.batch import MicroBatch
from voxtral_dist.collator import Collator
from voxtral_dist.config import TrainConfig
from voxtral_dist.encoder_cache import EncoderCache, audio_key, fingerprint
from voxtral_dist.errors import UserError
from voxtral_dist.prepare import open_encoder_cache
from voxtral_dist.task_data import TaskData, open_tasks
from voxtral_dist.tokenizer import TekkenVocabulary

FEATURES = torch.arange(2 * 3 * 4.0).view(2, 3, 4)


class Run:
    """Model and data of a run with a cache in ``folder``; micro-batches of two examples of each task."""

    def __init__(self, model: Path, demo: Demo, folder: Path) -> None:
        self.training = modeling.TrainingModel(tuned(model), 3).eval()
        spec = AudioSpec.from_config(self.training.voxtral.config)
        self.collator = Collator(TekkenVocabulary.load(str(model)), spec)
        self.tasks: list[TaskData] = open_tasks(
            [demo.folder / "shards" / name / "train" for name in ("asr", "sqa", "tqa")], self.collator
        )
        config = TrainConfig(model_id=str(model), encoder_cache=str(folder))
        self.cache = open_encoder_cache(config, self.training, self.tasks)

    def batch(self, numbers: range, packed: bool = False) -> MicroBatch:
        examples = [task.read(number, place) for number in numbers for place, task in enumerate(self.tasks)]
        return self.collator.train_batch(examples, 0, packed)

    def gradient(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient."""
        loss = self.training(batch).loss
        trained = [parameter for parameter in self.training.parameters() if parameter.requires_grad]
        return loss.detach(), torch.cat([part.flatten() for part in torch.autograd.grad(loss, trained)])


@pytest.fixture
def run(tiny_model: Path, demo: Demo, tmp_path: Path) -> Iterator[Run]:
    run = Run(tiny_model, demo, tmp_path / "cache")
    yield run
    assert run.cache is not None
    run.cache.close()


@pytest.mark.parametrize("packed", [False, True])
def test_cached_states_give_the_same_gradient(run: Run, packed: bool) -> None:
    fresh = run.batch(range(2), packed)
    assert fresh.encoded is None and len(fresh.audio_keys) == 4
    loss, gradient = run.gradient(fresh)
    assert run.cache is not None
    run.cache.close()

    mixed, cached = run.batch(range(1, 3), packed), run.batch(range(2), packed)
    assert mixed.audio is not None and mixed.encoded is not None and len(mixed.audio_keys) == 2
    assert cached.audio is None and cached.encoded is not None
    with watched(run.training.voxtral.model.audio_tower) as calls:
        again, same = run.gradient(cached)
        assert not calls
        run.training.on_encoded = None
        partly, part = run.gradient(mixed)
        assert len(calls) == 1
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    assert (same - gradient).norm() / gradient.norm() < 1e-5

    for task in run.tasks:
        task.encoder_cache = None
    loss, gradient = run.gradient(run.batch(range(1, 3), packed))
    torch.testing.assert_close(partly, loss, rtol=1e-6, atol=0)
    assert (part - gradient).norm() / gradient.norm() < 1e-5


def test_states_are_kept_in_the_type_they_are_used_in(run: Run) -> None:
    """CUDA's autocast computes the encoder's last norm in float32, which would take twice the room."""
    voxtral, kept = run.training.voxtral.bfloat16(), []
    tower = voxtral.model.audio_tower
    run.training.on_encoded = lambda keys, states: kept.append(states.dtype)
    batch = run.batch(range(2))
    assert batch.audio is not None
    batch.audio = batch.audio.bfloat16()
    expected = run.training(batch).loss
    tower.layer_norm.register_forward_hook(lambda module, args, out: out.float())
    assert torch.equal(run.training(batch).loss, expected)
    assert kept == [torch.bfloat16] * 2


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    cache = EncoderCache(tmp_path, encoder_cache.GB, "e")
    states = torch.randn(3, 4, 5, dtype=torch.bfloat16)
    cache.put([("aa1", 2), ("", 0), ("bb2", 1)], states)
    cache.close()
    found = EncoderCache(tmp_path, encoder_cache.GB, "e")
    first, second = found.get("aa1", 2), found.get("bb2", 1)
    assert first is not None and second is not None and first.dtype is torch.bfloat16
    assert torch.equal(torch.cat([first, second]), states)
    assert found.get("aa1", 1) is None and found.get("cc3", 1) is None
    assert EncoderCache(tmp_path, encoder_cache.GB, "other").get("aa1", 2) is None


def test_the_folder_stays_within_its_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = FEATURES.numel() * 4 + 200
    cache = EncoderCache(tmp_path, 3 * size, "e")
    for number in range(8):
        cache.put([(f"{number:02}", 2)], FEATURES)
    cache.close()
    files = list(tmp_path.rglob("*.safetensors"))
    assert 1 < len(files) < 8 and sum(file.stat().st_size for file in files) <= 3 * size
    assert [record.getMessage() for record in caplog.records if "--encoder_cache_gb" in record.getMessage()]

    other = EncoderCache(tmp_path, 3 * size, "another encoder")
    other.put([("aa", 2)], FEATURES)
    other.close()
    assert sorted(tmp_path.rglob("*.safetensors")) == sorted(files)


def test_files_of_other_ranks_count(tmp_path: Path) -> None:
    """Also when all ranks write at the same moment; near the bound a rank leaves room for the others' next files."""
    size = len(save({"states": FEATURES}))
    caches = [EncoderCache(tmp_path, 10 * size, "e", writers=4) for _ in range(4)]
    for number in range(6):
        for rank, cache in enumerate(caches):
            cache.put([(f"{number}{rank}", 2)], FEATURES)
    for cache in caches:
        cache.close()
    assert 6 <= len(list(tmp_path.rglob("*.safetensors"))) <= 10


def count_ranks(rank: int) -> list[int]:
    """As a rank of two, on one machine and then on a machine each."""
    found = [distributed.ranks_here()]
    with patch("socket.gethostname", lambda: f"node-{rank}"):
        return [*found, distributed.ranks_here()]


def test_the_bound_is_shared_by_the_ranks_of_a_machine() -> None:
    assert run_ranks(count_ranks, 2) == [[2, 1], [2, 1]]
    assert distributed.ranks_here() == 1


@pytest.mark.parametrize("damage", [b"", b"\xff" * 300])
def test_a_damaged_file_is_encoded_again(tmp_path: Path, damage: bytes) -> None:
    cache = EncoderCache(tmp_path, encoder_cache.GB, "e")
    cache.put([("aa", 2)], FEATURES)
    cache.close()
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(damage)
    again = EncoderCache(tmp_path, encoder_cache.GB, "e")
    assert again.get("aa", 2) is None and not file.exists()
    again.put([("aa", 2)], FEATURES)
    again.close()
    read = again.get("aa", 2)
    assert read is not None and torch.equal(read, FEATURES)


def test_names_go_by_content(tiny_model: Path) -> None:
    tower = modeling.load(str(tiny_model), torch.float32).model.audio_tower
    before = fingerprint(tower, tower.config, {"tf32": False})
    assert fingerprint(tower, tower.config, {"tf32": False}) == before
    assert fingerprint(tower, tower.config, {"tf32": True}) != before
    assert fingerprint(tower.bfloat16(), tower.config, {"tf32": False}) != before
    tower.float().conv1.weight.data[0, 0, 0] += 1
    assert fingerprint(tower, tower.config, {"tf32": False}) != before
    assert audio_key(b"a") != audio_key(b"b") and len(audio_key(b"")) == 40


def test_bad_flags(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--encoder_cache .*file cannot be used"):
        EncoderCache(tmp_path / "file", 1, "e")
    flags = {"model_id": "m", "output_dir": "o", "train_shards": "s", "encoder_cache": "c"}
    with pytest.raises(UserError, match="--encoder_cache c with --no_freeze_whisper"):
        TrainConfig(freeze_whisper=False, **flags).validate()
    with pytest.raises(UserError, match="--encoder_cache_gb"):
        TrainConfig(encoder_cache_gb=-1, **flags).validate()


@pytest.mark.slow
def test_a_run_with_a_cache_is_the_run_without(demo: Demo, tmp_path: Path) -> None:
    plain, first, second = (tmp_path / name for name in ("plain", "first", "second"))
    alone(demo.flags(plain), plain)
    for out in (first, second):
        alone(demo.flags(out, "--encoder_cache", str(tmp_path / "cache")), out)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) > 20
    for out in (first, second):
        torch.testing.assert_close(torch.tensor(losses(out)), torch.tensor(losses(plain)), rtol=1e-4, atol=0)
