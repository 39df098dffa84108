"""Start a run, go on with one: the run folder, the Lightning trainer, the report."""

import ctypes
import errno
import fcntl
import logging
import multiprocessing
import os
import platform
import secrets
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import IO, Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from omegaconf import OmegaConf
from rich.logging import RichHandler

from modernenc import checkpoints, lineage, ranks
from modernenc.branch import settle
from modernenc.config import CONFIG, Run, plain, save
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.preemption import STOPPED, Preemption
from modernenc.progress import TokenProgress
from modernenc.recorder import Checkpointing, Recorder
from modernenc.trainer import Pretraining
from modernenc.validation import Validator
from modernenc.watch import UNSTABLE, Watch

log = logging.getLogger("modernenc")

LOG = "log.txt"
_HOLD_S = 5
"""How long to wait for a run folder that another process still trains."""


def start(run: Run, curriculum: Curriculum, content: dict[str, Any] | None = None, numbered: bool = False) -> None:
    """Make the run folder and write what the run is, with the checkpoint that it branches from; the configuration comes last.

    With `numbered`, a folder that is there already is another run's, and this one's has a number at its end. ValueError when
    the folder holds a run already, or another process starts one in it; OSError when it cannot be written.
    """
    from modernenc.plan import text

    folder = _made(Path(run.run_dir), numbered)
    with _begun_here(folder):
        run.run_dir = str(folder)
        run.logger.run_id = secrets.token_hex(4)
        shutil.rmtree(folder / checkpoints.FOLDER, ignore_errors=True)  # of a start that was cut short
        if content is not None:
            content["run"] = plain(run)
            checkpoints.write(content, folder / checkpoints.FOLDER / "branch.ckpt")
        (folder / "plan.txt").write_text(text(run, curriculum) + "\n")
        lineage.write(folder, [])
        save(run)


def _made(folder: Path, numbered: bool) -> Path:
    """The folder, made; one that another process has made counts as its own where there may be a number."""
    if not numbered:
        _check_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for number in count(1):
        made = folder.with_name(f"{folder.name}-{number}") if number > 1 else folder
        try:
            made.mkdir(parents=True)
        except FileExistsError:
            continue
        return made
    raise AssertionError("numbers do not end")


@contextmanager
def _begun_here(folder: Path) -> Iterator[None]:
    """Hold the folder's log meanwhile; ValueError when another process does, or has begun a run."""
    with (folder / LOG).open("a") as file:
        if not _locked(file, folder):
            raise ValueError(f"run_dir={folder} is being started by another process; choose another run_dir")
        _check_empty(folder)
        yield


def _check_empty(folder: Path) -> None:
    """Raise ValueError when the folder holds a run."""
    if (folder / CONFIG).exists():
        held = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
        raise ValueError(
            f"run_dir={folder} holds a run of recipe {cast(dict, held).get('recipe')}; "
            f"go on with it by python -m modernenc.resume {shlex.quote(str(folder))}, or choose another run_dir"
        )


def fit(
    run: Run,
    curriculum: Curriculum,
    corpus: Corpus,
    content: dict[str, Any] | None,
    event: dict[str, Any],
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Train to the end of the curriculum, from a checkpoint's content or from the start, then write the report.

    `event` is what to add to the lineage; `callbacks` are called after our own. Exits with `preemption.STOPPED` when asked to
    stop before the end, with `watch.UNSTABLE` when it stopped by itself.
    """
    first = ranks.is_first()
    with _held(Path(run.run_dir)) if first else nullcontext(False) as waited:
        if waited:
            _check_as_it_was(Path(run.run_dir), content, event)
        _quiet_libraries()
        keep_freed_memory()
        _choose_determinism(run)
        module = Pretraining(run, curriculum, corpus, content)
        recorder = Recorder(run, Validator(run, curriculum, corpus))
        trainer = L.Trainer(
            accelerator=run.trainer.accelerator,
            devices=run.trainer.devices,
            num_nodes=run.trainer.num_nodes,
            strategy=_strategy(run),
            precision=cast(Any, run.trainer.precision),
            callbacks=[
                Meeting(run, curriculum, content, event),
                recorder,
                Watch(run, recorder),
                Checkpointing(run),
                TokenProgress(curriculum, recorder),
                Preemption(),
                *callbacks,
            ],
            logger=_loggers(run) if first else [],
            plugins=[ranks.environment(run.trainer.devices, run.trainer.num_nodes)],
            default_root_dir=run.run_dir,
            max_epochs=-1,  # the curriculum ends the run, by tokens
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if not first:
            log.setLevel(logging.WARNING)
        try:
            trainer.fit(module)
        except RuntimeError as error:
            if trainer.world_size > 1 and _is_of_another_rank(error):
                raise ConnectionError(
                    f"another rank was lost after step {module.step}: its own last lines say why; what was saved is whole: "
                    f"python -m modernenc.resume {shlex.quote(run.run_dir)}"
                ) from error
            raise
        finally:
            corpus.store.close()
            for worker in multiprocessing.active_children():  # they do not listen to signals, so Python would wait for them
                worker.kill()
        if not first:
            return
        if module.abandoned:
            log.error("stopped at step %d without saving: %s", module.step, module.instability)
            raise SystemExit(UNSTABLE)
        if module.interrupted and module.tokens_seen < curriculum.total_tokens:
            resume = f"python -m modernenc.resume {shlex.quote(run.run_dir)}"
            log.warning("stopped at step %d and saved; go on with: %s", module.step, resume)
            raise SystemExit(STOPPED)
        from modernenc.report import write

        log.info("report: %s", write(run))


class Meeting(L.Callback):
    """The first thing that ranks do together: see that they are who they think, and take up the same from a tidy folder."""

    def __init__(self, run: Run, curriculum: Curriculum, content: dict[str, Any] | None, event: dict[str, Any]) -> None:
        self.run = run
        self.curriculum = curriculum
        self.content = content
        self.event = event

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare notes; ValueError when ranks disagree."""
        ranks.export(trainer.global_rank, trainer.local_rank, self.run.trainer.devices, self.run.trainer.num_nodes)
        own = self.event["checkpoint"]
        self.run.run_dir, checkpoint = trainer.strategy.broadcast((self.run.run_dir, own))
        if checkpoint != own:
            raise ValueError(f"rank 0 resumes from {checkpoint}, this one from {own}; name the checkpoint to resume")
        if trainer.is_global_zero:  # by now all ranks have read theirs
            checkpoints.sweep(Path(self.run.run_dir))
            _announce(self.run, self.curriculum, cast(Pretraining, pl_module), trainer, own)
            settle(self.run, self.curriculum, self.content, self.event, trainer.world_size)


def _strategy(run: Run) -> Strategy | str:
    world = run.trainer.devices * run.trainer.num_nodes
    if run.trainer.strategy == "fsdp":
        return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    if run.trainer.strategy == "auto" and world == 1:
        return "auto"
    return DDPStrategy(find_unused_parameters=bool(run.tasks))  # of several heads a step trains one


def _choose_determinism(run: Run) -> None:
    """`strict` has torch refuse kernels whose result may change from one call to the next."""
    strict = run.trainer.determinism == "strict"
    if strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(strict)


def _is_of_another_rank(error: RuntimeError) -> bool:
    """Whether a collective failed for want of a peer: gloo and NCCL say so in words only."""
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed", "connection reset", "broken pipe"))


def _announce(run: Run, curriculum: Curriculum, module: Pretraining, trainer: L.Trainer, checkpoint: str) -> None:
    """The first lines of a run: what, where, how."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    dtype = torch.bfloat16 if run.trainer.precision == "bf16-mixed" else torch.float32
    device = trainer.strategy.root_device
    log.info("recipe %s, %s parameters, %s tokens in %s steps", run.recipe, f"{parameters:,}",
             f"{curriculum.total_tokens:,}", f"{curriculum.total_steps:,}")  # fmt: skip
    backend = module.objectives.backbone.describe().backend(device, dtype)
    who = ranks.described(trainer.world_size, torch.get_num_threads())
    how = f"{run.trainer.precision}, compiled" if module.compiles else run.trainer.precision
    log.info("device %s, precision %s, %s, %s", device, how, backend, who)
    if run.trainer.strategy == "fsdp":
        log.info("FSDP2: weights and optimizer states are split over ranks")
    elif run.checkpoint.distributed:
        log.info("checkpoint.distributed=true is for trainer.strategy=fsdp: checkpoints are written whole")
    _advise_precision(device, run.trainer.precision)
    log.info("run folder %s%s", run.run_dir, f", from {checkpoint}" if checkpoint else "")


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks: returning them and faulting them in again took a fifth of a CPU step."""
    if platform.libc_ver()[0] == "glibc":
        mmap_max, trim_threshold = -4, -1  # parameters of mallopt(3)
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def _advise_precision(device: torch.device, precision: str) -> None:
    """Say when the other precision would be faster here; nothing is switched."""
    if device.type != "cpu":
        return
    known = Path("/proc/cpuinfo")  # Linux's: elsewhere nothing is said
    flags = known.read_text() if known.exists() else ""
    fast = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))  # the last: ARM
    if precision == "bf16-mixed" and flags and not fast:
        log.warning("this processor has no bf16 matrix instructions: trainer.precision=32-true may be faster")
    if precision == "32-true" and fast:
        log.info("this processor multiplies bf16 matrices several times faster: consider trainer.precision=bf16-mixed")


def _loggers(run: Run) -> list[Logger]:
    if run.logger.wandb == "off":
        return []
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    offline = run.logger.wandb == "offline"
    if not offline and not wandb.login(prompt=False):
        log.warning("logger.wandb=online, but there is no login: logging offline; run wandb login, then wandb sync")
        offline = True
    if wandb.run is not None:  # of the run before, where several are trained in turn
        wandb.finish()
    return [
        WandbLogger(
            project=run.logger.project,
            name=run.recipe,
            save_dir=run.run_dir,
            id=run.logger.run_id or None,  # with which Lightning has wandb go on with a run that is there
            mode="offline" if offline else "online",
        )
    ]


def _check_as_it_was(run_dir: Path, content: dict[str, Any] | None, event: dict[str, Any]) -> None:
    """Raise ValueError when the run went on since its checkpoint was read."""
    newest = checkpoints.newest(run_dir)
    position = (content["run"]["rollbacks"], content["state"]["tokens_seen"]) if content else (0, 0)
    if newest and event["event"] != "rollback" and checkpoints.order(newest) > position:
        resume = f"python -m modernenc.resume {shlex.quote(str(run_dir))}"
        raise ValueError(f"{run_dir} went on in another process until just now; go on with: {resume}")


@contextmanager
def _held(run_dir: Path) -> Iterator[bool]:
    """Log to the terminal and to a file, which is locked meanwhile, and tell whether another process had it until just now.

    ValueError when another process trains the run. The kernel undoes the lock however this process ends.
    """
    file = logging.FileHandler(run_dir / LOG)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    screen: logging.Handler = RichHandler(show_path=False, log_time_format="%H:%M:%S")
    if not sys.stdout.isatty():  # no lines cut to a width, so that what they say to run can be copied
        screen = logging.StreamHandler(sys.stdout)
        screen.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    try:
        waited = _lock(file, run_dir)
        log.setLevel(logging.INFO)
        log.handlers = [screen, file]
        yield waited
    finally:
        log.removeHandler(file)
        file.close()


def _lock(file: logging.FileHandler, run_dir: Path) -> bool:
    """Whether it had to wait."""
    assert file.stream is not None
    for attempt in range(_HOLD_S * 10):
        if _locked(file.stream, run_dir):
            return attempt > 0
        time.sleep(0.1)  # workers of a process that was killed take a moment to go
    raise ValueError(f"run_dir={run_dir} is being trained by another process; wait for it or end it")


def _locked(file: IO[str], run_dir: Path) -> bool:
    """Whether the lock of a file is this process's now; the kernel undoes it however the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        log.warning("%s is on a file system without locks: see that only one process trains it", run_dir)
    return True


def _quiet_libraries() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The loader's state is saved by the module.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
    warnings.filterwarnings("ignore", ".*`srun` command is available")  # not every run on a cluster's node is a job
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.* is deprecated")  # Lightning about torch
