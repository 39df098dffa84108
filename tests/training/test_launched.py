"""Who launched a process, and as which rank: what the environment says, and what it leaves out."""

import os
import subprocess
import sys

import pytest

from modernenc.training import ranks
from support.commands import ROOT
from support.runs import small

TASK = {
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7", "SLURM_NODELIST": "host[3-4]",
}  # fmt: skip
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHED = {
    "a shell of srun's": (TASK, 1, r"2 processes were launched.* in a shell that srun opened, set SLURM_STEP_NUM_TASKS=1"),
    "srun without its node": ({**TASK, "SLURM_NODEID": ""}, 2, "SLURM_NODEID is not set: expected a number, 0 or more"),
    "srun in words": ({**TASK, "SLURM_STEP_NUM_TASKS": "two"}, 1, "SLURM_STEP_NUM_TASKS=two: expected a number, 1 or more"),
    "a rank of unknown many": ({"RANK": "0"}, 1, "RANK=0 is set, but WORLD_SIZE is not"),
    "one of many, but which": ({"WORLD_SIZE": "4"}, 1, r"WORLD_SIZE=4 is set, but RANK is not.*from 0 to 3"),
    "a rank in words": ({"RANK": "first", "WORLD_SIZE": "1"}, 1, "RANK=first: expected a number"),
    "a world in words": ({"RANK": "0", "WORLD_SIZE": "many"}, 1, "WORLD_SIZE=many: expected a number"),
    "no place on its node": ({"RANK": "1", "WORLD_SIZE": "2"}, 2, "LOCAL_RANK is not"),
    "a rank past the last": ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, 2, "RANK=2, but WORLD_SIZE=2: expected less"),
    "a place past the last": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, 2,
        "LOCAL_RANK=2, but LOCAL_WORLD_SIZE=2: expected less",
    ),
    "fewer devices": ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1, "but 2 processes were launched, 1 of them"),
}  # fmt: skip


@pytest.fixture
def launched_by(monkeypatch):
    """Sets the variables of a launcher, and no others."""
    for name in [*PLACES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards, whoever sets it meanwhile
        monkeypatch.delenv(name)

    def by(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return by


@pytest.mark.parametrize("case", LAUNCHED)
def test_what_a_launcher_leaves_out_or_says_wrongly_is_named(launched_by, case):
    variables, devices, said = LAUNCHED[case]
    launched_by(variables)
    with pytest.raises(ValueError, match=said):
        ranks.environment(devices, 1)


@pytest.mark.parametrize(
    "alone",
    [
        {}, {**TASK, "SLURM_PTY_PORT": "40001"}, {**TASK, "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "2"},
        {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"},
    ],
)  # fmt: skip
def test_a_process_that_is_alone_trains_alone(launched_by, alone):
    """In a shell of `srun --pty` or salloc too."""
    launched_by(alone)
    assert ranks.is_rank_zero()
    assert ranks.environment(1, 1).global_rank() == 0
    assert os.environ.get("WORLD_SIZE", "1") == "1"


def test_tasks_of_srun_are_ranks_however_it_was_told_their_number(launched_by):
    """--ntasks leaves SLURM_NTASKS_PER_NODE unset."""
    launched_by({**TASK, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"})
    found = ranks.environment(2, 1)
    assert (found.global_rank(), found.local_rank(), found.world_size(), found.main_address) == (1, 1, 2, "host3")
    assert not ranks.is_rank_zero() and found.main_port == 15_007


def test_a_shell_of_srun_that_trains_says_so_in_one_line(corpus_root, tmp_path):
    environment = {**{name: value for name, value in os.environ.items() if name not in PLACES}, **TASK}
    line = [sys.executable, "-m", "modernenc.train", *small(corpus_root, tmp_path / "run")]
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "set SLURM_STEP_NUM_TASKS=1 to train as one process" in result.stderr
