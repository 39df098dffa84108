"""Remote corpora: fetched whole or not at all, whatever the remote does; a failure names the file and never hangs."""

import http.server
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import fsspec
import pytest

from modernenc.data.blocks import Corpus
from modernenc.data.store import Store
from modernenc.hashing import hash_file
from support.commands import command, importing
from support.damage import flip, truncate
from support.remotes import Odd
from support.results import FINAL, same
from support.runs import SMALL, train

BIG = 48 << 20


class Server:
    """An S3-compatible server in a process of its own, and the variables that lead to it."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.url).close()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("the server did not start")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, corpus_root: Path) -> Iterator[Server]:
    for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    boto3 = pytest.importorskip("boto3", reason="serves a corpus from S3")
    pytest.importorskip("s3fs", reason="reads a corpus from S3: the extra [s3]")
    server = Server()
    monkeypatch.setenv("S3_ENDPOINT_URL", server.url)
    client = boto3.client("s3", endpoint_url=server.url)
    client.create_bucket(Bucket="corpora")
    for path in corpus_root.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "corpora", f"small/{path.relative_to(corpus_root)}")
    yield server
    server.stop()


def upload(server: Server, key: str, path: Path) -> None:
    import boto3

    boto3.client("s3", endpoint_url=server.url).upload_file(str(path), "corpora", key)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_from_s3_is_the_run_from_disk(s3, corpus_root, small_run, tmp_path, workers):
    local = train(small_run())
    settings = [
        "data.root=s3://corpora/small",
        f"data.cache={tmp_path / 'cache'}",
        f"data.workers={workers}",
        f"run_dir={tmp_path / 'remote'}",
    ]
    remote = train(small_run(*settings))
    assert same(local / FINAL, remote / FINAL)
    shards = [name for name in files(tmp_path / "cache") if name.endswith(".mds")]
    assert shards
    for name in shards:
        assert hash_file(tmp_path / "cache" / name) == hash_file(corpus_root / name.partition("/")[2])


@pytest.mark.slow
def test_a_missing_object_is_named_after_three_attempts(s3, tmp_path):
    store = Store("s3://corpora/small", str(tmp_path), timeout_s=2)
    with pytest.raises(
        ConnectionError, match=r"s3://corpora/small/nothing.mds could not be fetched, tried 3 times: .*does not exist"
    ):
        store.shard("nothing.mds", 10, "0" * 16)
    assert files(tmp_path) == []


@pytest.mark.slow
def test_a_server_killed_during_a_transfer_leaves_no_file(s3, tmp_path):
    source = tmp_path / "big"
    source.write_bytes(os.urandom(BIG))
    upload(s3, "small/big", source)
    cache = tmp_path / "cache"
    store = Store("s3://corpora/small", str(cache), timeout_s=2)
    seen = []

    def kill_when_it_flows() -> None:
        while not seen:
            seen.extend(path.stat().st_size for path in cache.rglob("*big.part*") if path.stat().st_size)
        s3.process.kill()

    killer = threading.Thread(target=kill_when_it_flows)
    killer.start()
    with pytest.raises(ConnectionError, match=r"s3://corpora/small/big could not be fetched"):
        store.shard("big", BIG, hash_file(source))
    killer.join()
    assert 0 < seen[0] < BIG
    assert files(cache) == []


@pytest.mark.slow
def test_a_silent_server_times_out(s3, tmp_path):
    give_up_on_silence(s3, tmp_path)


def give_up_on_silence(server: Server, cache: Path) -> None:
    """Fetch from a server that stops answering."""
    store = Store("s3://corpora/small", str(cache), timeout_s=1)
    store.file("manifest.json")
    server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ConnectionError, match=r"tokenizer\.json could not be fetched"):
            store.file("tokenizer.json")
    finally:
        server.process.send_signal(signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.wall_clock
def test_a_silent_server_times_out_in_seconds(s3, tmp_path):
    started = time.monotonic()
    give_up_on_silence(s3, tmp_path)
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_run_stops_and_names_the_object_that_is_missing(s3, small_run, tmp_path, corpus_root):
    """In the trainer's process and in a loader worker."""
    import boto3

    client = boto3.client("s3", endpoint_url=s3.url)
    for path in corpus_root.glob("docstrings/slice-000/bucket-*/*.mds"):
        client.delete_object(Bucket="corpora", Key=f"small/{path.relative_to(corpus_root)}")
    for workers in (0, 1):
        settings = ["data.root=s3://corpora/small", f"data.cache={tmp_path / 'cache'}", f"data.workers={workers}"]
        result = command(
            "modernenc.train", "+recipe=demo", *SMALL, *settings, f"run_dir={tmp_path / str(workers)}", timeout_s=120
        )
        assert result.returncode == 2
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: s3://corpora/small/docstrings/slice-000/bucket-"), result.stderr
        assert "could not be fetched" in last


@pytest.fixture
def shard(corpus_root: Path) -> str:
    return str(next(corpus_root.glob("code/slice-000/bucket-*/*.mds")).relative_to(corpus_root))


def test_a_local_folder_may_have_a_cache(corpus_root, tmp_path, shard):
    corpus = Corpus(Store(str(corpus_root), str(tmp_path)))
    there, here = Corpus(Store(str(corpus_root))).open("code/slice-000"), corpus.open("code/slice-000")
    assert [here.read(0, index).tokens.tolist() for index in range(3)] == [
        there.read(0, index).tokens.tolist() for index in range(3)
    ]
    assert any(name.endswith(".mds") for name in files(tmp_path))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses in seconds between one try and the next, which are not made."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_copy_is_fetched_again(corpus_root, tmp_path, damage):
    Corpus(Store(str(corpus_root), str(tmp_path))).open("code/slice-000").read(0, 0)
    copy = next(tmp_path.rglob("*.mds"))
    whole = copy.read_bytes()
    damage(copy)
    block = Corpus(Store(str(corpus_root), str(tmp_path))).open("code/slice-000").read(0, 0)
    assert copy.read_bytes() == whole
    assert block.tokens.tolist() == Corpus(Store(str(corpus_root))).open("code/slice-000").read(0, 0).tokens.tolist()


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_shard_damaged_at_its_source_is_refused(corpus_root, tmp_path, shard, damage, pauses):
    root = tmp_path / "root"
    shutil.copytree(corpus_root, root)
    for path in root.glob("code/slice-000/bucket-*/*.mds"):
        damage(path)
    with pytest.raises(ConnectionError, match=r"\.mds could not be fetched, tried 3 times: .*expected"):
        Corpus(Store(str(root), str(tmp_path / "cache"))).open("code/slice-000").read(0, 0)
    assert pauses == [1, 2]
    assert not [name for name in files(tmp_path / "cache") if ".mds" in name]


def test_unfinished_downloads_of_killed_processes_are_deleted_and_those_of_live_ones_are_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    stale, live, elsewhere = (
        tmp_path / f".{owner}@1@shard.mds.part" for owner in (f"{host}@{ended.pid}", f"{host}@{os.getpid()}", "other@1")
    )
    for part in (stale, live, elsewhere):
        part.write_bytes(b"half")
    Store("s3://corpora/small", str(tmp_path))
    assert not stale.exists()
    assert live.exists() and elsewhere.exists()


@pytest.mark.slow
def test_two_corpora_may_share_a_cache(corpus_root, tmp_path):
    other = Path(shutil.copytree(corpus_root, tmp_path / "other"))
    (other / "manifest.json").write_text("{}")
    stores = [Store(str(root), str(tmp_path / "cache")) for root in (corpus_root, other)]
    assert stores[1].file("manifest.json").read_text() == "{}"
    assert stores[0].file("manifest.json").read_bytes() == (corpus_root / "manifest.json").read_bytes()
    assert stores[1].file("manifest.json") != stores[0].file("manifest.json")


def test_a_full_disk_of_the_cache_is_reported(corpus_root, small_disk):
    disk = small_disk(1)
    (disk / "ballast").write_bytes(bytes(1000 << 10))
    with pytest.raises(OSError, match=rf"data.cache={disk}: No space left on device, wanted for .*make room"):
        Corpus(Store(str(corpus_root), str(disk))).open("code/slice-000").read(0, 0)
    assert "ballast" in files(disk) and not any(".mds" in name for name in files(disk))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("s3://corpora/small", r"data.root=s3://corpora/small is remote: give data.cache=FOLDER"),
        ("hf://datasets/org/name/small", r"expected hf://datasets/<org>/<name>@<revision>"),
        ("hf://models/org/name@1/small", r"expected hf://datasets/<org>/<name>@<revision>"),
        ("azure://container/small", r"data.root=azure://container/small: no file system for azure://; expected s3://, gs://.*"),
        ("C://small", r"data.root=C://small: no file system for C://"),
        ("simplecache::s3://small", r"data.root=simplecache::s3://small: no file system for simplecache::s3://"),
    ],
)
def test_a_remote_without_cache_revision_or_file_system_is_refused(root, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Store(root, "" if root.startswith("s3") else str(tmp_path))


def test_a_missing_library_is_named_with_the_extra_to_install(tmp_path):
    """In a process of its own, in which none can be imported."""
    libraries = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "sftp": "paramiko"}
    code = (
        "import sys; from modernenc.data.store import Store\n"
        f"for scheme, library in {libraries}.items():\n"
        "    sys.modules[library] = None\n"
        "    try: Store(f'{scheme}://x/y', sys.argv[1])\n"
        "    except ValueError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    said = result.stdout.splitlines()
    for line, (scheme, library), extra in zip(said, libraries.items(), ("s3", "gcs", "azure", "azure", "sftp"), strict=True):
        assert line.startswith(f"data.root={scheme}://x/y: ") and library in line
        assert line.endswith(f"; pip install 'modernenc[{extra}]'")


@pytest.fixture
def odd(pauses: list[float]) -> None:
    """A file system that fails, tried again without pauses."""
    fsspec.register_implementation("odd", Odd, clobber=True)


def test_any_error_of_a_library_counts_as_a_failed_attempt(odd, tmp_path):
    with pytest.raises(ConnectionError, match=r"odd://x/a could not be fetched, tried 3 times: OddError: out of tokens"):
        Store("odd://x", str(tmp_path)).file("a")
    assert files(tmp_path) == []


def test_a_library_that_never_returns_times_out(odd, tmp_path):
    with pytest.raises(
        ConnectionError, match=r"odd://x/silent could not be fetched, tried 3 times: silent for data.timeout_s="
    ):
        Store("odd://x", str(tmp_path), timeout_s=0.3).file("silent")


@pytest.mark.wall_clock
def test_a_library_that_never_returns_times_out_in_seconds(odd, tmp_path):
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"silent for data\.timeout_s="):
        Store("odd://x", str(tmp_path), timeout_s=0.3).file("silent")
    assert time.monotonic() - started < 5


def test_a_process_can_end_while_a_remote_is_silent(tmp_path):
    """Neither what is fetched now nor what is fetched ahead holds it."""
    code = (
        "import sys, fsspec; from support.remotes import Odd; from modernenc.data.store import Store;"
        "fsspec.register_implementation('odd', Odd);"
        "store = Store('odd://x', sys.argv[1], timeout_s=60); store.prefetch('silent', 1, ''); store.close()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=importing(), check=True, timeout=40)


def test_a_pickled_store_has_no_downloads(corpus_root, tmp_path, shard):
    store = Store(str(corpus_root), str(tmp_path))
    store.prefetch(shard, (corpus_root / shard).stat().st_size, hash_file(corpus_root / shard))
    other = pickle.loads(pickle.dumps(store))
    assert other.shard(shard, (corpus_root / shard).stat().st_size, "").read_bytes() == (corpus_root / shard).read_bytes()
    assert (other.root, other.cache, other.timeout_s) == (store.root, store.cache, store.timeout_s)


class Hub(http.server.BaseHTTPRequestHandler):
    """What a dataset hub answers for one revision of one dataset."""

    root: Path
    REVISION = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        if self.path.startswith(f"/api/datasets/org/name/revision/{self.REVISION}"):
            self._say({"id": "org/name", "sha": self.REVISION, "private": False, "siblings": []})
        elif self.path.startswith(f"/api/datasets/org/name/tree/{self.REVISION}"):
            folder = unquote(self.path.partition("?")[0].partition(self.REVISION)[2]).strip("/")
            inside = self.root / folder.removeprefix("small").strip("/")
            self._say([self._entry(path) for path in sorted(inside.iterdir())] if inside.is_dir() else None)
        else:
            self._answer(body=True)

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        named = json.loads(asked)["paths"] if asked[:1] == b"{" else parse_qs(asked.decode())["paths"]
        if self.path != f"/api/datasets/org/name/paths-info/{self.REVISION}":
            self.send_error(404)
            return
        paths = [self.root / name.removeprefix("small").strip("/") for name in named]
        self._say([self._entry(path) for path in paths if path.exists()])

    def _entry(self, path: Path) -> dict[str, Any]:
        kind = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"}
        return {**kind, "path": str(Path("small") / path.relative_to(self.root)), "oid": "0" * 40}

    def _say(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(404 if value is None else 200)
        for name, said in (("Content-Type", "application/json"), ("Content-Length", str(len(content)))):
            self.send_header(name, said)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        prefix = f"/datasets/org/name/resolve/{self.REVISION}/small/"
        path = self.root / self.path.partition("?")[0].removeprefix(prefix)
        if not self.path.startswith(prefix) or not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        self.send_response(200)
        for key, value in (("ETag", '"x"'), ("X-Repo-Commit", self.REVISION), ("Content-Length", str(len(content)))):
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.mark.slow
def test_a_revision_of_a_hub_dataset_can_be_the_root(corpus_root, tmp_path):
    """In a process of its own: the hub's address is read when its library is imported."""
    handler: Callable = type("Small", (Hub,), {"root": corpus_root})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = (
            "from modernenc.data.blocks import Corpus; from modernenc.data.store import Store; import sys;"
            "print(len(Corpus(Store(sys.argv[1], sys.argv[2])).open('code/slice-000').read(0, 0).tokens))"
        )
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path / "hf"),
        }
        for revision, expected in ((Hub.REVISION, 0), ("f" * 40, 1)):
            root = f"hf://datasets/org/name@{revision}/small"
            result = subprocess.run(
                [sys.executable, "-c", code, root, str(tmp_path / "cache")],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == expected, result.stderr
        server.shutdown()
    assert "could not be fetched" in result.stderr
