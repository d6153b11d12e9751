"""Shards through the local cache, from a real https server and from folders: same bytes, each fetched once, bounded."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import load_script

from voxtral_dist import shard_cache, shard_source
from voxtral_dist.audio import AudioSpec
from voxtral_dist.collator import Collator
from voxtral_dist.data import TrainData, TrainSettings
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.packing import pack
from voxtral_dist.plan import SHARD_BLOCK
from voxtral_dist.shard_cache import GB, ShardCache, ShardReadAhead
from voxtral_dist.shards import ShardSet, _copy_reader
from voxtral_dist.step_loader import StepLoader
from voxtral_dist.task_data import open_tasks
from voxtral_dist.tokenizer import TekkenVocabulary

ROOT = Path(__file__).resolve().parent.parent
MISSING = [tool for tool in ("curl", "openssl") if shutil.which(tool) is None]
needs_server = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
SHARDS = 40
KEY = "0123456789ab"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 40 text shards."""
    folder = tmp_path_factory.mktemp("packed")
    rows = [{"instruction": f"What is {n}+1?", "output": str(n + 1)} for n in range(3 * SHARDS)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = pack([folder / "t.jsonl"], folder / "out", shard_bytes=6_200)[0]
    assert len(ShardSet.open(out).shard_names) == SHARDS
    return out


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shard_source, "PAUSE_S", 0.01)
    _copy_reader.cache_clear()
    yield
    _copy_reader.cache_clear()


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder over TLS, counts requests by file name, and misbehaves where a test wants it.

    Attributes:
        broken: how many more answers for a file end in its middle.
        wrong: files of which one byte is another.
        slow: seconds after which each answer ends.
    """

    daemon_threads = True

    def __init__(self, folder: Path, certificate: Path, key: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.folder, self.requests = folder, Counter[str]()
        self.broken, self.wrong, self.slow = Counter[str](), set[str](), 0.0
        self.url = f"https://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, server = self.path.lstrip("/"), self.server
        server.requests[name] += 1
        path = server.folder / name
        if not path.is_file():
            return self.send_error(404)
        data = bytearray(path.read_bytes())
        if name in server.wrong:
            data[len(data) // 2] ^= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        time.sleep(server.slow)
        if server.broken[name] > 0:
            server.broken[name] -= 1
            self.close_connection = True
            return None
        self.wfile.write(data[len(data) // 2 :])
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -addext".split()
    command += ["subjectAltName=IP:127.0.0.1", "-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run(command, check=True, capture_output=True)
    return paths


@pytest.fixture
def server(
    packed: Path, tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    monkeypatch.setenv("CURL_CA_BUNDLE", str(certificate[0]))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shutil.copytree(packed, tmp_path / "served")
    server = Server(tmp_path / "served", *certificate)
    yield server
    server.shutdown()
    server.server_close()


def cache_of(folder: Path, tars: int = SHARDS, packed: Path | None = None) -> ShardCache:
    """A cache with room for so many tars of the test's data set, which are all of about the same size."""
    size = max(ShardSet.open(packed).shard_bytes) if packed else 1 << 20
    cache = ShardCache.from_flags(str(folder / "cache"), tars * size / GB)
    assert cache is not None
    return cache


def tars(cache: ShardCache) -> list[Path]:
    return sorted((cache.folder / "tars").iterdir())


def examples(shards: ShardSet) -> list[object]:
    return [shards.read(n) for n in range(len(shards))]


@needs_server
def test_https_gives_the_same_samples_each_file_once(server: Server, packed: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    remote = ShardSet.open(server.url + "/", cache)
    local = ShardSet.open(packed)
    assert remote.fingerprint == local.fingerprint and remote.folder.is_relative_to(cache.folder)
    assert tars(cache) == [], "a tar is fetched when it is read"
    assert examples(remote) == examples(local)
    assert (remote.n_samples == local.n_samples).all() and remote.sample(5) == local.sample(5)
    again = ShardSet.open(server.url, cache_of(tmp_path))
    _copy_reader.cache_clear()
    assert examples(again) == examples(local)
    counts = Counter({n: 1 for s in local.shard_names for n in (s, s.replace(".tar", ".idx"))})
    assert server.requests == counts + Counter({"manifest.json": 2})
    assert [path.name for path in tars(cache)] == sorted(f"{sha}.tar" for sha in local.shard_sha256)


def test_a_folder_is_read_through_the_cache(packed: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(packed, source)
    shards = ShardSet.open(source, cache_of(tmp_path))
    expected = examples(ShardSet.open(packed))
    assert examples(shards) == expected
    for path in source.glob("*.tar"):
        path.unlink()
    _copy_reader.cache_clear()
    assert examples(shards) == expected, "the copies are what is read"
    ShardSet.open(packed).fetch(0)  # nothing to do


@needs_server
@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_wrong_byte_is_refused_and_never_visible(server: Server, tmp_path: Path, suffix: str) -> None:
    cache = cache_of(tmp_path)
    name = f"tqa-train-000003{suffix}"
    server.wrong.add(name)
    with pytest.raises(
        VoxtralDistError, match=rf"{server.url}/{name}: .*hash is not the manifest's"
    ) as error:
        ShardSet.open(server.url, cache).fetch(3)
    assert server.requests[name] == shard_source.TRIES and "\n" not in str(error.value)
    assert tars(cache) == [] and not list((cache.folder / "sets").rglob(f"*3{suffix}*tmp*"))
    server.wrong.clear()
    ShardSet.open(server.url, cache).read(9)


@needs_server
def test_what_fails_twice_is_tried_again_what_is_missing_is_named(server: Server, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    server.broken.update({"manifest.json": 2, "tqa-train-000000.idx": 2, "tqa-train-000000.tar": 2})
    shards = ShardSet.open(server.url, cache)
    assert shards.read(0).key
    assert [server.requests[name] for name in ("manifest.json", "tqa-train-000000.tar")] == [3, 3]
    (server.folder / shards.shard_names[1]).unlink()
    with pytest.raises(VoxtralDistError, match=rf"{server.url}/tqa-train-000001.tar: not fetched.*curl.* 22"):
        shards.fetch(1)
    with pytest.raises(VoxtralDistError, match=r"nowhere/manifest.json: not fetched in 4 tries"):
        ShardSet.open(f"{server.url}/nowhere", cache)


@needs_server
def test_two_processes_fetch_a_shard_once(server: Server, packed: Path, tmp_path: Path) -> None:
    server.slow = 0.05
    script = """if True:
        import sys
        from pathlib import Path
        from voxtral_dist.shards import ShardSet
        from voxtral_dist.shard_cache import ShardCache
        shards = ShardSet.open(sys.argv[1], ShardCache.from_flags(sys.argv[2], 1.0))
        print(*[shards.read(n).key for n in range(12)])
    """
    command = [sys.executable, "-c", script, server.url, str(tmp_path / "cache")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT) for _ in range(2)
    ]
    output = [process.communicate(timeout=120)[0] for process in processes]
    assert (
        output[0] == output[1] == " ".join(str(ShardSet.open(packed).read(n).key) for n in range(12)) + "\n"
    )
    assert {name: n for name, n in server.requests.items() if n != 1} == {"manifest.json": 2}


def test_the_bound_holds_and_the_oldest_goes(packed: Path, tmp_path: Path) -> None:
    room = 2 * SHARD_BLOCK + 1
    cache = cache_of(tmp_path, room, packed)
    shards = ShardSet.open(packed, cache)
    used = []
    for shard in range(SHARDS):
        record = shards.read(3 * shard)
        used.append(sum(path.stat().st_size for path in tars(cache)))
        assert record == ShardSet.open(packed).read(3 * shard)
        os.utime(tars(cache)[0].parent / f"{shards.shard_sha256[shard]}.tar", (shard, shard))  # a clear order
    assert max(used) <= cache.bound and len(tars(cache)) == room
    kept = {f"{sha}.tar" for sha in shards.shard_sha256[-room:]}
    assert {path.name for path in tars(cache)} == kept
    assert shards.read(0).key, "deleted, but still open"
    _copy_reader.cache_clear()
    assert shards.read(0).key and sum(path.stat().st_size for path in tars(cache)) <= cache.bound


def test_the_bound_holds_while_many_threads_fetch(packed: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 2 * SHARD_BLOCK, packed)
    shards = ShardSet.open(packed, cache)

    def fetch(shard: int) -> int:
        shards.fetch(shard % SHARDS)
        while True:
            with suppress(FileNotFoundError), shard_source.locked(cache.folder / "locks/room.lock"):
                return sum(path.stat().st_size for path in tars(cache))

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(fetch, range(3 * SHARDS))) <= cache.bound


@needs_server
def test_a_tar_that_still_arrives_counts_in_full(server: Server, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    shards = ShardSet.open(server.url, cache)
    server.slow = 1.0
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(shards.fetch, 0)
        wait_until(lambda: bool(tars(cache)) and tars(cache)[0].stat().st_size > 0)
        (arriving,) = tars(cache)
        assert ".tmp-" in arriving.name and arriving.stat().st_size == shards.shard_bytes[0]
        assert not fetched.done()


def test_a_tar_that_is_read_again_stays(packed: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 2 * SHARD_BLOCK, packed)
    shards = ShardSet.open(packed, cache)
    for shard in range(2 * SHARD_BLOCK):
        shards.fetch(shard)
        os.utime(cache.folder / "tars" / f"{shards.shard_sha256[shard]}.tar", (shard, shard))
    shards.fetch(0)
    shards.fetch(2 * SHARD_BLOCK)
    names = [path.stem for path in tars(cache)]
    assert shards.shard_sha256[0] in names and shards.shard_sha256[1] not in names


def test_a_bound_below_two_blocks_names_what_is_needed(packed: Path, tmp_path: Path) -> None:
    assert shard_cache.SHARDS_NEEDED == 2 * SHARD_BLOCK
    cache = cache_of(tmp_path, 2 * SHARD_BLOCK - 1, packed)
    with pytest.raises(UserError, match=r"too small: 32 shards of each of tqa .* at least 0\.001"):
        ShardSet.open(packed, cache)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch MARKER",
        "pipe:touch${IFS}MARKER",
        "file:FOLDER",
        "file://FOLDER",
        "http://127.0.0.1/x",
        "gs://bucket/x",
        "HTTPS://127.0.0.1/x",
        "https://127.0.0.1/x; touch MARKER",
        "https://127.0.0.1/'; touch MARKER; '",
        'https://127.0.0.1/"$(touch MARKER)"',
        "https://127.0.0.1/`touch MARKER`",
        "https://127.0.0.1/a\ntouch MARKER",
        "https://127.0.0.1/a\n",
        "https://127.0.0.1/a{b,c}[1-9]",
        "https://127.0.0.1/a?b&touch MARKER",
        "https://user:secret@127.0.0.1/a",
        "https://-oMARKER/a",
        "s3://bucket/$(touch MARKER)",
        "s3://",
    ],
)
def test_other_urls_are_refused_before_anything_runs(
    url: str, tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    started: list[object] = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *args, **kw: started.append(args))
    for cache in (None, cache_of(tmp_path)):
        with pytest.raises(UserError, match="is not opened") as error:
            ShardSet.open(url.replace("MARKER", str(marker)).replace("FOLDER", str(packed)), cache)
        assert "\n" not in str(error.value)
    assert not marker.exists() and not started


def test_a_hostile_manifest_names_no_other_file(packed: Path, tmp_path: Path) -> None:
    from voxtral_dist.shard_format import fingerprint

    folder = tmp_path / "set"
    shutil.copytree(packed, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for field, value in (
        ("sha256", "../../x"),
        ("index_sha256", "../x"),
        ("bytes", "1"),
        ("name", "a b.tar"),
    ):
        shards = [{**manifest["shards"][0], field: value}, *manifest["shards"][1:]]
        hostile = {**manifest, "shards": shards, "fingerprint": fingerprint("tqa", shards)}
        (folder / "manifest.json").write_text(json.dumps(hostile))
        with pytest.raises(UserError, match="damaged manifest"):
            ShardSet.open(folder, cache_of(tmp_path))


@needs_server
def test_a_foreign_shard_name_that_a_shell_would_read_is_refused(server: Server, tmp_path: Path) -> None:
    path = server.folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), "foreign": True}
    manifest["shards"][0]["name"] = "a;touch b.tar"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not opened"):
        ShardSet.open(server.url, cache_of(tmp_path))
    assert set(server.requests) == {"manifest.json"}


def test_flags_say_what_is_missing(packed: Path, tmp_path: Path) -> None:
    assert ShardCache.from_flags("", 1.0) is None
    with pytest.raises(UserError, match="give --shard_cache DIR"):
        ShardSet.open("https://127.0.0.1/x")
    with pytest.raises(UserError, match="name a local folder"):
        ShardCache.from_flags("https://127.0.0.1/x", 1.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        ShardCache.from_flags(str(tmp_path / "file"), 1.0)
    with pytest.raises(UserError, match="no manifest"):
        ShardSet.open(tmp_path, cache_of(tmp_path))


def test_s3_goes_to_the_aws_command_without_a_shell(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin/aws"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$#:$*" >> "{tmp_path}/calls"\nexec cat "{packed}/${{4##*/}}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    shards = ShardSet.open("s3://bucket/tqa/train", cache_of(tmp_path))
    assert shards.read(0) == ShardSet.open(packed).read(0)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "5:s3 cp --only-show-errors s3://bucket/tqa/train/manifest.json -"
    assert calls[-1].endswith("tqa-train-000000.tar -")


@needs_server
def test_token_counts_come_along_where_there_are_any(server: Server, tmp_path: Path) -> None:
    for number in range(SHARDS):
        (server.folder / f"tqa-train-{number:06d}.tokens.{KEY}.safetensors").write_bytes(
            b"counts %d" % number
        )
    shards = ShardSet.open(server.url, cache_of(tmp_path))
    shards.fetch_counts(KEY)
    assert (shards.folder / f"tqa-train-000039.tokens.{KEY}.safetensors").read_bytes() == b"counts 39"
    asked = server.requests.total()
    shards.fetch_counts(KEY)
    assert server.requests.total() == asked
    shards.fetch_counts("none")
    assert server.requests.total() < asked + SHARDS and not list(shards.folder.glob("*none*"))


@needs_server
def test_training_data_through_the_cache_is_the_same(server: Server, packed: Path, tmp_path: Path) -> None:
    """The first process of the machine counts tokens, another one waits for it; both read what lies at the source."""
    model = tmp_path / "model"
    load_script("tools/build_tiny_voxtral.py").build(model)
    collator = Collator(TekkenVocabulary.load(str(model)), AudioSpec(128, 200, 25))
    cache = cache_of(tmp_path)
    near = TrainData(open_tasks([packed], collator), collator, TrainSettings(4, 4, 512))
    far = TrainData(open_tasks([server.url], collator, (0, 1), cache), collator, TrainSettings(4, 4, 512))
    other = TrainData(open_tasks([server.url], collator, None, cache), collator, TrainSettings(4, 4, 512))
    shards = ShardSet.open(packed)
    for number in (0, SHARDS - 1):
        ids = np.array([shards.starts[number], shards.starts[number + 1] - 1])
        assert [shard for _, shard in far.tasks[0].shards_of(ids)] == [number]
    assert far.identity() == near.identity() and far.plan.digest(0, 8) == near.plan.digest(0, 8)
    batches = [
        [batch for _, share in StepLoader(data, 0, 1).steps(0) for batch in share]
        for data in (near, far, other)
    ]
    assert len(batches[0]) == len(batches[1]) == len(batches[2]) > 1
    for one, *others in zip(*batches, strict=True):
        for another in others:
            assert one.keys == another.keys and torch.equal(one.input_ids, another.input_ids)
            assert one.audio is None or torch.equal(one.audio, another.audio)
    assert all(server.requests[Path(name).name] == 1 for name in shards.shard_names)


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@needs_server
def test_read_ahead_keeps_within_half_of_the_bound(server: Server, packed: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, SHARDS, packed)
    shards = ShardSet.open(server.url, cache)
    order = [(shards, n // 3) for n in range(3 * SHARDS)]
    with ShardReadAhead(iter(order), cache):
        wait_until(lambda: len(tars(cache)) == SHARDS // 2)
        time.sleep(0.2)
        assert len(tars(cache)) == SHARDS // 2, "as far as it may go"
        shards.read(3 * 4)  # the fifth shard: five more may come
        wait_until(lambda: len(tars(cache)) == SHARDS // 2 + 5)
        for shard in range(SHARDS):
            shards.read(3 * shard)
    assert {server.requests[name] for name in shards.shard_names} == {1}


@needs_server
def test_read_ahead_leaves_errors_to_the_reader(server: Server, packed: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, SHARDS, packed)
    shards = ShardSet.open(server.url, cache)
    (server.folder / shards.shard_names[0]).unlink()

    def order() -> Iterator[tuple[ShardSet, int]]:
        yield from ((shards, 0), (shards, 1))
        raise RuntimeError("the plan ends")

    with ShardReadAhead(order(), cache) as ahead:
        wait_until(lambda: not ahead._thread.is_alive())
    assert [path.stem for path in tars(cache)] == [shards.shard_sha256[1]]
    with pytest.raises(VoxtralDistError, match="000000"):
        shards.read(0)


@needs_server
def test_close_ends_a_transfer_at_once(server: Server, packed: Path, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, SHARDS, packed)
    shards = ShardSet.open(server.url, cache)
    server.slow = 30.0
    ahead = ShardReadAhead([(shards, 0)], cache)
    wait_until(lambda: server.requests[shards.shard_names[0]] == 1)
    began = time.monotonic()
    ahead.close()
    assert time.monotonic() - began < 2 and not ahead._thread.is_alive()
    assert tars(cache) == []
