"""What the monitor writes and hides after a kill, what the GPU meter reads, and that no failure stops a training."""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import wave
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import load_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.summary.writer import event_file_writer

from voxtral_dist.audio import AudioSpec
from voxtral_dist.collator import Collator
from voxtral_dist.decode_share import DecodeSettings
from voxtral_dist.errors import UserError
from voxtral_dist.eval_data import EvalData
from voxtral_dist.evaluator import Evaluation, evaluate
from voxtral_dist.gpu_meter import GpuMeter
from voxtral_dist.logger import get_logger, setup_logging
from voxtral_dist.model import load, read_config
from voxtral_dist.monitor import LAYOUT, Monitor, NullMonitor
from voxtral_dist.packing import pack
from voxtral_dist.step_evaluation import show_previews
from voxtral_dist.task_data import open_tasks
from voxtral_dist.tasks import TASKS
from voxtral_dist.tokenizer import TekkenVocabulary

Log = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def messages(caplog: Log) -> Iterator[Log]:
    """Everything the package logs during a test, whatever logging set-up another test left behind."""
    root = logging.getLogger("voxtral_dist")
    before = (root.handlers, root.propagate, root.level)
    root.handlers, root.propagate = [], True
    caplog.set_level(logging.INFO, "voxtral_dist")
    yield caplog
    root.handlers, root.propagate = before[:2]
    root.setLevel(before[2])


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files of one second and process are read in the order of numbers as text: begin at 0, not at 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def lines(run_dir: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def events(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return accumulator


def points(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run_dir).Scalars(tag)]


def record(run_dir: Path, steps: range, loss: float, start_step: int = 0) -> None:
    monitor = Monitor.create(run_dir, 0, False, start_step)
    for step in steps:
        monitor.scalars(step, {"loss": loss})
    monitor.close()


def test_scalars_reach_the_record_and_tensorboard(tmp_path: Path) -> None:
    monitor = Monitor.create(tmp_path, 0, False)
    monitor.scalars(1, {"loss/asr": 0.5, "grad_norm": float("inf"), "gpu": None})
    monitor.close()
    (line,) = lines(tmp_path)
    assert line.pop("time") == pytest.approx(1.9e9, rel=0.2)
    assert line == {"step": 1, "loss/asr": 0.5, "grad_norm": None}
    assert points(tmp_path, "loss/asr") == [(1, 0.5)]
    assert points(tmp_path, "grad_norm") == [(1, float("inf"))]
    assert "gpu" not in events(tmp_path).Tags()["scalars"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    monitor = Monitor.create(tmp_path, 1, False)
    monitor.scalars(1, {"loss": 1.0})
    monitor.texts(1, "samples", "text")
    monitor.audio(1, "samples", torch.zeros(4), 16_000)
    monitor.close()
    assert type(monitor) is NullMonitor and not list(tmp_path.iterdir())


@pytest.mark.parametrize("private", [False, True])
def test_texts_and_sounds_only_in_public_runs(tmp_path: Path, private: bool) -> None:
    monitor = Monitor.create(tmp_path, 0, private)
    monitor.texts(1, "samples", "환자는 기침")
    monitor.audio(1, "samples", torch.linspace(-1, 1, 160), 16_000)
    monitor.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert ("환자는 기침".encode() in written) is not private
    assert (b"RIFF" in written) is not private


def test_a_sound_is_what_was_given(tmp_path: Path) -> None:
    monitor = Monitor.create(tmp_path, 0, False)
    samples = torch.sin(torch.arange(800) / 10)
    monitor.audio(3, "previews/asr/1", samples, 16_000)
    monitor.close()
    (event,) = events(tmp_path).Audio("previews/asr/1")
    assert (event.step, event.sample_rate) == (3, 16_000)
    with wave.open(BytesIO(event.encoded_audio_string)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16_000, 1, 800)
        heard = np.frombuffer(file.readframes(800), np.int16) / 32767
    assert np.abs(heard - samples.numpy()).max() < 1e-4


def test_the_charts_of_the_layout(tmp_path: Path) -> None:
    """What TensorBoard reads back, and that every pattern fits a tag of a training run."""
    record(tmp_path, range(1, 2), 1.0)
    (event,) = events(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    there = ["tasks", "training", "speed", *(["GPU"] if torch.cuda.is_available() else [])]
    assert [group.title for group in layout.category] == there
    charts = {(g.title, c.title): list(c.multiline.tag) for g in layout.category for c in g.chart}
    assert charts == {(group, title): p for group in there for title, p in LAYOUT[group].items()}
    patterns = [pattern for charts in LAYOUT.values() for tags in charts.values() for pattern in tags]
    known = (
        "loss/asr val_loss/asr eval_asr/cer eval_sqa/rouge_l_f1 eval_tqa/rouge_l_f1 eval/macro mix/asr "
        "target_token_share/asr interference/cosine_asr_sqa speed/mfu speed/tokens_per_second speed/samples_per_second "
        "speed/padding_share speed/rank_spread speed/eta_hours "
        "gpu0/memory_gib gpu0/utilisation_percent gpu0/power_w gpu0/energy_wh train/loss "
        "train/learning_rate train/grad_norm train/stage train/clip_share train/skipped_steps"
    ).split()
    assert not [tag for tag in known if not any(re.search(pattern, tag) for pattern in patterns)]
    assert not [pattern for pattern in patterns if not any(re.search(pattern, tag) for tag in known)]
    assert re.search(charts["tasks", "loss"][0], "train/loss") is None


def test_files_are_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch(0o644)
    (tmp_path / "tensorboard").mkdir(0o755)
    record(tmp_path, range(1, 3), 1.0)
    assert stat.S_IMODE((tmp_path / "metrics.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "tensorboard").stat().st_mode) == 0o700


def test_resume_replaces_the_steps_after_the_checkpoint(tmp_path: Path, messages: Log) -> None:
    record(tmp_path, range(1, 6), 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # a kill in the middle of a line
    record(tmp_path, range(4, 7), 2.0, start_step=3)
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == expected
    assert points(tmp_path, "loss") == expected
    assert "dropped 3 lines" in messages.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_points_after_the_start_step_are_hidden_though_none_replaces_them(tmp_path: Path) -> None:
    record(tmp_path, range(1, 6), 1.0)
    record(tmp_path, range(0), 2.0, start_step=3)
    assert points(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 1.0)]
    record(tmp_path, range(9, 10), 2.0, start_step=3)
    assert points(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (9, 2.0)]


@pytest.mark.parametrize("end", ['{"step": 2, "loss": 9.0}', "\x00\x00", "[]\n", "{}\n"])
def test_a_damaged_last_line_is_dropped(tmp_path: Path, end: str) -> None:
    record(tmp_path, range(1, 2), 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(end)
    record(tmp_path, range(2, 3), 2.0, start_step=2)
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 2.0]


def test_resume_with_nothing_to_drop_keeps_the_file(tmp_path: Path, messages: Log) -> None:
    record(tmp_path, range(1, 4), 1.0)
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    record(tmp_path, range(4, 5), 1.0, start_step=3)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode and len(lines(tmp_path)) == 4
    assert not messages.text


def test_a_record_that_cannot_be_opened_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="--output_dir"):
        Monitor.create(tmp_path, 0, False)


def test_unusable_tensorboard_is_said_once(tmp_path: Path, messages: Log) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    record(tmp_path, range(1, 4), 1.0)
    assert len(lines(tmp_path)) == 3
    assert messages.text.count("TensorBoard is off") == 1


def test_a_full_disk_loses_whole_lines_and_is_said_once(tmp_path: Path) -> None:
    """The file may grow to 150 bytes: the first lines are whole, the rest is missing, nothing is raised."""
    script = """
        import sys, pathlib
        from voxtral_dist.monitor import Monitor
        monitor = Monitor(pathlib.Path(sys.argv[1]), False)
        monitor._tensorboard.close()
        [monitor.scalars(step, {"loss": 1.0}) for step in range(1, 9)]
    """

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150))

    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert done.stderr.count("a line is lost") == 1


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[EvalData, Evaluation]:
    """Five dev rows of each task, decoded."""
    root, demo, model = (
        tmp_path_factory.mktemp("previews"),
        load_script("tools/compose_demo.py"),
        str(tiny_model),
    )
    demo.compose(root, demo.Settings(train_rows=1, dev_rows=5), demo.load_bank(demo.BANK))
    folders = pack([root / f"{task}.dev.jsonl" for task in TASKS], root / "shards", split="dev")
    collator = Collator(TekkenVocabulary.load(model), AudioSpec.from_config(read_config(model)))
    data = EvalData(open_tasks([str(folder) for folder in folders], collator), collator, 128)
    result = evaluate(load(model, torch.float32), data, DecodeSettings(4, max_new_tokens=3))
    assert result is not None
    return data, result


def test_places_lead_back_to_the_examples(evaluated: tuple[EvalData, Evaluation]) -> None:
    data, result = evaluated
    found = [data.tasks[task].locate(example) for task, example in result.places]
    assert [shards.sample(place).id for shards, place in found] == [r["id"] for r in result.predictions]
    assert not any("place" in record for record in (*result.predictions, *result.timings))


def test_previews_can_be_read_and_heard(evaluated: tuple[EvalData, Evaluation], tmp_path: Path) -> None:
    """A text per task at every evaluation, the sounds of two rows of each task with audio at the first."""
    data, result = evaluated
    monitor = Monitor.create(tmp_path, 0, False)
    for step in (0, 4):
        show_previews(monitor, data, result, step, private=False)
    monitor.close()
    found = events(tmp_path)
    assert found.Tags()["audio"] == [f"previews/{task}/{n}" for task in ("asr", "sqa") for n in (1, 2)]
    for tag in found.Tags()["audio"]:
        (event,) = found.Audio(tag)
        _, task, number = tag.split("/")
        record = [r for r in result.predictions if r["task"] == task][int(number) - 1]
        assert event.step == 0
        assert event.length_frames == pytest.approx(record["duration"] * 16_000, abs=8)
    for task in TASKS:
        texts = found.Tensors(f"previews/{task}/text_summary")
        assert [text.step for text in texts] == [0, 4]
        shown = texts[0].tensor_proto.string_val[0].decode()
        rows = [r["references"][0] for r in result.predictions if r["task"] == task]
        assert rows[0][:20] in shown and shown.count("\n") == 4


def test_previews_of_a_private_run(evaluated: tuple[EvalData, Evaluation], tmp_path: Path) -> None:
    monitor = Monitor.create(tmp_path, 0, True)
    show_previews(monitor, *evaluated, 0, private=True)
    monitor.close()
    tags = events(tmp_path).Tags()
    assert tags["audio"] == [] and tags["tensors"] == ["custom_scalars__config__"]


class FakeNvml:
    """A device as pynvml shows it: 250.5 W; ``broken`` names the functions that raise."""

    def __init__(self, *broken: str) -> None:
        self.broken = set(broken)
        self.calls = 0
        self.values: dict[str, object] = {
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3 * 2**30),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=87),
            "nvmlDeviceGetPowerUsage": 250_500,
            "nvmlDeviceGetTotalEnergyConsumption": 7_200_000,
        }

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> object:
            self.calls += 1
            if name in self.broken:
                raise RuntimeError("NVML: driver not loaded")
            return self.values.get(name, arguments)

        return call


NO_COUNTER = "nvmlDeviceGetTotalEnergyConsumption"


class FakeClock:
    """Seconds that a test sets."""

    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_gpu_meter_reads_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    readings = {"memory_gib": 3.0, "memory_peak_gib": 3.0, "utilisation_percent": 87.0, "power_w": 250.5}
    expected = {f"gpu{i}/{name}": v for i in range(2) for name, v in {**readings, "energy_wh": 0.0}.items()}
    assert GpuMeter(["GPU-a", "GPU-b"]).read() == expected


def test_peak_memory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter, found = GpuMeter(["GPU-a"]), []
    for gib in (3, 9, 4):
        nvml.values["nvmlDeviceGetMemoryInfo"] = SimpleNamespace(used=gib * 2**30)
        found.append([meter.read()[f"gpu0/memory{name}_gib"] for name in ("", "_peak")])
    assert found == [[3, 3], [9, 9], [4, 9]]


def test_energy_by_the_devices_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Millijoules since the driver was loaded; the meter counts from its first reading."""
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter, found = GpuMeter(["GPU-a"]), []
    for counter in (7_200_000, 10_800_000, 1_000, 3_601_000):  # the driver is loaded anew before the third
        nvml.values[NO_COUNTER] = counter
        found.append(meter.read()["gpu0/energy_wh"])
    assert found == [0.0, 1.0, 1.0, 2.0]


def test_energy_by_power_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 W rising to 300 W over 36 s are 2 Wh; a clock that goes back adds nothing."""
    nvml, clock = FakeNvml(NO_COUNTER), FakeClock()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter, found = GpuMeter(["GPU-a"], clock), []
    for now, watts in ((50.0, 100), (86.0, 300), (20.0, 300), (32.0, 300)):
        clock.now, nvml.values["nvmlDeviceGetPowerUsage"] = now, watts * 1000
        found.append(meter.read()["gpu0/energy_wh"])
    assert found == [0.0, 2.0, 2.0, 3.0]


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_failing_nvml_is_said_once(broken: str, monkeypatch: pytest.MonkeyPatch, messages: Log) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken))
    meter = GpuMeter(["GPU-a"])
    assert [meter.read(), meter.read()] == [{}, {}]
    assert messages.text.count("driver not loaded") == 1


@pytest.mark.parametrize(
    ("broken", "missing"),
    [
        ("nvmlDeviceGetMemoryInfo", {"memory_gib", "memory_peak_gib"}),
        ("nvmlDeviceGetUtilizationRates", {"utilisation_percent"}),
        ("nvmlDeviceGetPowerUsage", {"power_w"}),
    ],
)
def test_one_failing_reading_is_absent_and_said_once(
    broken: str, missing: set[str], monkeypatch: pytest.MonkeyPatch, messages: Log
) -> None:
    nvml = FakeNvml(broken)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = GpuMeter(["GPU-a"])
    first, second = meter.read(), meter.read()
    assert messages.text.count("driver not loaded") == 1 and set(first) == set(second)
    nvml.broken.clear()
    assert set(meter.read()) - set(second) == {f"gpu0/{name}" for name in missing}


def test_without_power_and_counter_there_is_no_energy(monkeypatch: pytest.MonkeyPatch, messages: Log) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(NO_COUNTER, "nvmlDeviceGetPowerUsage"))
    assert "gpu0/energy_wh" not in GpuMeter(["GPU-a"]).read()
    assert messages.text.count("driver not loaded") == 1


def test_missing_pynvml(monkeypatch: pytest.MonkeyPatch, messages: Log) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = GpuMeter(["GPU-a"])
    assert [meter.read(), meter.read()] == [{}, {}] and len(messages.records) == 1


def test_no_device_asks_nothing(monkeypatch: pytest.MonkeyPatch, messages: Log) -> None:
    nvml = FakeNvml("nvmlInit")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert GpuMeter([]).read() == {} and nvml.calls == 0 and not messages.records


@pytest.mark.gpu
def test_gpu_meter_on_a_real_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = GpuMeter().read()
    assert 0 < values["gpu0/memory_gib"] < 1024 and 0 <= values["gpu0/utilisation_percent"] <= 100


@pytest.mark.parametrize(
    ("rank", "debug", "shown"),
    [(0, False, ["info", "WARNING [rank 0] bad"]), (3, False, ["WARNING [rank 3] bad"])],
)
def test_logger_by_rank(rank: int, debug: bool, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(7, debug=True)
    setup_logging(rank, debug)
    log = get_logger("voxtral_dist.trainer")
    log.debug("detail")
    log.info("info")
    log.warning("bad")
    out, err = capsys.readouterr()
    assert [line.split(" ", 1)[1] for line in err.splitlines()] == shown and not out


def test_debug_shows_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(2, debug=True)
    get_logger("launch").debug("detail")
    assert "DEBUG [rank 2] detail" in capsys.readouterr().err


def test_libraries_are_quiet_even_when_imported_later() -> None:
    """DeepSpeed sets its own level at import, after our set-up."""
    script = """
        from voxtral_dist.logger import setup_logging
        setup_logging(0)
        from deepspeed.utils import logger
        from transformers.utils import logging
        logger.warning("ds chatter"); logging.get_logger("transformers.models").warning("hf chatter")
        logger.error("ds trouble"); logging.get_logger("transformers.models").error("hf trouble")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    shown = done.stdout + done.stderr
    assert "chatter" not in shown and "ds trouble" in shown and "hf trouble" in shown
