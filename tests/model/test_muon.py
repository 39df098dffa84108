"""Muon makes the bits of torch's own, and its directions are orthogonal."""

import subprocess
import sys

import pytest
import torch

from modernenc.model.muon import Muon, orthogonalise
from support.commands import ROOT, importing
from support.split_steps import SHAPES


def test_steps_are_torchs_to_the_bit():
    """Also of matrices that are orthogonalised together, since they have one shape or are transposed."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [*SHAPES, *(shape[::-1] for shape in SHAPES), *SHAPES]]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    settings = {"nesterov": True, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Muon(ours, 1e-2, 0.1, 0.9, 4), torch.optim.Muon(theirs, 1e-2, 0.1, 0.9, **settings)
    for step in range(6):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one) if step else torch.zeros_like(one)
            other.grad = one.grad.clone()
        ours[step % 5].grad = theirs[step % 5].grad = None  # matrices of another objective
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("ranks", [2, 3])
def test_steps_on_split_matrices_are_those_on_whole_ones_to_the_bit(ranks):
    """Also where a rank has fewer rows than others, or none."""
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--standalone",
        "-m",
        "support.split_steps",
    ]
    result = subprocess.run(line, cwd=ROOT, env=importing(), capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_a_direction_keeps_the_singular_vectors_of_a_matrix_and_has_singular_values_near_one(shape):
    torch.manual_seed(1)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = left @ torch.diag(torch.linspace(0.5, 2, len(values))) @ right
    found = left.T @ orthogonalise([matrix], 5, 1e-7)[0].float() @ right.T
    assert found.diagonal().min() > 0.6 and found.diagonal().max() < 1.3
    assert (found - torch.diag(found.diagonal())).abs().max() < 0.05
