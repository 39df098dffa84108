"""What only a GPU can show of a run."""

import shutil
from pathlib import Path

import pytest

from support.commands import command
from support.results import FINAL, losses, metrics, same_state
from support.runs import resume, small, train

pytestmark = pytest.mark.gpu
GPU = ["trainer.accelerator=gpu", "trainer.micro_batch_tokens=4096"]
EAGER = [*GPU, "trainer.compile=false", "optim=adamw", "optim.lr=1e-4"]


def test_a_run_resumes_to_the_same_bits_under_strict_determinism(small_run, tmp_path):
    settings = [*GPU, "trainer.determinism=strict", "trainer.window_kernel=true", "checkpoint.keep_last=9"]
    whole = train(small_run(*settings))
    for checkpoint in sorted((whole / "checkpoints").glob("step-*.ckpt"))[:2]:
        copied = Path(shutil.copytree(whole, tmp_path / checkpoint.stem))
        resume(copied / "checkpoints" / checkpoint.name, [])
        assert same_state(copied / FINAL, whole / FINAL), checkpoint.stem
        assert metrics(copied) == metrics(whole)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [("trainer.strategy=ddp", 1e-3), ("trainer.compile=true", 1e-2), ("trainer.window_kernel=true", 1e-2)],
)
def test_losses_are_those_of_one_process_that_compiles_nothing(small_run, corpus_root, tmp_path, change, tolerance):
    """By NCCL, compiled, and with the window kernel; in a process of its own, since the compiler cannot look through checks."""
    plain = train(small_run(*EAGER))
    result = command("modernenc.train", *small(corpus_root, tmp_path / "changed", *EAGER, change))
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "changed") == pytest.approx(losses(plain), rel=tolerance)
