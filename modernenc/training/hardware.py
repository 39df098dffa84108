"""Check and choose what depends on the machine: devices, determinism, precision."""

import logging
import os
from pathlib import Path

import torch

from modernenc.config import Run
from modernenc.training import ranks

log = logging.getLogger("modernenc")


def check_hardware(run: Run) -> None:
    """Raise ValueError if this machine lacks the devices that the run requests, or the launcher started other ranks."""
    ranks.environment(run.trainer.devices, run.trainer.num_nodes)
    devices = torch.cuda.device_count()
    accelerator = run.trainer.accelerator
    if (accelerator == "gpu" or (accelerator == "auto" and devices)) and devices < run.trainer.devices:
        raise ValueError(
            f"trainer.accelerator={accelerator} trainer.devices={run.trainer.devices}: this machine has {devices} CUDA "
            "devices; ask for fewer, or for trainer.accelerator=cpu trainer.devices=1 trainer.strategy=auto"
        )


def choose_accelerator(run: Run) -> str:
    """Return Lightning's accelerator: a GPU by CUDA or the processor, since Lightning's own `auto` would take a Mac's GPU."""
    return "cuda" if run.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def choose_determinism(run: Run) -> None:
    """Under `trainer.determinism=strict`, let torch refuse kernels whose result may change from one call to the next."""
    strict = run.trainer.determinism == "strict"
    if strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(strict)


def advise_precision(device: torch.device, precision: str, backend: str) -> None:
    """Log when the other precision would be faster on this device; nothing is switched. `backend` is the backbone's."""
    if device.type != "cpu":
        if precision == "32-true" and "tiled" in backend:
            log.warning(
                "trainer.precision=32-true: attention has no fused kernel for fp32 and takes several times as long as "
                "under trainer.precision=bf16-mixed"
            )
        return
    cpuinfo = Path("/proc/cpuinfo")  # exists on Linux only
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    fast = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))  # the last one is ARM's
    if precision == "bf16-mixed" and flags and not fast:
        log.warning("this processor has no bf16 matrix instructions: trainer.precision=32-true may be faster")
    if precision == "32-true" and fast:
        log.info("this processor multiplies bf16 matrices several times faster: consider trainer.precision=bf16-mixed")
