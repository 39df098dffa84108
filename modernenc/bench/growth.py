"""How a step, and its parts, grow with the length of documents, at a constant number of tokens.

All tokens are in documents of one length. Besides the whole step there are the parts that should be linear: a layer that
attends to a window, MEGA's moving average, a layer of MEGA; and the one that is not: a layer that attends to whole documents.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console

from modernenc.bench import output
from modernenc.bench.settings import Bench, the_run

if TYPE_CHECKING:
    from torch import Tensor

    from modernenc.objectives.masked_lm import MaskedLM

LENGTHS = [256 << step for step in range(7)]
WHOLE = "step"


@dataclass
class Curve:
    """A part of a backbone at `LENGTHS`."""

    backbone: str
    part: str
    seconds: list[float]
    """Forward and backward, medians."""
    kept_bytes: list[int]
    """Between the two."""


def measure(bench: Bench, folder: Path) -> None:
    """Measure every backbone at every length, in turn, and write a table, JSON and a plot."""
    from modernenc.fit import keep_freed_memory

    keep_freed_memory()
    curves = [curve for backbone in bench.backbones for curve in _curves(bench, backbone)]
    table = output.new_table(
        f"seconds for {bench.step_tokens:,} tokens, by the length of documents", ("", *(f"{length:,}" for length in LENGTHS))
    )
    for curve in curves:
        if curve.part == WHOLE:
            table.add_row(curve.backbone)
        table.add_row(f"  {curve.part}", *(f"{seconds:.3g}" for seconds in curve.seconds))
        table.add_row("    GB kept", *(f"{kept / 1e9:.2f}" for kept in curve.kept_bytes))
    output.write(folder, "growth", table, [asdict(curve) for curve in curves])
    Console().print(table)
    draw(curves, folder / "growth.png")


def _curves(bench: Bench, backbone: str) -> list[Curve]:
    import torch

    from modernenc.estimate import kept_bytes
    from modernenc.model import build_objectives

    model = build_objectives(the_run(bench, backbone, LENGTHS[-1])).masked_lm
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, 1e-4, fused=True)
    parts = {length: _parts(model, bench, length) for length in LENGTHS}
    curves = [Curve(backbone, name, [], []) for name in parts[LENGTHS[0]]]
    for curve in curves:
        seconds: dict[int, list[float]] = {length: [] for length in LENGTHS}
        for repetition in range(bench.repetitions + 1):
            for length in LENGTHS:
                with kept_bytes({id(weight) for weight in weights}) if not repetition else nullcontext({}) as kept:
                    started = time.perf_counter()
                    with torch.autocast("cpu", torch.bfloat16, enabled=bench.precision == "bf16-mixed"):
                        out = parts[length][curve.part]()
                if not repetition:  # to warm up, and to count
                    curve.kept_bytes.append(sum(kept.values()))
                out.backward()
                if curve.part == WHOLE:
                    optimizer.step()
                optimizer.zero_grad()
                if repetition:
                    seconds[length].append(time.perf_counter() - started)
        curve.seconds = [median(seconds[length]) for length in LENGTHS]
    return curves


def _parts(model: "MaskedLM", bench: Bench, length: int) -> dict[str, Callable[[], "Tensor"]]:
    """Forward passes to a single number, over documents of one length: the whole model's and those of its kinds of parts."""
    import torch

    from modernenc.backbones import attention, gated_attention, mega, modernbert, rotary
    from modernenc.data.batch import MicroBatch
    from modernenc.kernels.documents import Documents

    tokens = max(bench.step_tokens, length) // length * length
    ids = torch.randint(model.backbone.vocab_size, (tokens,))
    places = torch.randperm(tokens)[: int(tokens * bench.mask_ratio)].sort().values
    ends = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    batch = MicroBatch.of(ids.numpy(), ends.numpy(), places.numpy(), ids[places].numpy())
    hidden = torch.randn(tokens, model.backbone.hidden_size).requires_grad_()
    parts: dict[str, Callable[[], Tensor]] = {WHOLE: lambda: model(batch)[0] / len(places)}
    backbone = model.backbone
    if isinstance(backbone, modernbert.ModernBERT):
        layout = attention.VarlenInfo(ends, length, tokens, hidden.device)
        head_dim = backbone.hidden_size // backbone.num_attention_heads
        turn = rotary.rotation(backbone.local_rope_theta, head_dim, rotary.positions_of(ends, tokens), length)
        for kind in ("local", "global"):
            layer = backbone.layers[backbone.describe().layer_types.index(kind)]
            parts[f"{kind} layer"] = lambda layer=layer: layer(hidden, layout, turn).sum()
    elif isinstance(backbone, mega.Mega):
        layer: Any = backbone.layers[0]
        documents = Documents([length] * (tokens // length), hidden.device)
        chunks = gated_attention.chunks_of(documents, backbone.chunk_size)
        parts["EMA"] = lambda: layer.mega_layer.ema_gate(hidden, documents).sum()
        parts["layer"] = lambda: layer(hidden, documents, chunks).sum()
    return parts


def draw(curves: list[Curve], path: Path) -> None:
    """Time against length: what is linear in tokens lies flat."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(curve.backbone for curve in curves))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.6 * len(names), 3.8), squeeze=False, constrained_layout=True)
    for axis, name in zip(axes[0], names, strict=True):
        for curve in (curve for curve in curves if curve.backbone == name):
            style: dict[str, Any] = {"color": "black", "linewidth": 2} if curve.part == WHOLE else {}
            axis.plot(LENGTHS, curve.seconds, marker="o", markersize=3, label=curve.part, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS], fontsize=7)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("length of documents")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("seconds, same number of tokens")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
