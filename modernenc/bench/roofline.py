"""What a training step asks of a GPU, counted without one: kernels, FLOPs, bytes, and the shortest time that these allow.

A step runs on tensors that have shapes only, and stops where it would have to wait for a number from the GPU. Each kernel takes
the longer of its FLOPs at the peak and its bytes at the bandwidth: Williams et al. 2009, "Roofline". Products and attention
alone are the limit of a step whose other kernels are all fused into these.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from modernenc.bench import output
from modernenc.bench.settings import Bench, the_run
from modernenc.config import Run

GPU = "H100 SXM"
PEAK, BANDWIDTH = 989e12, 3.35e12
"""Of its data sheet: dense bf16 FLOPs and bytes a second."""
LAUNCH_S = 5e-6
"""What a kernel costs the processor that launches it, about."""
_NO_WORK = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view", "promote_types", "device")


@dataclass
class Kernel:
    """One launch."""

    name: str
    flops: float
    bytes: int

    @property
    def seconds(self) -> float:
        """The roofline."""
        return max(self.flops / PEAK, self.bytes / BANDWIDTH)


@dataclass
class Case:
    """A step of a backbone, all documents of one length."""

    backbone: str
    length: int
    tokens: int
    kernels: list[Kernel]

    def sums(self) -> dict[str, float]:
        """Launches, FLOPs, bytes, and the seconds of all, of products and attention alone, and to launch all."""
        heavy = [kernel for kernel in self.kernels if kernel.flops]
        return {
            "launches": len(self.kernels),
            "flops": sum(kernel.flops for kernel in heavy),
            "bytes": sum(kernel.bytes for kernel in self.kernels),
            "seconds": sum(kernel.seconds for kernel in self.kernels),
            "heavy_seconds": sum(kernel.seconds for kernel in heavy),
            "launch_seconds": len(self.kernels) * LAUNCH_S,
        }


def measure(bench: Bench, folder: Path) -> None:
    """Count every case, and write a table and JSON."""
    cases = []
    for backbone in bench.backbones:
        for length in bench.lengths:
            run = the_run(bench, backbone, length)
            tokens = run.trainer.micro_batch_tokens // length * length
            cases.append(Case(backbone, length, tokens, step_of(run, length, tokens)))
    table = output.new_table(
        f"a step of {bench.micro_batch_tokens:,} tokens on one {GPU}, at the least",
        ("", "kernels", "launch", "TFLOP", "GB", "ms", "M tok/s", "fused"),
    )
    for case in cases:
        sums = case.sums()
        table.add_row(
            f"{case.backbone} {case.length:,}", f"{sums['launches']:,.0f}",
            f"{1e3 * sums['launch_seconds']:.1f}", f"{sums['flops'] / 1e12:.2f}", f"{sums['bytes'] / 1e9:.1f}",
            f"{1e3 * sums['seconds']:.2f}", f"{case.tokens / sums['seconds'] / 1e6:.2f}",
            f"{case.tokens / sums['heavy_seconds'] / 1e6:.2f}",
        )  # fmt: skip
    output.write(folder, "roofline", table, [{**asdict(case), **case.sums()} for case in cases])
    Console().print(table)


def step_of(run: Run, length: int, tokens: int) -> list[Kernel]:
    """The kernels of forward, backward and optimizer; torch's DataDependentOutputException where a step would wait."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from modernenc import optim
    from modernenc.data.batch import MicroBatch
    from modernenc.kernels.device import assume_gpu
    from modernenc.model import build_objectives

    objectives = build_objectives(run)
    optimizers = optim.build(objectives, run.optim)
    ids, ends = np.zeros(tokens, np.int64), np.arange(0, tokens + 1, length)
    places = np.arange(int(tokens * run.phases["decay"].mask_ratio))
    batch = MicroBatch.of(ids, ends, places, ids[: len(places)])
    trace = _trace()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, assume_gpu():
        on_gpu = {name: fake.from_tensor(getattr(batch, name)) for name in ("input_ids", "target_positions", "targets")}
        batch = replace(batch, **on_gpu)
        with trace:
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = objectives(batch)
            loss.backward()
            optim.step(optimizers)
    return trace.kernels


def _flops(func: Any, args: Any, kwargs: Any, named: dict[str, Any], out: Any) -> float:
    """Of an operation: as torch counts products; attention by what each query sees, backward with the scores made again."""
    from torch.utils.flop_counter import flop_registry

    if "window_size" in named:
        left, right = named["window_size"]
        reach = named["max_k"] if left < 0 else min(named["max_k"], left + right + 1)
        return (10.0 if "grad_out" in named else 4.0) * named["query"].numel() * reach
    counts = flop_registry.get(func._overloadpacket)
    return float(counts(*args, **kwargs, out_val=out)) if counts else 0.0


def _tensors(tree: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _trace() -> Any:
    """A mode that writes down what each operation costs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Trace(TorchDispatchMode):
        """All kernels so far."""

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
            if all(aliases.values()) and (read or written) and not name.startswith(_NO_WORK):  # else a view
                moved = sum(tensor.nbytes for tensor in [*read, *written.values()])
                self.kernels.append(Kernel(name, _flops(func, args, kwargs, named, out), moved))
            return out

    return Trace()
