"""The files of a corpus: a local folder, or a remote one whose files are copied to a cache when they are needed.

A remote is any URL that fsspec has a file system for (s3://, gs://, az://, sftp://, ...), configured as fsspec documents it,
for example by FSSPEC_S3_ANON=true, or `hf://datasets/<org>/<name>@<revision>/<folder>`. A file appears in the cache only
when it is complete: it is downloaded beside its place, compared with size and hash, and renamed. A failed download is
repeated a few times; then an error names the file.
"""

import errno
import os
import shutil
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import xxhash
from fsspec import get_filesystem_class
from fsspec.core import url_to_fs

from modernenc.hashing import hash_file

ATTEMPTS = 3
"""How often a download is tried."""
_FIRST_PAUSE_S = 1.0
"""Pause before the second attempt; it doubles for each further one."""
_POLL_S = 0.2
"""Interval at which a running download is checked for progress."""
_PREFETCH_THREADS = 4
_PART = ".part"
"""Suffix of an unfinished download."""
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "sftp": "sftp"}
"""The extra of this package that installs the file system of each scheme."""


def longest_fetch_s(timeout_s: float) -> float:
    """Return how long a remote may deliver nothing before a fetch fails, in seconds: all attempts, and the pauses between."""
    return ATTEMPTS * timeout_s + _FIRST_PAUSE_S * (2 ** (ATTEMPTS - 1) - 1)


class Store:
    """Read access to the files below a root, by their relative names.

    `cache` is required when the root is a URL, and optional for a folder (on a slow network disk). `timeout_s` is how long a
    remote may deliver nothing before an attempt counts as failed. Raises ValueError when a remote has a password in its URL or
    no cache, when an hf:// dataset has no revision, and when no installed package can read the remote.
    """

    def __init__(self, root: str, cache: str = "", timeout_s: float = 60) -> None:
        if (url := urlsplit(root)).password:  # which configurations, checkpoints and errors would show
            raise ValueError(
                f"data.root holds a password for {url.hostname}: leave it out, and put it where fsspec looks for it, in "
                "~/.config/fsspec or in the environment"
            )
        remote = "://" in root
        if remote and not cache:
            raise ValueError(f"data.root={root} is remote: give data.cache=FOLDER, on a fast disk of this machine")
        if remote:
            _check_remote(root)
        self.root = root.rstrip("/") if remote else str(Path(root).resolve())
        # Corpora may share a cache: each has a folder in it, named after its root.
        self.cache = Path(cache).resolve() / xxhash.xxh3_64_hexdigest(self.root.encode()) if cache else None
        self.timeout_s = timeout_s
        self._downloads: _Downloads | None = None
        if self.cache is not None:
            _sweep(self.cache.parent)

    def __str__(self) -> str:
        return self.root

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs; threads and connections stay here."""
        return {**vars(self), "_downloads": None}

    def where(self, name: str) -> str:
        """Return the address of a file for messages."""
        return f"{self.root}/{name}"

    def file(self, name: str) -> Path:
        """Return the path of a small file such as an index; a remote one is fetched anew each time.

        Raises FileNotFoundError or ConnectionError, naming the file, when it is missing or cannot be fetched.
        """
        if self.cache is not None:
            return self._here().fetch(name)
        path = Path(self.root) / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        return path

    def path(self, name: str) -> Path:
        """Return where a shard is on this machine, or will be once it is fetched."""
        return (self.cache or Path(self.root)) / name

    def shard(self, name: str, size: int, digest: str) -> Path:
        """Return the path of a shard; unless a file of its size is there, it is fetched and compared with its hash."""
        if self.cache is not None:
            if future := self._here().ahead.pop(name, None):
                future.result()
            if not self._is_cached(name, size):
                self._here().fetch(name, size, digest)
        return self.path(name)

    def replace(self, name: str, size: int, digest: str) -> None:
        """Fetch a shard again whose copy in the cache is damaged; a process that has the old copy open can still read it."""
        self._here().fetch(name, size, digest)

    def prefetch(self, name: str, size: int, digest: str) -> None:
        """Start to fetch a shard in the background; if that fails, `shard` raises the error."""
        if self.cache is not None and name not in self._here().ahead and not self._is_cached(name, size):
            here = self._here()
            here.ahead[name] = here.threads.submit(here.fetch, name, size, digest)

    def close(self) -> None:
        """Cancel all background downloads."""
        if self._downloads and self._downloads.process == os.getpid():
            self._downloads.closed = True
            self._downloads.threads.shutdown(wait=False, cancel_futures=True)
            self._downloads = None

    def _is_cached(self, name: str, size: int) -> bool:
        path = self.path(name)
        return path.is_file() and path.stat().st_size == size

    def _here(self) -> "_Downloads":
        """Return the downloads of this process: threads and connections of a parent do not survive a fork."""
        if self._downloads is None or self._downloads.process != os.getpid():
            assert self.cache is not None
            self._downloads = _Downloads(self.root, self.cache, self.timeout_s)
        return self._downloads


class _Downloads:
    """Downloads from a root to a cache, in one process."""

    def __init__(self, root: str, cache: Path, timeout_s: float) -> None:
        self.root = root
        self.cache = cache
        self.timeout_s = timeout_s
        self.process = os.getpid()
        self.closed = False
        self.threads = ThreadPoolExecutor(_PREFETCH_THREADS, "prefetch")
        self.ahead: dict[str, Future[Path]] = {}
        """Shards that are fetched in the background, or were and have not been asked for."""
        self._connection: Any = None

    def fetch(self, name: str, size: int | None = None, digest: str = "") -> Path:
        """Copy a file to the cache, and return its path there.

        Raises OSError when the local disk is full, and ConnectionError when all attempts fail.
        """
        target = self.cache / name
        fault = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                if self.closed:
                    break
                time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            # Each attempt has its own file name: the thread of an attempt that timed out may still write to the old one.
            part = target.with_name(f"{_part_prefix()}@{threading.get_ident()}@{attempt}@{target.name}{_PART}")
            try:
                part.parent.mkdir(parents=True, exist_ok=True)
                part.touch()
                fault = self._download(name, part) or _mismatch(part, size, digest)
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
        raise ConnectionError(f"{self.root}/{name} could not be fetched, tried {ATTEMPTS} times: {fault}")

    def _download(self, name: str, part: Path) -> str:
        """Copy a file, and return what went wrong, or nothing; raises OSError when the local disk is full."""
        errors: list[Exception] = []

        def copy() -> None:
            try:
                self._copy(name, part)
            except Exception as error:  # the errors of botocore, aiohttp, paramiko, Google and Azure share no narrower class
                errors.append(error)

        # In a thread of its own, since a library's call may never return.
        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        last_progress, seen = time.monotonic(), ()
        while not self.closed:
            thread.join(_POLL_S)
            if not thread.is_alive():
                if not errors:
                    return ""
                if isinstance(errors[0], OSError) and errors[0].errno in (errno.ENOSPC, errno.EDQUOT):
                    raise errors[0]
                return " ".join(f"{type(errors[0]).__name__}: {errors[0]}".split())
            stat = part.stat() if part.exists() else None
            if stat and seen != (stat.st_size, stat.st_mtime_ns):
                last_progress, seen = time.monotonic(), (stat.st_size, stat.st_mtime_ns)
            if time.monotonic() - last_progress > self.timeout_s:
                return f"silent for data.timeout_s={self.timeout_s:g} seconds"
        return "cancelled"

    def _copy(self, name: str, part: Path) -> None:
        if "://" not in self.root:
            shutil.copyfile(Path(self.root) / name, part)
            return
        if self._connection is None:
            self._connection = url_to_fs(self.root, skip_instance_cache=True, **_options(self.root))
        files, folder = self._connection
        files.get_file(f"{folder}/{name}", str(part))


def _check_remote(root: str) -> None:
    """Raise ValueError when a URL cannot be read, or when its contents may change."""
    scheme, _, path = root.partition("://")
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
    kind, _, name, *_ = [*path.strip("/").split("/"), "", ""]
    if scheme == "hf" and (kind != "datasets" or not name.partition("@")[2]):
        raise ValueError(
            f"data.root={root}: expected hf://datasets/<org>/<name>@<revision>/<folder>; without a revision, such as a commit, "
            "the data may change under the run"
        )


def _options(root: str) -> dict[str, Any]:
    """Return the arguments for fsspec's file system; it takes all others from its own configuration and the environment."""
    if not root.startswith("s3://"):
        return {}
    endpoint = os.environ.get("S3_ENDPOINT_URL")
    # One stream per file: several would each write only after 50 MB, and a slow download would look like a silent one.
    return {"max_concurrency": 1, **({"endpoint_url": endpoint} if endpoint else {})}


def _mismatch(part: Path, size: int | None, digest: str) -> str:
    """Describe how a file differs from its size and hash in the index; empty when it does not."""
    if size is not None and (found := part.stat().st_size) != size:
        return f"{found} bytes, expected {size}"
    if digest and (found := hash_file(part)) != digest:
        return f"hash {found}, expected {digest}"
    return ""


def _sweep(cache: Path) -> None:
    """Delete unfinished downloads of processes of this machine that have ended."""
    for part in cache.rglob(f".*@*{_PART}*"):
        host, process = part.name.split("@")[:2]
        if host == _part_prefix().split("@")[0] and process.isdecimal() and not _is_alive(int(process)):
            part.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Return whether a process with this id exists."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it exists, but belongs to another user
        return True
    return True


def _part_prefix() -> str:
    """Return the beginning of the names of this process's unfinished downloads."""
    return f".{socket.gethostname()}@{os.getpid()}"
