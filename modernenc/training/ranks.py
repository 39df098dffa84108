"""Find out which rank this process is, whatever launched it: torchrun, srun, or Lightning itself.

Libraries do not understand the variables of srun, and a process that believes it is alone would train on the data of rank 0.
Therefore srun's variables are translated into torchrun's, and all four are compared with the trainer's before the first step.
"""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modernenc.config import differences

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

_SRUN = "SLURM_STEP_NUM_TASKS"
_PLACES = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
"""Variables of torchrun that hold a rank, each with the one that holds the number of ranks."""


def is_rank_zero() -> bool:
    """Return whether this is rank 0, as far as can be known before the ranks synchronise."""
    adopt_slurm_environment()
    place = next((name for name in ("RANK", "LOCAL_RANK", "NODE_RANK") if os.environ.get(name)), "")
    return not place or _number(place) == 0


def adopt_slurm_environment() -> None:
    """Translate srun's variables into torchrun's, unless srun started a single process.

    A shell that `srun --pty` opened has the variables of a task, but a command typed there is one process. Raises ValueError,
    naming the variable, if one is missing or not a number.
    """
    step = os.environ
    if _SRUN not in step or "RANK" in step or "SLURM_PTY_PORT" in step:
        return
    ranks = _number(_SRUN, least=1)
    if ranks == 1:
        return
    rank, local_rank, node = (_number(name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"))
    nodes = _number("SLURM_STEP_NUM_NODES", least=1)
    from lightning.fabric.plugins.environments import SLURMEnvironment  # seconds to import

    hosts = step.get("SLURM_STEP_NODELIST") or step.get("SLURM_NODELIST", "127.0.0.1")
    step.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(hosts))
    step.setdefault("MASTER_PORT", str(15_000 + int(step.get("SLURM_JOB_ID", "0")[-4:])))
    step.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(ranks // nodes),
        GROUP_RANK=str(node),
    )


def environment(devices: int, num_nodes: int) -> "ClusterEnvironment":
    """Return the environment that tells Lightning which launcher started the processes.

    Raises ValueError if the launcher started another number of ranks than `trainer.devices` x `trainer.num_nodes`, or if its
    variables are inconsistent.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    adopt_slurm_environment()
    _check_launched()
    if "RANK" not in os.environ:
        return LightningEnvironment()
    world = _number("WORLD_SIZE", least=1)
    on_this_node = _number("LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in os.environ else devices
    if (world, on_this_node) != (devices * num_nodes, devices):
        by_srun = _SRUN in os.environ and os.environ[_SRUN] == str(world)
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={num_nodes}, but {world} processes were launched, "
            f"{on_this_node} of them on this node; give both the same numbers"
            + (f", or, in a shell that srun opened, set {_SRUN}=1 to train as one process" if by_srun else "")
        )
    return TorchElasticEnvironment()


def _check_launched() -> None:
    """Raise ValueError if variables of the launcher contradict each other, or some of them are missing."""
    said = os.environ
    if "RANK" not in said:
        # Lightning's own launcher sets WORLD_SIZE and NODE_RANK, and no RANK.
        if "WORLD_SIZE" in said and "NODE_RANK" not in said and (world := _number("WORLD_SIZE", least=1)) > 1:
            raise ValueError(
                f"WORLD_SIZE={world} is set, but RANK is not: a launcher sets both; set RANK, from 0 to {world - 1}, or unset "
                "WORLD_SIZE to train as one process"
            )
        return
    if "WORLD_SIZE" not in said:
        raise ValueError(
            f"RANK={said['RANK']} is set, but WORLD_SIZE is not: a launcher sets both; set WORLD_SIZE to the number of ranks, "
            "or unset RANK to train as one process"
        )
    if _number("WORLD_SIZE", least=1) > 1 and "LOCAL_RANK" not in said:
        raise ValueError(
            f"RANK={said['RANK']} WORLD_SIZE={said['WORLD_SIZE']} are set, but LOCAL_RANK is not: set it, from 0 on each node"
        )
    for place, of in _PLACES:
        if place in said and of in said and _number(place) >= _number(of, least=1):
            raise ValueError(f"{place}={said[place]}, but {of}={said[of]}: expected less; let one launcher set both")


def _number(name: str, least: int = 0) -> int:
    """Return the number in an environment variable; ValueError, naming the variable, if it holds none."""
    value = os.environ.get(name, "")
    if not (value.isascii() and value.isdigit() and int(value) >= least):
        was = f"{name}={value}" if value else f"{name} is not set"
        raise ValueError(f"{was}: expected a number, {least} or more; launchers of ranks set this environment variable")
    return int(value)


def agree(settings: dict[str, Any], own_keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of rank 0; ValueError, on all ranks, names the first that another rank has otherwise.

    `own_keys` begin the dotted keys that ranks need not share.
    """
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return settings
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, settings)
    for rank, others in enumerate(everyone):
        for key, first, other in differences(everyone[0], others):
            if not key.startswith(own_keys):
                raise ValueError(
                    f"{key}={other} on rank {rank}, but {first} on rank 0: start all ranks with the same command and files"
                )
    return everyone[0]


@contextmanager
def ending_as_rank() -> Iterator[None]:
    """Run a command to its end, and then, if this process is one of several ranks, end it with the interpreter still up.

    Threads of a process group may still let go of tensors, for which they need the interpreter: where it goes first, the
    process aborts (SIGABRT), and its launcher ends the other ranks and reports another status.
    """
    code: Any = 0
    try:
        yield
    except SystemExit as ended:
        code = ended.code
        raise
    finally:
        torch = sys.modules.get("torch")
        grouped = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
        if grouped and isinstance(code, int) and sys.exc_info()[0] in (None, SystemExit):
            atexit._run_exitfuncs()  # such as those that end workers and finish logs
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def describe(ranks: int, threads: int) -> str:
    """Return the number of ranks and threads as text."""
    return f"{ranks} rank{'s' * (ranks > 1)} of {threads} thread{'s' * (threads > 1)}"


def publish_environment(rank: int, local_rank: int, devices: int, num_nodes: int) -> None:
    """Set the four variables, or check those that a launcher set; ValueError if they disagree with the trainer."""
    if devices * num_nodes == 1:
        return
    expected = {
        "RANK": rank,
        "WORLD_SIZE": devices * num_nodes,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": devices,
    }
    for name, value in expected.items():
        if os.environ.setdefault(name, str(value)) != str(value):
            raise ValueError(f"{name}={os.environ[name]}, but the trainer has {value}; let one launcher set it")
