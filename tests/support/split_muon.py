"""`torchrun -m support.split_muon`: steps of Muon on matrices that are split over the ranks, and on the same ones whole."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from modernenc.model.muon import Muon
from modernenc.training.ranks import ending_as_rank

SHAPES = [(64, 192), (192, 64), (96, 96), (7, 33), (1, 5)]


def split(matrix: torch.Tensor, mesh: torch.distributed.device_mesh.DeviceMesh) -> DTensor:
    return distribute_tensor(matrix, mesh, [Shard(0)])


def compare() -> None:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    torch.manual_seed(0)
    whole = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    parts = [torch.nn.Parameter(split(matrix.detach(), mesh)) for matrix in whole]
    optimizers = Muon(whole, 1e-2, 0.1, 0.9), Muon(parts, 1e-2, 0.1, 0.9)
    for step in range(6):
        for one, other in zip(whole, parts, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = split(one.grad, mesh)
        whole[step % 5].grad = parts[step % 5].grad = None
        for optimizer in optimizers:
            optimizer.step()
        for one, other in zip(whole, parts, strict=True):
            assert isinstance(other.data, DTensor) and torch.equal(one, other.data.full_tensor())


if __name__ == "__main__":
    with ending_as_rank():
        compare()
