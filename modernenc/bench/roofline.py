"""Count what a training step takes on a GPU, without one: kernels, FLOPs, bytes, and the shortest time that these allow.

A step runs on tensors that have shapes only, and raises where it would wait for a value from the GPU. Each kernel takes the
longer of its FLOPs at the peak rate and its bytes at the bandwidth: Williams et al. 2009, "Roofline". Products and attention
alone bound a step whose other kernels are all fused into them.
"""

from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from modernenc.bench.output import Output
from modernenc.bench.settings import Bench, make_run
from modernenc.config import Run
from modernenc.data.batch import MicroBatch
from modernenc.kernels.device import assume_gpu
from modernenc.model import optim
from modernenc.model.build import build_objectives

GPU = "H100 SXM"
PEAK, BANDWIDTH = 989e12, 3.35e12
"""Dense bf16 FLOP/s and bytes per second, from its data sheet."""
LAUNCH_S = 5e-6
"""Approximate processor time to launch a kernel."""
_NO_WORK = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view", "promote_types", "device")


@dataclass
class Kernel:
    """One kernel launch."""

    name: str
    flops: float
    bytes: int

    @property
    def seconds(self) -> float:
        """Shortest time by the roofline model."""
        return max(self.flops / PEAK, self.bytes / BANDWIDTH)


def measure(bench: Bench, folder: Path) -> Output:
    """Trace a training step of each backbone on documents of each length, and return the FLOPs and bytes of its kernels."""
    title = f"a step of {bench.micro_batch_tokens:,} tokens on one {GPU}, at the least"
    output = Output(folder, "roofline", title, "kernels", "launch", "TFLOP", "GB", "ms", "M tok/s", "fused")
    for backbone, length in product(bench.backbones, bench.lengths):
        run = make_run(bench, backbone, length)
        tokens = run.trainer.micro_batch_tokens // length * length
        kernels = trace_step(run, length, tokens)
        heavy = [kernel for kernel in kernels if kernel.flops]  # matrix products and attention
        flops, moved = sum(kernel.flops for kernel in heavy), sum(kernel.bytes for kernel in kernels)
        seconds, heavy_seconds = (sum(kernel.seconds for kernel in some) for some in (kernels, heavy))
        output.table.add_row(
            f"{backbone} {length:,}", f"{len(kernels):,}", f"{1e3 * LAUNCH_S * len(kernels):.1f}", f"{flops / 1e12:.2f}",
            f"{moved / 1e9:.1f}", f"{1e3 * seconds:.2f}", *(f"{tokens / s / 1e6:.2f}" for s in (seconds, heavy_seconds)),
        )  # fmt: skip
        output.add(backbone=backbone, length=length, tokens=tokens, kernels=[asdict(kernel) for kernel in kernels])
    return output


def trace_step(run: Run, length: int, tokens: int) -> list[Kernel]:
    """Return the kernels of forward, backward and optimizer; DataDependentOutputException (torch) where a step would wait."""
    objectives = build_objectives(run)
    optimizers = optim.build(objectives, run.optim)
    ids, positions = np.zeros(tokens, np.int64), np.arange(int(tokens * run.phases["decay"].mask_ratio))
    batch = MicroBatch.of(ids, np.arange(0, tokens + 1, length), positions, ids[: len(positions)])
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, assume_gpu():
        on_gpu = {name: fake.from_tensor(getattr(batch, name)) for name in ("input_ids", "target_positions", "targets")}
        batch = replace(batch, **on_gpu)
        with Trace() as trace:
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = objectives(batch)
            loss.backward()
            optim.step(optimizers)
    return trace.kernels


class Trace(TorchDispatchMode):
    """Record the cost of each operation as a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        named = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
        aliases = {one.name: one.alias_info.is_write for one in func._schema.arguments if one.alias_info is not None}
        changed = [named.get(one) for one, is_written in aliases.items() if is_written]
        read, written = _tensors(named), {id(leaf): leaf for leaf in _tensors([out, changed])}
        # An operation that aliases an argument without writing to it is a view, which launches nothing.
        if all(aliases.values()) and (read or written) and not name.startswith(_NO_WORK):
            moved = sum(tensor.nbytes for tensor in [*read, *written.values()])
            self.kernels.append(Kernel(name, _flops(func, args, kwargs, named, out), moved))
        return out


def _flops(func: Any, args: Any, kwargs: Any, named: dict[str, Any], out: Any) -> float:
    """Return an operation's FLOPs: products as torch counts them, attention by the keys that each query sees.

    The backward pass of attention computes the scores again.
    """
    if "window_size" in named:
        left, right = named["window_size"]
        reach = named["max_k"] if left < 0 else min(named["max_k"], left + right + 1)
        return (10.0 if "grad_out" in named else 4.0) * named["query"].numel() * reach
    counts = flop_registry.get(func._overloadpacket)
    return float(counts(*args, **kwargs, out_val=out)) if counts else 0.0


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
