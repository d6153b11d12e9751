"""What the monitor writes, what it drops after a kill, and that a failing meter never stops a training."""

from __future__ import annotations

import json
import logging
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from voxtral_dist.errors import UserError
from voxtral_dist.logger import get_logger, setup_logging
from voxtral_dist.monitor import GpuMeter, Monitor, NullMonitor, Throughput

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
    monitor.close()
    assert type(monitor) is NullMonitor and not list(tmp_path.iterdir())


@pytest.mark.parametrize("private", [False, True])
def test_texts_only_in_public_runs(tmp_path: Path, private: bool) -> None:
    monitor = Monitor.create(tmp_path, 0, private)
    monitor.texts(1, "samples", "환자는 기침")
    monitor.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert ("환자는 기침".encode() in written) is not private


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


class FakeNvml:
    """One device as pynvml shows it; ``broken`` names the function that raises."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.calls = 0

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> object:
            self.calls += 1
            if name == self.broken:
                raise RuntimeError("NVML: driver not loaded")
            return {
                "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3 * 2**30),
                "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=87),
                "nvmlDeviceGetPowerUsage": 250_500,
            }.get(name, arguments)

        return call


def test_gpu_meter_reads_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    values = {"memory_gib": 3.0, "utilisation_percent": 87.0, "power_w": 250.5}
    assert GpuMeter(["GPU-a", "GPU-b"]).read() == {
        f"gpu{i}/{name}": v for i in range(2) for name, v in values.items()
    }


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetPowerUsage"])
def test_failing_nvml_is_said_once(broken: str, monkeypatch: pytest.MonkeyPatch, messages: Log) -> None:
    nvml = FakeNvml(broken)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = GpuMeter(["GPU-a"])
    assert [meter.read(), meter.read()] == [{}, {}]
    assert messages.text.count("driver not loaded") == 1


def test_missing_pynvml(monkeypatch: pytest.MonkeyPatch, messages: Log) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMeter(["GPU-a"]).read() == {} and len(messages.records) == 1


def test_no_device_asks_nothing(monkeypatch: pytest.MonkeyPatch, messages: Log) -> None:
    nvml = FakeNvml("nvmlInit")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert GpuMeter([]).read() == {} and nvml.calls == 0 and not messages.records


@pytest.mark.gpu
def test_gpu_meter_on_a_real_device() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = GpuMeter().read()
    assert 0 < values["gpu0/memory_gib"] < 1024 and 0 <= values["gpu0/utilisation_percent"] <= 100


def test_throughput_between_two_log_lines() -> None:
    now = 100.0
    throughput = Throughput(clock=lambda: now)
    throughput.add(tokens=300, samples=3, audio_seconds=20.0, padding=100, data_wait=0.5)
    throughput.add(tokens=300, samples=5, audio_seconds=0.0, padding=100, data_wait=0.5)
    now = 104.0
    assert throughput.take() == {
        "tokens_per_second": 150.0,
        "samples_per_second": 2.0,
        "audio_seconds_per_second": 5.0,
        "padding_share": 0.25,
        "data_wait_share": 0.25,
    }
    throughput.add(tokens=10, samples=1, audio_seconds=0.0, padding=0, data_wait=0.0)
    now = 105.0
    assert throughput.take()["tokens_per_second"] == 10.0


def test_throughput_without_time_or_tokens_is_not_measured() -> None:
    assert set(Throughput(clock=lambda: 1.0).take().values()) == {None}


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
