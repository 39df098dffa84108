"""Start a run, go on with one: the run folder, the Lightning trainer, the report."""

import ctypes
import json
import logging
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from rich.logging import RichHandler

import modernenc
from modernenc.backbones.attention import path_for
from modernenc.checkpoints import AtomicCheckpointIO, write_json
from modernenc.config import CONFIG, Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.progress import TokenProgress
from modernenc.recorder import Checkpointing, Recorder
from modernenc.trainer import Pretraining
from modernenc.validation import Validator

log = logging.getLogger("modernenc")

LINEAGE = "lineage.json"


def start(run: Run, curriculum: Curriculum) -> None:
    """Make the run folder and write what the run is; ValueError when the folder holds a run already."""
    folder = Path(run.run_dir)
    if (folder / CONFIG).exists():
        held = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
        raise ValueError(
            f"run_dir={folder} holds a run of recipe {cast(dict, held).get('recipe')}; "
            f"go on with it by python -m modernenc.resume {folder}, or choose another run_dir"
        )
    from modernenc.plan import text

    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(run), folder / CONFIG)
    (folder / "plan.txt").write_text(text(run, curriculum) + "\n")
    latest = folder.parent / "latest"
    unfinished = folder.parent / ".latest"
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(folder.name)
    os.replace(unfinished, latest)


def fit(run: Run, curriculum: Curriculum, corpus: Corpus, checkpoint: Path | None) -> None:
    """Train to the end of the curriculum, from a checkpoint or from the start, then write the report."""
    _configure_logging(Path(run.run_dir))
    keep_freed_memory()
    module = Pretraining(run, curriculum, corpus)
    recorder = Recorder(run, Validator(run, curriculum, corpus))
    trainer = L.Trainer(
        accelerator=run.trainer.accelerator,
        devices=run.trainer.devices,
        num_nodes=run.trainer.num_nodes,
        strategy=run.trainer.strategy,
        precision=cast(Any, run.trainer.precision),
        callbacks=[recorder, Checkpointing(run), TokenProgress(curriculum, recorder)],
        logger=_loggers(run),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run.run_dir,
        max_epochs=-1,  # the curriculum ends the run, by tokens
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if trainer.is_global_zero:
        _announce(run, curriculum, module, trainer, checkpoint)
    else:
        log.setLevel(logging.WARNING)
    trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        from modernenc.report import write

        log.info("report: %s", write(Path(run.run_dir)))


def _announce(run: Run, curriculum: Curriculum, module: Pretraining, trainer: L.Trainer, checkpoint: Path | None) -> None:
    """The first lines of a run: what, where, how; and the same into the lineage."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    dtype = torch.bfloat16 if run.trainer.precision == "bf16-mixed" else torch.float32
    device = trainer.strategy.root_device
    log.info("recipe %s, %s parameters, %s tokens in %s steps", run.recipe, f"{parameters:,}",
             f"{curriculum.total_tokens:,}", f"{curriculum.total_steps:,}")  # fmt: skip
    log.info("device %s, precision %s, attention path %s, %d threads", device, run.trainer.precision,
             path_for(device, dtype), torch.get_num_threads())  # fmt: skip
    _advise_precision(device, run.trainer.precision)
    log.info("run folder %s%s", run.run_dir, f", from {checkpoint}" if checkpoint else "")
    path = Path(run.run_dir) / LINEAGE
    events = json.loads(path.read_text()) if path.exists() else []
    events.append({
        "event": "resume" if checkpoint else "start",
        "checkpoint": str(checkpoint) if checkpoint else "",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "modernenc": modernenc.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ranks": trainer.world_size,
    })  # fmt: skip
    write_json(path, events)


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
    fast = _fast_bf16()
    if precision == "bf16-mixed" and not fast:
        log.warning("this processor has no bf16 matrix instructions: trainer.precision=32-true may be faster")
    if precision == "32-true" and fast:
        log.info("this processor multiplies bf16 matrices several times faster: consider trainer.precision=bf16-mixed")


def _fast_bf16() -> bool:
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags  # the last: ARM


def _loggers(run: Run) -> list[Logger]:
    if run.logger.wandb == "off":
        return []
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    offline = run.logger.wandb == "offline"
    if not offline and not wandb.login(prompt=False):
        log.warning("logger.wandb=online, but there is no login: logging offline; run wandb login, then wandb sync")
        offline = True
    return [
        WandbLogger(project=run.logger.project, name=run.recipe, save_dir=run.run_dir, mode="offline" if offline else "online")
    ]


def _configure_logging(run_dir: Path) -> None:
    log.setLevel(logging.INFO)
    for handler in log.handlers:
        handler.close()
    log.handlers = [RichHandler(show_path=False, log_time_format="%H:%M:%S"), logging.FileHandler(run_dir / "log.txt")]
    log.handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The loader is one process by design: more would repeat the packing. Its state is saved by the module.
    for message in ("does not have many workers", "`IterableDataset` has `__len__`", "your dataloader is not resumable"):
        warnings.filterwarnings("ignore", f".*{message}")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.* is deprecated")  # Lightning about torch
