"""`torchrun -m support.split_steps`: steps on matrices that are split over the ranks, and on the same ones whole."""

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from modernenc.model.muon import Muon
from modernenc.model.stable_adamw import StableAdamW
from modernenc.training.ranks import ending_as_rank

SHAPES = [(64, 192), (192, 64), (96, 96), (7, 33), (1, 5)]


def split(matrix: torch.Tensor, mesh: torch.distributed.device_mesh.DeviceMesh) -> DTensor:
    return distribute_tensor(matrix, mesh, [Shard(0)])


def compare(make: Callable[..., Optimizer], tolerance: float) -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    torch.manual_seed(0)
    whole = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    parts = [torch.nn.Parameter(split(matrix.detach(), mesh)) for matrix in whole]
    optimizers = make(whole), make(parts)
    for step in range(6):
        for one, other in zip(whole, parts, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = split(one.grad, mesh)
        whole[step % 5].grad = parts[step % 5].grad = None
        for optimizer in optimizers:
            optimizer.step()
        for one, other in zip(whole, parts, strict=True):
            assert isinstance(other.data, DTensor)
            torch.testing.assert_close(one.data, other.data.full_tensor(), rtol=tolerance, atol=tolerance)


if __name__ == "__main__":
    with ending_as_rank():
        torch.distributed.init_process_group("gloo")
        compare(lambda matrices: Muon(matrices, 1e-2, 0.1, 0.9), 0)
        compare(lambda matrices: StableAdamW(matrices, 1e-2, (0.9, 0.98), 0.1, 1e-6, max_lr=1e-2), 1e-6)
