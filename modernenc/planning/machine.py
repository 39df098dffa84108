"""What a machine has for training, what that means for a run, and what to do where it is too little."""

import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from netrc import NetrcParseError, netrc
from pathlib import Path

import torch
from packaging.requirements import Requirement

from modernenc.backbones.attention import describe_backends, use_flash_attention_3
from modernenc.config import Trainer
from modernenc.data.blocks import Corpus
from modernenc.data.store import Store
from modernenc.installed import is_there
from modernenc.model.build import compiles
from modernenc.run_folder.load import locate
from modernenc.run_folder.tables import Table

OK, NOTE, BAD = range(3)
"""Levels of a finding: as it should be; slower or less than it could be; a run will fail."""
_FEWEST_FILES = 1_024
"""Open files of a run with some loader workers, and a margin."""
_SHARED_BYTES = 1 << 30
"""Shared memory that loader workers may need."""
_FREE_BYTES = 1 << 30
"""Room on the disk below which checkpoints of a small model already fail."""
_SAMPLE_BYTES = 64 << 20
"""How much is read, and written, to measure a speed."""
_WANDB_HOST = "api.wandb.ai"


@dataclass
class Finding:
    """One thing about a machine."""

    subject: str
    said: str
    level: int = OK
    remedy: str = ""
    """What to do, unless all is well."""


def examine(folder: Path | None = None, data: str = "") -> Iterator[Finding]:
    """Yield what this machine has, for the run of a folder, or for any run over a corpus.

    Raises FileNotFoundError or ValueError if `folder` holds no run.
    """
    run = locate(folder)[0] if folder else None
    yield from _packages()
    yield from _devices()
    yield from _cores()
    yield from _limits()
    yield from _folders(Path(run.run_dir) if run else Path.cwd())
    if root := data or (run.data.root if run else ""):
        yield _corpus(root, run.data.cache if run and not data else "", _speed_of(Path(run.run_dir)) if run else 0.0)
    yield from _slurm()
    yield from _wandb()


def _packages() -> Iterator[Finding]:
    wrong = []
    for text in requires("modernenc") or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found}, expected {wanted.specifier or 'any'}")
    if wrong:
        yield Finding("packages", "; ".join(wrong), BAD, "pip install --upgrade modernenc, in an environment of its own")
    else:
        yield Finding("packages", f"Python {platform.python_version()}, torch {torch.__version__}, all versions as needed")


def _devices() -> Iterator[Finding]:
    has_driver = Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None
    devices = torch.cuda.device_count()
    if devices:
        names = sorted({torch.cuda.get_device_properties(number).name for number in range(devices)})
        memory = torch.cuda.get_device_properties(0).total_memory
        yield Finding("device", f"{devices} x {', '.join(names)}, {memory / 2**30:.0f} GiB each")
    elif has_driver and torch.version.cuda is None:
        remedy = "install torch for CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu130"
        yield Finding("device", "an NVIDIA driver is here, but torch is a build without CUDA: the GPU stays idle", BAD, remedy)
    elif has_driver:
        said = f"an NVIDIA driver is here, but torch's CUDA {torch.version.cuda} finds no GPU"
        yield Finding(
            "device", said, NOTE, "run nvidia-smi: is the driver as new as that CUDA, and CUDA_VISIBLE_DEVICES right?"
        )
    else:
        yield Finding("device", "no GPU: runs train on the processor")
    device = torch.device("cuda" if devices else "cpu")
    faster = _seconds_of_a_product(device, torch.float32) / _seconds_of_a_product(device, torch.bfloat16)
    said = f"a matrix product in bf16 takes 1/{faster:.1f} of its time in fp32"
    if faster >= 1:
        yield Finding("precision", said)
    else:
        yield Finding("precision", said, NOTE, "set trainer.precision=32-true")
    use_flash_attention_3(device)
    compiled = "layers are compiled" if compiles(Trainer(), device) else "layers are not compiled"
    said = f"{describe_backends(device, torch.bfloat16)}; {compiled}"
    if devices and not compiles(Trainer(), device):
        yield Finding("attention", said, NOTE, "install triton, with which layers take half the time")
    else:
        extras = [name for name in ("flash_attn", "flash_attn_interface") if is_there(name)]
        yield Finding("attention", f"{said}; {' and '.join(extras) or 'flash-attn'} {'is' if extras else 'is not'} installed")


def _seconds_of_a_product(device: torch.device, dtype: torch.dtype) -> float:
    """Return the shortest time of a few products of square matrices."""
    side = 4_096 if device.type == "cuda" else 768
    matrix, seconds = torch.ones(side, side, device=device, dtype=dtype), []
    for _ in range(6):
        begin = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _cores() -> Iterator[Finding]:
    usable, threads = _usable_cores(), torch.get_num_threads()
    said = f"{usable:g} usable, {threads} threads"
    if threads > usable:
        remedy = f"set OMP_NUM_THREADS={max(1, int(usable))}: more threads than cores wait for each other"
        yield Finding("cores", said, NOTE, remedy)
    elif usable < 2:
        remedy = "ask for a second core; until then expect half the speed, and set data.workers=0 data.prefetch=0"
        yield Finding("cores", f"{said}: reading text and training share one", NOTE, remedy)
    else:
        yield Finding("cores", said)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _control_group("memory.max")
    memory = min(total, int(limit)) if limit.isdigit() else total
    yield Finding("memory", f"{memory / 2**30:.0f} GiB")


def _usable_cores() -> float:
    """Return how many cores this process may use: those that it is bound to, or fewer by the quota of its control group."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _control_group("cpu.max").partition(" ")
    return min(float(bound), int(quota) / int(period)) if quota.isdigit() else float(bound)


def _control_group(name: str) -> str:
    """Return a file of this process's control group (version 2), or nothing."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().strip() if path.is_file() else ""


def _limits() -> Iterator[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _FEWEST_FILES:
        allowed = most if most != resource.RLIM_INFINITY else _FEWEST_FILES
        remedy = f"ulimit -n {min(max(allowed, 0), 65_536)}" + (
            "" if allowed >= _FEWEST_FILES else f"; the administrator allows no {_FEWEST_FILES:,}: /etc/security/limits.conf"
        )
        yield Finding("open files", f"at most {files:,}, and loader workers may need {_FEWEST_FILES:,}", BAD, remedy)
    else:
        yield Finding("open files", f"at most {files:,}")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return
    free = shutil.disk_usage(shared).free
    if free < _SHARED_BYTES:
        remedy = "give the container more (docker run --shm-size=8g), or set data.workers=0"
        yield Finding("/dev/shm", f"{free / 2**20:,.0f} MiB free: loader workers may end with a bus error", NOTE, remedy)
    else:
        yield Finding("/dev/shm", f"{free / 2**30:.1f} GiB free")


def _folders(place: Path) -> Iterator[Finding]:
    caches = {
        "XDG_CACHE_HOME": Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"),
        "HF_HOME": Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"),
    }
    closed = {name: folder for name, folder in caches.items() if not _is_writable(folder)}
    if closed:
        said = (
            ", ".join(str(folder) for folder in closed.values()) + " cannot be written to: compiled code and downloads are lost"
        )
        yield Finding("caches", said, NOTE, "export " + " ".join(f"{name}=FOLDER" for name in closed))
    else:
        yield Finding("caches", "can be written to")
    place = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    where = f"{free / 1e9:,.1f} GB free at {place}"
    if not _is_writable(place):
        yield Finding("disk", f"{place} cannot be written to", BAD, "choose another folder with run_dir=FOLDER")
    elif free < _FREE_BYTES:
        yield Finding("disk", where, BAD, "make room, or choose another disk with run_dir=FOLDER")
    else:
        yield Finding("disk", f"{where}, written at {_write_speed(place) / 1e6:,.0f} MB/s")


def _is_writable(folder: Path) -> bool:
    """Return whether a file can be made in a folder, or in the nearest one above it that exists."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def _write_speed(folder: Path) -> float:
    """Return the bytes a second at which a file reaches the disk."""
    with tempfile.TemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        file.write(os.urandom(1 << 20) * (_SAMPLE_BYTES >> 20))
        file.flush()
        os.fsync(file.fileno())
        return _SAMPLE_BYTES / (time.perf_counter() - begin)


def _corpus(root: str, cache: str, needed: float) -> Finding:
    """Return at how many tokens a second the corpus is read, beside the `needed` ones of a run."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            read = _read_speed(Corpus(Store(root, cache or (scratch if "://" in root else ""))))
    except (OSError, ValueError) as error:
        return Finding("corpus", " ".join(str(error).split()), BAD, "give the corpus with --data DIR, or mend it")
    said = f"{root}: read at {read:,.0f} tokens/s"
    if not needed:
        return Finding("corpus", said)
    said += f"; the run takes {needed:,.0f}"
    if read < 2 * needed:
        return Finding("corpus", said, NOTE, "copy the corpus to a faster disk, or set data.cache=FOLDER on one")
    return Finding("corpus", said)


def _read_speed(corpus: Corpus) -> float:
    """Return the tokens a second at which blocks are read, from the start of the first slice."""
    name, entry = next(iter(corpus.sources.items()))
    shards = corpus.open(f"{name}/{next(iter(entry['slices']))}")
    tokens, begin = 0, time.perf_counter()
    for shard, size in enumerate(shards.sizes):
        for index in range(size):
            tokens += len(shards.read(shard, index).tokens)
        if 2 * tokens >= _SAMPLE_BYTES:
            break
    return tokens / (time.perf_counter() - begin)


def _speed_of(folder: Path) -> float:
    """Return the tokens a second of a run's last step; 0 if it has none."""
    rows = Table(folder / "metrics.csv").read()
    return float(rows[-1]["tokens_per_s"]) if rows else 0.0


def _slurm() -> Iterator[Finding]:
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        said = "sbatch is here, with which modernenc.launch submits runs" if shutil.which("sbatch") else "not here"
        yield Finding("SLURM", said)
        return
    tasks = os.environ.get("SLURM_NTASKS_PER_NODE", os.environ.get("SLURM_NTASKS", "1")).partition("(")[0]
    devices = torch.cuda.device_count()
    said = f"job {job}, {tasks} tasks a node, {devices} GPUs"
    if devices > 1 and tasks.isdigit() and int(tasks) != devices:
        yield Finding("SLURM", said, NOTE, "one task for each GPU: --ntasks-per-node, which modernenc.launch sets")
    else:
        yield Finding("SLURM", said)


def _wandb() -> Iterator[Finding]:
    if not is_there("wandb"):
        yield Finding("Weights & Biases", "not installed; pip install 'modernenc[wandb]' for logger.wandb")
        return
    try:
        known = bool(os.environ.get("WANDB_API_KEY")) or netrc().authenticators(_WANDB_HOST) is not None
    except (NetrcParseError, OSError):
        known = False
    if known:
        yield Finding("Weights & Biases", "logged in")
    else:
        yield Finding("Weights & Biases", "installed, nobody logged in", NOTE, "wandb login, or logger.wandb=offline")
