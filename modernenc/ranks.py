"""Which rank this process is, whoever launched it: torchrun, srun, or Lightning itself.

srun says nothing that libraries understand: a process that believes it is alone would train on the data of rank 0. So its
variables are translated into those of torchrun, and all four are compared with the trainer's before the first step.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment


def is_first() -> bool:
    """Whether this process makes the run folder: rank 0, as far as can be told before the ranks meet."""
    adopt_srun()
    place = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("NODE_RANK") or "0"
    return int(place) == 0


def adopt_srun() -> None:
    """Say in torchrun's variables what srun says in its own; nothing for a process that srun started alone."""
    step = os.environ
    ranks = int(step.get("SLURM_STEP_NUM_TASKS", "1"))
    if ranks == 1 or "RANK" in step:
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment  # seconds to import

    nodes = int(step["SLURM_STEP_NUM_NODES"])
    slurm = SLURMEnvironment(auto_requeue=False)
    step.update(
        RANK=step["SLURM_PROCID"],
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=step["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(ranks // nodes),
        GROUP_RANK=step["SLURM_NODEID"],
        MASTER_ADDR=slurm.main_address,
        MASTER_PORT=str(slurm.main_port),
    )


def environment(devices: int, num_nodes: int) -> "ClusterEnvironment":
    """What tells Lightning who launched the processes.

    Raises ValueError when that was something else, with another number of ranks than `trainer.devices` x `trainer.num_nodes`.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    adopt_srun()
    if "RANK" not in os.environ:
        return LightningEnvironment()
    world, on_this_node = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", devices))
    if (world, on_this_node) != (devices * num_nodes, devices):
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={num_nodes}, but {world} processes were launched, "
            f"{on_this_node} of them on this node; give both the same numbers"
        )
    return TorchElasticEnvironment()


def described(ranks: int, threads: int) -> str:
    """Ranks and threads in words."""
    return f"{ranks} rank{'s' * (ranks > 1)} of {threads} thread{'s' * (threads > 1)}"


def export(rank: int, local_rank: int, devices: int, num_nodes: int) -> None:
    """Set the four variables, or check those that a launcher set; ValueError where they disagree with the trainer."""
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
