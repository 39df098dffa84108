"""Where the files of a corpus are: a local folder, or a remote one whose files are copied to a cache as they are needed.

A remote is any that streaming has a downloader for (s3://, gs://, azure://, oci://, sftp://, ...) or
`hf://datasets/<org>/<name>@<revision>/<folder>`. A file appears in the cache only whole: it is fetched beside its place,
compared with size and hash, and renamed. What fails is tried again a few times, then raised with the file's name.
"""

import errno
import os
import shutil
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
from hydra.utils import get_class

from modernenc.hashing import hash_file

if TYPE_CHECKING:
    from streaming.base.storage.download import CloudDownloader

ATTEMPTS = 3
_FIRST_PAUSE_S = 1.0
_AT_A_TIME = 4
_PART = ".part"
_FAILURES = {
    "s3": ("botocore.exceptions.ClientError", "botocore.exceptions.BotoCoreError", "boto3.exceptions.Boto3Error"),
    "gs": ("google.api_core.exceptions.GoogleAPIError", "google.auth.exceptions.GoogleAuthError"),
    "azure": ("azure.core.exceptions.AzureError",),
    "azure-dl": ("azure.core.exceptions.AzureError",),
    "oci": ("oci.exceptions.ServiceError", "oci.exceptions.RequestException"),
    "sftp": ("paramiko.SSHException",),
}
"""What a remote's library raises, besides OSError and ValueError, when a file cannot be had."""
_HUGGING_FACE = "hf://datasets/"


class Store:
    """Files by their name under a root.

    `cache` is needed, and used, when the root is a URL; a local folder may have one too, such as a network disk. `timeout_s`
    is how long a remote may be silent. ValueError when a remote has no cache or a dataset no revision.
    """

    def __init__(self, root: str, cache: str = "", timeout_s: float = 60) -> None:
        remote = "://" in root
        if remote and not cache:
            raise ValueError(f"data.root={root} is remote: give data.cache=FOLDER, on a fast disk of this machine")
        if root.startswith(_HUGGING_FACE):
            _dataset(root)
        self.root = root.rstrip("/") if remote else str(Path(root).resolve())
        # Two corpora may share a cache: each has a folder there, by its root.
        self.cache = Path(cache).resolve() / xxhash.xxh3_64_hexdigest(self.root) if cache else None
        self.timeout_s = timeout_s
        self._process = 0
        self._closed = False
        self._downloader: CloudDownloader | None = None
        self._ahead: dict[str, Future[Path]] = {}
        if self.cache is not None:
            _sweep(self.cache.parent)

    def __str__(self) -> str:
        return self.root

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
        self._fetch(name, size, digest)

    def prefetch(self, name: str, size: int, digest: str) -> None:
        """Fetch a shard that will be needed, in the background; what fails is raised when it is."""
        self._renew()
        path = self.path(name)
        if self.cache is not None and name not in self._ahead and not (path.is_file() and path.stat().st_size == size):
            self._ahead[name] = self._threads.submit(self._fetch, name, size, digest)

    def close(self) -> None:
        """Fetch no more ahead, and give up what is under way after its present try."""
        if self._process == os.getpid():
            self._closed = True
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._process = 0

    def _renew(self) -> None:
        """Threads and connections do not survive a fork."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._downloader = None
            self._ahead = {}
            self._closed = False
            self._threads = ThreadPoolExecutor(_AT_A_TIME, "prefetch")

    def _fetch(self, name: str, size: int | None = None, digest: str = "") -> Path:
        assert self.cache is not None
        target = self.cache / name
        part = target.with_name(f"{_own()}@{threading.get_ident()}@{target.name}{_PART}")
        error: Exception | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                if self._closed:
                    break
                time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._download(name, part)
                if size is not None and part.stat().st_size != size:
                    raise ValueError(f"{part.stat().st_size} bytes, expected {size}")
                if digest and (found := hash_file(part)) != digest:
                    raise ValueError(f"hash {found}, expected {digest}")
                part.replace(target)
                return target
            except _failures(self.root) as caught:
                if isinstance(caught, OSError) and caught.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                    where = f"data.cache={self.cache.parent}"
                    raise OSError(f"{where}: {caught.strerror}, wanted for {name}; make room there") from caught
                error = caught
            finally:
                for left in part.parent.glob(part.name + "*"):
                    left.unlink(missing_ok=True)
        raise ConnectionError(f"{self.where(name)} could not be fetched, tried {ATTEMPTS} times: {_text(error)}") from error

    def _download(self, name: str, part: Path) -> None:
        if "://" not in self.root:
            shutil.copyfile(Path(self.root) / name, part)
        elif self.root.startswith(_HUGGING_FACE):
            _from_hugging_face(self.root, name, part, self.timeout_s)
        else:
            if self._downloader is None:
                os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")  # else botocore's own attempts multiply ours
                from streaming.base.storage.download import CloudDownloader

                self._downloader = CloudDownloader.get(self.root)
            self._downloader.download(self.where(name), str(part), self.timeout_s)


def _failures(root: str) -> tuple[type[Exception], ...]:
    names = _FAILURES.get(root.partition("://")[0], ())
    return (OSError, ValueError, *(get_class(name) for name in names))


def _dataset(root: str) -> tuple[str, str, str]:
    """Repository, revision and folder; ValueError when no revision is named."""
    rest = root.removeprefix(_HUGGING_FACE).strip("/").split("/")
    repository, _, revision = "/".join(rest[:2]).partition("@")
    if len(rest) < 2 or not revision:
        raise ValueError(
            f"data.root={root}: expected hf://datasets/<org>/<name>@<revision>/<folder>; without a revision, such as a commit, "
            "the data may change under the run"
        )
    return repository, revision, "/".join(rest[2:])


def _from_hugging_face(root: str, name: str, part: Path, timeout_s: float) -> None:
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(max(1, timeout_s))))
    from huggingface_hub import hf_hub_download

    repository, revision, folder = _dataset(root)
    beside = part.with_name(part.name + ".d")
    try:
        found = hf_hub_download(
            repository, f"{folder}/{name}".strip("/"), repo_type="dataset", revision=revision, local_dir=beside
        )
        os.replace(found, part)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Delete what processes of this machine that are no more left half fetched."""
    for part in cache.rglob(f".*@*{_PART}*"):
        host, process = part.name.split("@")[:2]
        if host == _own().split("@")[0] and not Path(f"/proc/{process}").exists():
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def _own() -> str:
    """What the names of this process's unfinished files begin with."""
    return f".{socket.gethostname()}@{os.getpid()}"


def _text(error: Exception | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
