"""Every Triton kernel compiles for the GPUs that are common in training, without one, and keeps its numbers in registers.

`python tests/model/test_kernels_compile.py` prints a table of what the kernels take.
"""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import pytest

from support.commands import importing

SHARED_KB = {80: 163, 90: 227, 100: 227}
"""Shared memory that one program can have, by compute capability."""


class Report(NamedTuple):
    """What a compiled kernel takes."""

    kernel: str
    arch: int
    registers: int
    """Of each thread."""
    shared: int
    """Bytes of a program."""
    spilled: int
    """Bytes of each thread that did not fit into registers, written and read."""


def kernels(arch: int) -> dict[str, tuple[Any, dict[str, str | int]]]:
    """Each kernel with its arguments in a run of ModernBERT-base, or of MEGA.

    An argument is the type of a tensor, or a number; options of compilation are among them.
    """
    from modernenc.kernels import cross_entropy_triton, geglu_triton, rotation_triton, state_passing_triton
    from modernenc.kernels import window_attention_triton as window

    tokens, heads, head_dim, vocab, states, segments = 65_536, 12, 64, 50_368, 16, 1_024
    attended: dict[str, str | int] = {
        **{"qkv": "bf16", "token_stride": 3 * heads * head_dim, "part_stride": heads * head_dim, "head_stride": head_dim},
        **{"cos": "fp32", "sin": "fp32", "documents": "i32", "out": "bf16", "log_sums": "fp32", "tokens": tokens},
        **{"heads": heads, "grad": "bf16", "dqkv": "bf16", **window.constants(head_dim, 64, 64)},
    }
    passed: dict[str, str | int] = {
        **{"outgoing": "fp32", "outgoing_hidden": 2 * states * segments, "outgoing_state": segments, "outgoing_segment": 1},
        **{"decay": "fp32", "decay_hidden": 2 * states, "decay_state": 1, "same": "i8", "incoming": "fp32"},
        **{"half": states, "rows": 768 * states, "segments": segments},
        **{"ROWS": state_passing_triton.TILE_STATES, "SEGMENTS": state_passing_triton.TILE_SEGMENTS},
    }
    losses: dict[str, str | int] = {
        **{"logits": "bf16", "stride": vocab, "vocab": vocab, "targets": "i64", "losses": "fp32", "best": "i64"},
        "COLUMNS": cross_entropy_triton.TILE_COLUMNS,
    }
    gated: dict[str, str | int] = {
        **{"x": "bf16", "out": "bf16", "grad": "bf16", "x_grad": "bf16", "width": 1_152, "results": tokens * 1_152},
        "TILE": geglu_triton.TILE,
    }
    rotated: dict[str, str | int] = {
        **dict.fromkeys(("q", "k", "v", "q_result", "k_result", "v_result"), "bf16"),
        **{"cos": "fp32", "sin": "fp32", "tokens": tokens, "token_stride": 3 * heads * head_dim, "head_stride": head_dim},
        **{"result_token_stride": heads * head_dim, "result_head_stride": head_dim},
        **{"HALF": head_dim // 2, "COLUMNS": head_dim // 2, "ROWS": rotation_triton.ROWS},
    }
    backward = window.BACKWARD if arch >= 90 else window.BACKWARD_FROM_REGISTERS
    return {
        "window forward": (window._forward, {**attended, **window.FORWARD}),
        "window backward": (window._backward, {**attended, **backward}),
        "states forward": (state_passing_triton._pass_states, {**passed, "FIRST_FORWARD": True}),
        "states backward": (state_passing_triton._pass_states, {**passed, "FIRST_FORWARD": False}),
        "cross-entropy": (cross_entropy_triton._to_gradients, losses),
        "rotation forward": (rotation_triton._rotate, {**rotated, "SIGN": 1}),
        "rotation backward": (rotation_triton._rotate, {**rotated, "SIGN": -1}),
        "geglu forward": (geglu_triton._forward, gated),
        "geglu backward": (geglu_triton._backward, gated),
    }


def compile_for(arch: int, name: str) -> Report:
    """Compile a kernel as a call would: a 1 is a constant, and multiples of 16 are known as such."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments = kernels(arch)[name]
    options = {key: arguments[key] for key in ("num_warps", "num_stages") if key in arguments}
    upper = {key: arguments[key] for key in kernel.arg_names if key.isupper() or arguments[key] == 1}
    types = {key: f"*{arguments[key]}" if isinstance(arguments[key], str) else "i32" for key in kernel.arg_names}
    known = {
        (place,): [["tt.divisibility", 16]]
        for place, key in enumerate(kernel.arg_names)
        if key not in upper and (isinstance(arguments[key], str) or int(arguments[key]) % 16 == 0)
    }
    source = ASTSource(kernel, types | dict.fromkeys(upper, "constexpr"), upper, known)
    knobs.nvidia.dump_ptxas_log = True
    with redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    log = printed.getvalue()
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", log))
    return Report(name, arch, max(map(int, re.findall(r"Used (\d+) registers", log))), compiled.metadata.shared, spilled)


def compile_all() -> list[Report]:
    """Compile every kernel for every GPU, whatever was compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        return [compile_for(arch, name) for arch in SHARED_KB for name in kernels(arch)]


def test_all_kernels_compile_without_spilling_registers():
    pytest.importorskip("triton")
    command = [sys.executable, __file__, "json"]  # neither Triton's interpreter nor the checks of shapes may be on
    found = subprocess.run(command, env=importing(TRITON_INTERPRET="0"), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    reports = [Report(*row) for row in json.loads(found.stdout)]
    assert len(reports) == 9 * len(SHARED_KB)
    for report in reports:
        assert report.spilled == 0 and report.shared <= SHARED_KB[report.arch] * 1024, report


if __name__ == "__main__":
    reports = compile_all()
    if sys.argv[1:] == ["json"]:
        print(json.dumps(reports))
    else:
        print(f"{'kernel':24}{'arch':>6}{'registers':>11}{'shared bytes':>14}{'spill bytes':>13}")
        for report in reports:
            print(f"{report.kernel:24}{report.arch:6}{report.registers:11}{report.shared:14}{report.spilled:13}")
