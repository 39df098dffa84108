"""How several ranks share the work: DDP, where each holds the whole model, or FSDP2, where each holds a part."""

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.fsdp import FSDPModule, fully_shard

from modernenc.config import Run
from modernenc.objectives import Objectives


def choose_strategy(run: Run) -> Strategy | str:
    """Return Lightning's strategy for `trainer.strategy` on the run's number of ranks."""
    world, timeout = run.trainer.devices * run.trainer.num_nodes, timedelta(seconds=run.trainer.timeout_s)
    if run.trainer.strategy == "fsdp":
        return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, timeout=timeout)
    if run.trainer.strategy == "auto" and world == 1:
        return "auto"
    # A step trains one of several heads. Besides, DDP would otherwise regroup the gradients after the first backward pass of
    # each process, and three or more ranks add the numbers of another group in another order: no resume would be exact.
    return DDPStrategy(find_unused_parameters=True, timeout=timeout)


@torch.no_grad()
def share_embeddings(objectives: Objectives, strategy: Strategy) -> None:
    """Under FSDP2, give all ranks the first one's embeddings, as DDP does: other processors round counts otherwise."""
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(objectives, FSDPModule):
        embedding, decoder = objectives.backbone.token_embeddings().weight, objectives.masked_lm.decoder.weight
        for weight in dict.fromkeys((embedding, decoder)):  # in one order on all ranks
            weight.copy_(strategy.broadcast(weight.detach()))


def split_parameters(objectives: Objectives, strategy: Strategy) -> None:
    """Under FSDP2, split the parameters over the ranks, layer by layer; do nothing under another strategy."""
    if not isinstance(strategy, ModelParallelStrategy) or isinstance(objectives, FSDPModule):
        return
    mesh = strategy.device_mesh["data_parallel"]
    for layer in objectives.backbone.describe().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(objectives, mesh=mesh)


def synchronise_gradients(objectives: Objectives, strategy: Strategy, last: bool) -> AbstractContextManager[None]:
    """Return a context for the forward and backward pass of a micro-batch; gradients are exchanged only in the `last` one."""
    if isinstance(objectives, FSDPModule):  # for which Lightning's own switch has no effect
        objectives.set_requires_gradient_sync(last)
    elif isinstance(strategy, DDPStrategy) and not last:
        return strategy.block_backward_sync()
    return nullcontext()
