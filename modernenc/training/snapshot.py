"""What a checkpoint takes from the training loop, and how the loop goes on from it: `capture` and `restore`, side by side."""

import logging
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from modernenc.data.state import DataState, merge_rank_states
from modernenc.model import optim
from modernenc.model.build import load_weights, weights_of
from modernenc.run_folder import lineage
from modernenc.run_folder.checkpoints import Checkpoint, Content, TrainState, UnloggedMetrics
from modernenc.saved_config import plain
from modernenc.training import ranks
from modernenc.training.accumulator import Metrics
from modernenc.training.state import LoopState

log = logging.getLogger(__name__)

_NOT_ON_THIS_RANK = object()
"""Placeholder for a value that another rank saves."""


def capture(module: LoopState, sharded: bool) -> Content:
    """Return a copy of all that the run needs to go on after its last step; every rank must call this.

    The first rank gets the whole, or, with `sharded`, its own shard of what is split over ranks; the others get their
    shards, or nothing.
    """
    weights = weights_of(module.objectives)  # first: after a validation this lets FSDP2 restore the sharded parameters
    states = optim.snapshot(module.plain_optimizers(), optim.names_of(module.objectives))
    tensors = _copy_to_cpu({"weights": weights, "optimizers": states}, sharded, module.global_rank == 0)
    data = _data_state_of_all_ranks(module)
    losses = _gather(module, [float(metrics.loss) for metrics in module.metrics.values()])
    if module.global_rank:
        return tensors
    unlogged = {
        objective: UnloggedMetrics(
            metrics.spec.tokens_seen, losses[number], metrics.targets, float(metrics.grad_norm), metrics.skipped
        )
        for number, (objective, metrics) in enumerate(module.metrics.items())
    }
    state = TrainState(
        tokens_seen=module.tokens_seen,
        step=module.step,
        phase=module.last_spec.phase,
        boundary=bool(module.finished_phase),
        seconds=module.seconds,
        skipped_steps=module.skipped_steps,
        skipped_since=module.skipped_since,
        norms={objective: list(norms) for objective, norms in module.norms.items()},
        unlogged=unlogged,
        data=data,
        **module.fingerprint,
        ranks=module.trainer.world_size,
        threads=torch.get_num_threads(),
        versions=lineage.versions(),
    )
    return Checkpoint(run=plain(module.run), state=state, **tensors)


def restore(module: LoopState, checkpoint: Checkpoint) -> None:
    """Take over weights and position from a checkpoint; ValueError if it does not fit the data or the run.

    Optimizer states and unlogged metrics follow once their parts exist: `restore_optimizers` and `restore_metrics`.
    """
    state = checkpoint.state
    if state.corpus != module.fingerprint["corpus"]:
        raise ValueError(
            f"data.root={module.run.data.root}: not the data that the checkpoint was trained with (tokenizer, sources or "
            "shards differ); restore them, or start another run"
        )
    for name, hashed in state.tasks.items():
        if name in module.run.tasks and hashed != module.fingerprint["tasks"][name]:
            raise ValueError(
                f"tasks.{name}.train={module.run.tasks[name].train}: not the items that the checkpoint was trained with; "
                "restore the file, or start another run"
            )
    load_weights(module.objectives, checkpoint.weights)
    module.tokens_seen = state.tokens_seen
    last_step_tokens = module.curriculum.at(max(0, state.tokens_seen - 1)).step_tokens
    module.last_spec = module.curriculum.at(max(0, state.tokens_seen - last_step_tokens))
    module.step = state.step
    module.seconds = state.seconds
    module.skipped_steps = state.skipped_steps
    module.skipped_since = state.skipped_since
    module.norms = dict(state.norms)
    module.data_state = state.data


def restore_optimizers(module: LoopState, optimizers: list[torch.optim.Optimizer], checkpoint: Checkpoint) -> None:
    """Give new optimizers the states of the checkpoint."""
    optim.restore(optimizers, optim.names_of(module.objectives), checkpoint.optimizers)


def restore_metrics(module: LoopState, state: TrainState) -> None:
    """Restore the metrics that were not logged yet, and warn if results may differ in the last bits from here on.

    Each rank restores its own loss if the world size is unchanged; otherwise the first rank takes the sum.
    """
    world = module.trainer.world_size
    now = describe_bits(world, torch.get_num_threads(), lineage.versions()).split(", ")
    before = describe_bits(state.ranks, state.threads, state.versions).split(", ")
    if now != before:
        differing = [", ".join(sorted(set(one) - set(other))) or "nothing" for one, other in ((now, before), (before, now))]
        log.warning("%s, but %s before: weights will agree closely, not to the bit", *differing)
    for objective, metrics in state.unlogged.items():
        losses = metrics.losses
        if len(losses) != world:
            losses = [sum(losses)] + [0.0] * (world - 1)
        module.metrics[objective] = Metrics(
            module.curriculum.at(metrics.tokens_seen),
            torch.tensor(losses[module.global_rank]),
            metrics.targets,
            0,
            torch.tensor(metrics.grad_norm),
            metrics.skipped,
        )


def describe_bits(number: int, threads: int, versions: dict[str, str]) -> str:
    """Return what the bits of a run may depend on as one line: ranks, threads and versions."""
    return f"{ranks.describe(number, threads)}, {lineage.describe_versions(versions)}"


def _gather(module: LoopState, numbers: list[float]) -> list[list[float]]:
    """Return each number as each rank has it."""
    world = module.trainer.world_size
    spread = [0.0] * (len(numbers) * world)
    spread[module.global_rank :: world] = numbers
    summed = module.sum_over_ranks(spread).tolist()
    return [summed[at : at + world] for at in range(0, len(summed), world)]


def _data_state_of_all_ranks(module: LoopState) -> dict[str, Any]:
    if module.trainer.world_size == 1:
        return module.data_state
    states: list[Any] | None = [None] * module.trainer.world_size if module.global_rank == 0 else None
    torch.distributed.gather_object(module.data_state, states)
    return merge_rank_states([DataState.from_dict(state) for state in states]).to_dict() if states else {}


def _copy_to_cpu(value: Any, sharded: bool, first: bool) -> Any:
    """Return a deep copy on the CPU that shares no memory with the live state."""
    if isinstance(value, dict):
        copies = {key: _copy_to_cpu(item, sharded, first) for key, item in value.items()}
        return {key: copy for key, copy in copies.items() if copy is not _NOT_ON_THIS_RANK}
    if isinstance(value, list):
        return [_copy_to_cpu(item, sharded, first) for item in value]
    if isinstance(value, DTensor):
        value, first = (value.to_local(), True) if sharded else (value.full_tensor(), first)
    if not first:
        return _NOT_ON_THIS_RANK
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
