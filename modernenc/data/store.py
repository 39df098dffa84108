"""Where the files of a corpus are: a local folder, or a remote one whose files are copied to a cache as they are needed.

A remote is any that fsspec has a file system for (s3://, gs://, az://, sftp://, ...), whose settings are given as fsspec takes
them, such as FSSPEC_S3_ANON=true, or `hf://datasets/<org>/<name>@<revision>/<folder>`. A file appears in the cache only whole:
it is fetched beside its place, compared with size and hash, and renamed. What fails is tried again a few times, then raised
with the file's name.
"""

import errno
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from modernenc.hashing import hash_file

ATTEMPTS = 3
_FIRST_PAUSE_S = 1.0
_LOOK_S = 0.2
_AT_A_TIME = 4
_PART = ".part"
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "sftp": "sftp"}
"""What to install for a scheme: `modernenc[...]`."""


class Store:
    """Files by their name under a root.

    `cache` is needed, and used, when the root is a URL; a local folder may have one too, such as a network disk. `timeout_s`
    is how long a remote may be silent. ValueError when a remote has no cache or a dataset no revision, and when nothing that is
    installed reads the remote.
    """

    def __init__(self, root: str, cache: str = "", timeout_s: float = 60) -> None:
        remote = "://" in root
        if remote and not cache:
            raise ValueError(f"data.root={root} is remote: give data.cache=FOLDER, on a fast disk of this machine")
        if remote:
            _check_scheme(root)
        self.root = root.rstrip("/") if remote else str(Path(root).resolve())
        # Two corpora may share a cache: each has a folder there, by its root.
        self.cache = Path(cache).resolve() / xxhash.xxh3_64_hexdigest(self.root.encode()) if cache else None
        self.timeout_s = timeout_s
        self._forget()
        if self.cache is not None:
            _sweep(self.cache.parent)

    def __str__(self) -> str:
        return self.root

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: no threads, no connections."""
        return {"root": self.root, "cache": self.cache, "timeout_s": self.timeout_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def where(self, name: str) -> str:
        """How to call a file in a message."""
        return f"{self.root}/{name}"

    def file(self, name: str) -> Path:
        """A small file, as it is now; FileNotFoundError or ConnectionError, naming it, when it cannot be had."""
        if self.cache is None:
            path = Path(self.root) / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing")
            return path
        self._renew()
        return self._fetch(name)

    def path(self, name: str) -> Path:
        """Where a shard is, or will be."""
        return (self.cache or Path(self.root)) / name

    def shard(self, name: str, size: int, digest: str) -> Path:
        """A shard with its size, fetched and compared with its hash unless it is there."""
        path = self.path(name)
        self._renew()
        if name in self._ahead:
            self._ahead.pop(name).result()
        if self.cache is not None and not (path.is_file() and path.stat().st_size == size):
            self._fetch(name, size, digest)
        return path

    def replace(self, name: str, size: int, digest: str) -> None:
        """Fetch a shard whose copy in the cache is damaged; who reads it meanwhile keeps what it has open."""
        self._renew()
        self._fetch(name, size, digest)

    def prefetch(self, name: str, size: int, digest: str) -> None:
        """Fetch a shard that will be needed, in the background; what fails is raised when it is."""
        self._renew()
        path = self.path(name)
        if self.cache is not None and name not in self._ahead and not (path.is_file() and path.stat().st_size == size):
            self._ahead[name] = self._threads.submit(self._fetch, name, size, digest)

    def close(self) -> None:
        """Fetch no more ahead, and give up what is under way."""
        if self._process == os.getpid():
            self._closed = True
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _forget(self) -> None:
        self._process = 0
        self._closed = False
        self._connection: Any = None
        self._ahead: dict[str, Future[Path]] = {}

    def _renew(self) -> None:
        """Threads and connections do not survive a fork."""
        if self._process != os.getpid() or self._closed:
            self._forget()
            self._process = os.getpid()
            self._threads = ThreadPoolExecutor(_AT_A_TIME, "prefetch")

    def _fetch(self, name: str, size: int | None = None, digest: str = "") -> Path:
        assert self.cache is not None
        target = self.cache / name
        fault = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                if self._closed:
                    break
                time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            # A name for each try: one that was given up may still write.
            part = target.with_name(f"{_own()}@{threading.get_ident()}@{attempt}@{target.name}{_PART}")
            try:
                part.parent.mkdir(parents=True, exist_ok=True)
                part.touch()
                fault = self._download(name, part) or _unlike(part, size, digest)
                if not fault:
                    part.replace(target)
                    return target
            except OSError as error:
                raise OSError(
                    f"data.cache={self.cache.parent}: {error.strerror}, wanted for {name}; make room there"
                ) from error
            finally:
                part.unlink(missing_ok=True)
            self._connection = None
        raise ConnectionError(f"{self.where(name)} could not be fetched, tried {ATTEMPTS} times: {fault}")

    def _download(self, name: str, part: Path) -> str:
        """Copy a file; says what went wrong, nothing when all is well. OSError when it is the disk here that is full."""
        copying = _Attempt(lambda: self._copy(name, part))
        copying.start()
        since, seen = time.monotonic(), ()
        while not self._closed:
            copying.join(_LOOK_S)
            if not copying.is_alive():
                if isinstance(copying.error, OSError) and copying.error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise copying.error
                return _text(copying.error) if copying.error else ""
            stat = part.stat() if part.exists() else None
            if stat and seen != (stat.st_size, stat.st_mtime_ns):
                since, seen = time.monotonic(), (stat.st_size, stat.st_mtime_ns)
            if time.monotonic() - since > self.timeout_s:
                return f"silent for data.timeout_s={self.timeout_s:g} seconds"
        return "given up"

    def _copy(self, name: str, part: Path) -> None:
        if "://" not in self.root:
            shutil.copyfile(Path(self.root) / name, part)
            return
        from fsspec.core import url_to_fs

        if self._connection is None:
            self._connection = url_to_fs(self.root, skip_instance_cache=True, **_options(self.root))
        files, folder = self._connection
        files.get_file(f"{folder}/{name}", str(part))


class _Attempt(threading.Thread):
    """A call of a library that may never end and raise anything: who asked need not wait for it."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.error: Exception | None = None

    def run(self) -> None:
        """Call it, and keep what it raises."""
        try:
            self.call()
        except Exception as error:  # botocore's, aiohttp's, paramiko's, Google's and Azure's have no other kind in common
            self.error = error


def _check_scheme(root: str) -> None:
    from fsspec import get_filesystem_class

    scheme = root.partition("://")[0]
    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        extra = f"; pip install 'modernenc[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
        raise ValueError(f"data.root={root}: {error}{extra}") from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in _EXTRAS)
        raise ValueError(
            f"data.root={root}: no file system for {scheme}://; expected {known}, hf:// or another of fsspec"
        ) from error
    if scheme == "hf":
        _check_revision(root)


def _check_revision(root: str) -> None:
    kind, *rest = root.removeprefix("hf://").strip("/").split("/")
    _, _, revision = "/".join(rest[:2]).partition("@")
    if kind != "datasets" or len(rest) < 2 or not revision:
        raise ValueError(
            f"data.root={root}: expected hf://datasets/<org>/<name>@<revision>/<folder>; without a revision, such as a commit, "
            "the data may change under the run"
        )


def _options(root: str) -> dict[str, Any]:
    """What fsspec's file system needs to be told; all else it takes from its own settings and the environment."""
    if not root.startswith("s3://"):
        return {}
    endpoint = os.environ.get("S3_ENDPOINT_URL")
    # One stream a file: of several, each shows what it has when it has fetched 50 MB, and silence is not told from slowness.
    return {"max_concurrency": 1, **({"endpoint_url": endpoint} if endpoint else {})}


def _unlike(part: Path, size: int | None, digest: str) -> str:
    """How a file differs from what the index says of it; nothing when it does not."""
    if size is not None and (found := part.stat().st_size) != size:
        return f"{found} bytes, expected {size}"
    if digest and (found := hash_file(part)) != digest:
        return f"hash {found}, expected {digest}"
    return ""


def _sweep(cache: Path) -> None:
    """Delete what processes of this machine that are no more left half fetched."""
    for part in cache.rglob(f".*@*{_PART}*"):
        host, process = part.name.split("@")[:2]
        if host == _own().split("@")[0] and process.isdecimal() and not _lives(int(process)):
            part.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _own() -> str:
    """What the names of this process's unfinished files begin with."""
    return f".{socket.gethostname()}@{os.getpid()}"


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
