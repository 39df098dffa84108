"""What `modernenc.doctor` says of this machine, and of one on which all is wrong at once."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from modernenc.__main__ import COMMANDS
from support.commands import ROOT, command, importing
from support.runs import train

MOUNT = "mount -t tmpfs -o size=64m tmpfs /dev/shm && ulimit -n 64 && exec taskset -c 0 "
"""A shell command that a command follows: little shared memory, few open files, one core."""


def test_a_machine_and_its_corpus_are_described(small_run, corpus_root):
    folder = train(small_run())
    result = command("modernenc.doctor", str(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    subjects = ["packages", "device", "precision", "attention", "cores", "memory", "open files", "/dev/shm", "caches", "disk"]
    for subject in [*subjects, "corpus", "SLURM", "Weights & Biases"]:
        assert re.search(rf"^(ok  |note) {subject}: ", result.stdout, re.M), subject
    ((read, taken),) = re.findall(r"read at ([\d,]+) tokens/s; the run takes ([\d,]+)", result.stdout)
    assert int(read.replace(",", "")) > 100 * int(taken.replace(",", "")) > 0
    lost = command("modernenc.doctor", str(folder), "--data", str(corpus_root / "nowhere"))
    assert lost.returncode == 1 and re.search(r"^bad  corpus: .*nowhere.*\n +-> give the corpus with --data", lost.stdout, re.M)


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root, to mount less shared memory")
def test_each_thing_that_is_wrong_with_a_machine_is_named_with_what_to_do(tmp_path, small_disk):
    old = tmp_path / "old" / "torch-2.1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.1.0\n")
    environment = importing(HOME="/proc/nowhere")
    environment["PYTHONPATH"] = f"{old.parent}{os.pathsep}{environment['PYTHONPATH']}"
    for name in ("XDG_CACHE_HOME", "HF_HOME", "WANDB_API_KEY"):
        environment.pop(name, None)
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{MOUNT} "$0" -m modernenc.doctor', sys.executable],
        cwd=small_disk(1), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    for line in (
        r"bad  packages: torch 2\.1\.0, expected >=2\.11\n +-> pip install --upgrade modernenc",
        r"note cores: 1 usable, 1 threads: reading text and training share one\n +-> ask for a second core",
        r"bad  open files: at most 64, and loader workers may need 1,024\n +-> ulimit -n 64; the administrator allows no 1,024",
        r"note /dev/shm: 64 MiB free: .*\n +-> give the container more \(docker run --shm-size=8g\), or set data\.workers=0",
        r"note caches: /proc/nowhere/\.cache, .* cannot be written to: .*\n +-> export XDG_CACHE_HOME=FOLDER HF_HOME=FOLDER",
        r"bad  disk: 0\.0 GB free at .*\n +-> make room, or choose another disk with run_dir=FOLDER",
    ):
        assert re.search(f"^{line}", result.stdout, re.M), (line, result.stdout)


def test_all_commands_are_listed_with_what_they_are_for():
    result = command("modernenc")
    assert result.returncode == 0 and result.stderr == ""
    purposes = dict(re.findall(r"^  (\S+) +(\S.*)$", result.stdout, re.M))
    assert list(purposes) == list(COMMANDS)
    files = [path for package in ("modernenc", "data_prep") for path in (ROOT / package).rglob("*.py")]
    runnable = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in files
        if '__name__ == "__main__"' in path.read_text()
    }
    assert runnable == {*COMMANDS, "modernenc"}
