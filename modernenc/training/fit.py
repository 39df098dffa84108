"""Train a run from a checkpoint, or from the start, to the end of the curriculum."""

import logging
import multiprocessing
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import Logger
from rich import get_console

from modernenc.backbones.attention import use_flash_attention_3
from modernenc.config import Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.evaluation.validation import Validator
from modernenc.exit_codes import STOPPED, UNSTABLE
from modernenc.model.allocator import keep_freed_memory
from modernenc.run_folder import checkpoints, lineage
from modernenc.run_folder.checkpoints import Checkpoint
from modernenc.run_folder.history import record_start
from modernenc.run_folder.lineage import Event
from modernenc.run_folder.lock import LOG, acquire
from modernenc.saved_config import plain
from modernenc.training import ranks
from modernenc.training.checkpointing import Checkpointing
from modernenc.training.contention import ContentionMonitor
from modernenc.training.hardware import advise_precision, choose_accelerator, choose_determinism
from modernenc.training.module import Pretraining
from modernenc.training.preemption import Preemption
from modernenc.training.progress import TokenProgress
from modernenc.training.recorder import MetricsWriter, ValidationWriter
from modernenc.training.strategy import choose_strategy
from modernenc.training.watch import SpikeMonitor

log = logging.getLogger("modernenc")


def fit(
    run: Run,
    curriculum: Curriculum,
    corpus: Corpus,
    plan: str,
    checkpoint: Checkpoint | None,
    event: Event,
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Train to the end of the curriculum, from a checkpoint or from the start.

    `plan` is the text of the run's plan, `event` is added to the lineage, and `callbacks` are called after the product's own.
    Exits with `STOPPED` if it was asked to stop before the end, with `UNSTABLE` if it stopped by itself.
    """
    first = ranks.is_rank_zero()
    with _open_log(Path(run.run_dir)) if first else nullcontext(False) as waited:
        if waited:
            _check_unchanged(Path(run.run_dir), checkpoint, event)
        _quiet_libraries()
        keep_freed_memory()
        choose_determinism(run)
        module = Pretraining(run, curriculum, corpus, checkpoint)
        metrics = MetricsWriter(run)
        validation = ValidationWriter(run, Validator(run, corpus), metrics)
        trainer = L.Trainer(
            accelerator=choose_accelerator(run),
            devices=run.trainer.devices,
            num_nodes=run.trainer.num_nodes,
            strategy=choose_strategy(run),
            precision=run.trainer.precision,  # pyright: ignore[reportArgumentType]
            # After each step they are called in this order: the monitor reads the rows that the writer has made, a checkpoint
            # holds metrics as they are after the writer has flushed them, and validation can fail when all is saved.
            callbacks=[
                StartupSync(run, curriculum, plan, checkpoint, event),
                metrics,
                SpikeMonitor(run, metrics),
                Checkpointing(run),
                validation,
                TokenProgress(curriculum, metrics, validation),
                Preemption(),
                ContentionMonitor(),
                *callbacks,
            ],
            logger=_loggers(run) if first else [],
            plugins=[ranks.environment(run.trainer.devices, run.trainer.num_nodes)],
            default_root_dir=run.run_dir,
            max_epochs=-1,  # the curriculum ends the run, by tokens
            # What follows switches off parts of Lightning that the callbacks and the loader replace.
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if not first:
            log.setLevel(logging.WARNING)
        # Lightning would send a tensor around before each step and wait for it, to learn of signals that Preemption handles.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        try:
            trainer.fit(module)
        except RuntimeError as error:
            if trainer.world_size > 1 and not torch.distributed.is_initialized():
                raise ConnectionError(
                    f"the {trainer.world_size} ranks did not meet within trainer.timeout_s={run.trainer.timeout_s:g}: one of "
                    f"them did not start, or cannot reach the first: {' '.join(str(error).split())}"
                ) from error
            if trainer.world_size > 1 and _lost_a_rank(error):
                raise ConnectionError(
                    f"another rank was lost after step {module.step}: its own last lines say why; what was saved is whole: "
                    f"python -m modernenc.resume {shlex.quote(run.run_dir)}"
                ) from error
            raise
        finally:
            corpus.store.close()
            for worker in multiprocessing.active_children():  # they ignore signals, so Python would wait for them
                worker.kill()
        if not first:
            return
        if module.abort_all_ranks:
            log.error("stopped at step %d without saving: %s", module.step, module.abort_reason)
            raise SystemExit(UNSTABLE)
        if module.stop_all_ranks and module.tokens_seen < curriculum.total_tokens:
            resume = f"python -m modernenc.resume {shlex.quote(run.run_dir)}"
            log.warning("stopped at step %d and saved; go on with: %s", module.step, resume)
            raise SystemExit(STOPPED)


class StartupSync(L.Callback):
    """First synchronisation point of the ranks: verify their places, agree on run folder and checkpoint, record the start."""

    def __init__(self, run: Run, curriculum: Curriculum, plan: str, checkpoint: Checkpoint | None, event: Event) -> None:
        self.run = run
        self.curriculum = curriculum
        self.plan = plan
        self.checkpoint = checkpoint
        self.event = event

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Synchronise; ValueError, on all ranks, if they were given different runs, data, code or checkpoints."""
        ranks.publish_environment(trainer.global_rank, trainer.local_rank, self.run.trainer.devices, self.run.trainer.num_nodes)
        module, own = cast(Pretraining, pl_module), self.event.checkpoint
        run_dir = ranks.agree(
            {
                **plain(self.run),
                **module.fingerprint,
                "checkpoint": f"{own} of {module.tokens_seen} tokens",
                "versions": lineage.versions(),
            },
            own_keys=("run_dir", "logger", "data.root", "data.cache"),
        )["run_dir"]
        module.run = replace(module.run, run_dir=run_dir)
        use_flash_attention_3(trainer.strategy.root_device)
        if trainer.is_global_zero:  # all ranks have read their checkpoint by now, so partial files can go
            checkpoints.remove_partial(Path(run_dir))
            _announce(self.run, self.curriculum, module, trainer, own)
            record_start(self.run, self.plan, self.checkpoint, self.event, trainer.world_size)
        self.checkpoint = None  # its tensors take as much memory as the model and its optimizers


def _lost_a_rank(error: RuntimeError) -> bool:
    """Return whether a collective failed for lack of a peer, which gloo and NCCL only say in words."""
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out"))


def _announce(run: Run, curriculum: Curriculum, module: Pretraining, trainer: L.Trainer, checkpoint: str) -> None:
    """Log the first lines of a run: its size, its hardware, its folder."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    dtype = torch.bfloat16 if run.trainer.precision == "bf16-mixed" else torch.float32
    device = trainer.strategy.root_device
    size = f"{curriculum.total_tokens:,} tokens in {curriculum.total_steps:,} steps"
    log.info("recipe %s, %s parameters, %s", run.recipe, f"{parameters:,}", size)
    backend = module.objectives.backbone.describe().backend(device, dtype)
    who = ranks.describe(trainer.world_size, torch.get_num_threads())
    how = f"{run.trainer.precision}, compiled" if module.compiles else run.trainer.precision
    log.info("device %s, precision %s, %s, %s", device, how, backend, who)
    if run.trainer.strategy == "fsdp":
        log.info("FSDP2: weights and optimizer states are split over ranks")
    elif run.checkpoint.distributed:
        log.info("checkpoint.distributed=true is for trainer.strategy=fsdp: checkpoints are written whole")
    advise_precision(device, run.trainer.precision, backend)
    log.info("run folder %s%s", run.run_dir, f", from {checkpoint}" if checkpoint else "")


def _loggers(run: Run) -> list[Logger]:
    if run.logger.wandb == "off":
        return []
    from modernenc.training.wandb_run import open_run  # wandb is an extra

    return [open_run(run)]


def _check_unchanged(run_dir: Path, checkpoint: Checkpoint | None, event: Event) -> None:
    """Raise ValueError if the run went on since its checkpoint was read."""
    newest = checkpoints.newest(run_dir)
    position = (checkpoint.run["rollbacks"], checkpoint.state.tokens_seen) if checkpoint else (0, 0)
    if newest and event.event != "rollback" and checkpoints.sort_key(newest) > position:
        resume = f"python -m modernenc.resume {shlex.quote(str(run_dir))}"
        raise ValueError(f"{run_dir} went on in another process until just now; go on with: {resume}")


@contextmanager
def _open_log(run_dir: Path) -> Iterator[bool]:
    """Log to the terminal and to the run's log file, and hold the lock on that file.

    Yields whether another process held the lock until just now; ValueError if one still does.
    """
    file = logging.FileHandler(run_dir / LOG)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    screen = _Screen() if sys.stdout.isatty() else logging.StreamHandler(sys.stdout)
    screen.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    try:
        assert file.stream is not None
        waited = acquire(file.stream, run_dir)
        log.setLevel(logging.INFO)
        log.handlers = [screen, file]
        yield waited
    except Exception as error:
        file.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "ended by: %s", (error,), None))
        raise
    finally:
        log.removeHandler(file)
        file.close()


class _Screen(logging.Handler):
    """Prints above the progress bar, in lines that are not broken, so that the commands in them can be copied."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        style = "yellow" if record.levelno >= logging.WARNING else None
        get_console().print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


def _quiet_libraries() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The module itself saves the state of the loader.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
    # DDP, of a step that trains all parameters.
    warnings.filterwarnings("ignore", ".*find_unused_parameters=True was specified in DDP constructor")
    warnings.filterwarnings("ignore", "GPU available but not used")  # a recipe may say cpu, and a Mac's is never used
    warnings.filterwarnings("ignore", ".*`srun` command is available")  # not every run on a node of a cluster is a job
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.* is deprecated")  # Lightning's use of torch
