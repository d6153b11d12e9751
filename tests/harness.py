"""Real ranks on the CPU: runs a function in N gloo processes and returns what each of them returned."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 240


def load_script(path: str) -> ModuleType:
    """Import a file of tools/ or launch/, which are no packages."""
    name = "script_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``function(rank, *args)`` in ``world_size`` fresh processes of one gloo group.

    Args:
        function: a module-level function that returns something JSON can hold.

    Returns:
        The results in rank order. A rank that fails or hangs fails the test with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            context.Process(
                target=_rank_main, args=(function, rank, world_size, port, folder, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_S)
        for process in processes:
            process.kill()
        results = []
        for rank, process in enumerate(processes):
            path = Path(folder, f"{rank}.json")
            result = (
                json.loads(path.read_text()) if path.exists() else {"error": f"exit code {process.exitcode}"}
            )
            assert "error" not in result, f"rank {rank}: {result['error']}"
            results.append(result["value"])
        return results


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, args: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    import torch

    from voxtral_dist import distributed

    torch.set_num_threads(1)
    try:
        distributed.start(torch.device("cpu"))
        result = {"value": function(rank, *args)}
        distributed.barrier()
    except BaseException:
        result = {"error": traceback.format_exc()}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    if "value" in result:
        distributed.stop()
