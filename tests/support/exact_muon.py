"""`python -m support.exact_muon COMMAND ...`: a command of modernenc whose Muon orthogonalises in fp64.

In bf16 a gradient that ranks sum in another order can change an update by a rounding step of bf16.
"""

import runpy
import sys

import torch

from modernenc.model import muon

if __name__ == "__main__":
    muon.COMPUTE_TYPE = torch.float64
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
