"""Single parts of a step, to measure alone: copies, attention with a window by each way, optimizers, cross-entropy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modernenc.bench.turns import Turn, Work, device
from modernenc.config import Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from modernenc.backbones.attention import VarlenInfo
    from modernenc.backbones.rotary import Rotation

    Path = Callable[[Tensor, Rotation, VarlenInfo, int | None], Tensor]


@dataclass
class Copies:
    """A copy of a large square matrix of fp32."""

    size: int
    at_once: int

    def start(self) -> Turn:
        """Two matrices."""
        import torch

        a, b = torch.randn(2, self.size, self.size, device=device())

        def turn(number: int) -> Work:
            for _ in range(self.at_once):
                b.copy_(a)
            return Work(0, 0.0)

        return turn


@dataclass
class Window:
    """Attention with a window over documents of one length, rotary included: one of `attention.BACKENDS`, FA3 or flex."""

    path: str
    run: Run
    length: int
    backward: bool
    at_once: int

    def start(self) -> Turn:
        """Queries, keys and values of a micro-batch, in half precision."""
        import torch
        from torch.nn.attention import activate_flash_attention_impl

        from modernenc.backbones import attention, rotary

        if self.path == "FA3":
            activate_flash_attention_impl("FA3")
        backbone = self.run.backbone
        heads, window = backbone["num_attention_heads"], backbone["local_attention"] // 2
        head_dim = backbone["hidden_size"] // heads
        tokens = max(self.length, self.run.trainer.micro_batch_tokens // self.length * self.length)
        ends = torch.arange(0, tokens + 1, self.length, dtype=torch.int32)
        positions = rotary.positions_of(ends.to(device()), tokens)
        rotation = rotary.rotation(backbone["local_rope_theta"], head_dim, positions, self.length)
        layout = attention.VarlenInfo(ends, self.length, tokens, device())
        qkv = torch.randn(tokens, 3, heads, head_dim, device=device()).bfloat16().requires_grad_()
        path = (
            flex(layout, window) if self.path == "flex" else attention.BACKENDS["varlen" if self.path == "FA3" else self.path]
        )
        grad = torch.ones_like(qkv[:, 0])

        def turn(number: int) -> Work:
            for _ in range(self.at_once):
                out = path(qkv, rotation, layout, window)
                if self.backward:
                    out.backward(grad)
                    qkv.grad = None
            return Work(self.at_once * tokens, 0.0)

        return turn


def flex(layout: "VarlenInfo", window: int) -> "Path":
    """Attention with scores as a function, compiled where there is a GPU; it finds once which blocks of a mask are empty."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from modernenc.backbones.rotary import rotate

    lengths = layout.cu_seqlens.diff()
    documents = torch.repeat_interleave(torch.arange(len(lengths), device=device()), lengths, output_size=layout.tokens)

    def seen(batch: "Tensor", head: "Tensor", query: "Tensor", key: "Tensor") -> "Tensor":
        return (documents[query] == documents[key]) & ((query - key).abs() <= window)

    masked, attend = create_block_mask, flex_attention
    if device().type == "cuda":
        masked, attend = torch.compile(masked), torch.compile(attend)
    mask = masked(seen, None, None, layout.tokens, layout.tokens, device())

    def path(qkv: "Tensor", rotation: "Rotation", layout: "VarlenInfo", window: int | None) -> "Tensor":
        q, k, v = (x.transpose(0, 1)[None] for x in (rotate(qkv[:, 0], rotation), rotate(qkv[:, 1], rotation), qkv[:, 2]))
        return attend(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return path


@dataclass
class Update:
    """A step of the run's optimizer alone."""

    run: Run

    def start(self) -> Turn:
        """A model and gradients, the same in each turn."""
        import torch

        from modernenc import optim
        from modernenc.model import build_objectives

        objectives = build_objectives(self.run).to(device())
        optimizers = optim.build(objectives, self.run.optim)
        grads = [(parameter, torch.randn_like(parameter)) for parameter in objectives.parameters()]

        def turn(number: int) -> Work:
            for parameter, grad in grads:
                parameter.grad = grad
            optim.step(optimizers)
            return Work(0, 0.0)

        return turn


@dataclass
class CrossEntropy:
    """Cross-entropy of a micro-batch's predicted tokens and its gradients, so many rows at a time."""

    run: Run
    rows: int

    def start(self) -> Turn:
        """Random hidden states and targets."""
        import torch

        from modernenc.objectives import linear_cross_entropy as module

        module.CHUNK_ROWS = self.rows
        hidden_size, vocab_size = self.run.backbone["hidden_size"], self.run.backbone["vocab_size"]
        targets = int(self.run.trainer.micro_batch_tokens * self.run.phases["decay"].mask_ratio)
        hidden = torch.randn(targets, hidden_size, device=device()).bfloat16().requires_grad_()
        weight = torch.randn(vocab_size, hidden_size, device=device()).mul_(0.02).requires_grad_()
        bias = torch.zeros(vocab_size, device=device()).requires_grad_()
        wanted = torch.randint(vocab_size, (targets,), device=device())

        def turn(number: int) -> Work:
            with torch.autocast(device().type, torch.bfloat16):
                loss, _ = module.linear_cross_entropy(hidden, weight, bias, wanted)
            loss.backward()
            hidden.grad = weight.grad = bias.grad = None
            return Work(targets, 6.0 * targets * hidden_size * vocab_size)

        return turn
