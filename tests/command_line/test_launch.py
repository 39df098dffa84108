"""What `modernenc.launch` writes for SLURM, and what it refuses."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from modernenc.launch import check_cluster, script
from support.commands import ROOT, error
from support.runs import SMALL, composed

CLUSTER = ["+recipe=demo", "+cluster=cpu_node", *SMALL, "data.root=nowhere"]


def test_a_container_wraps_the_training_command():
    run = composed(
        [
            *CLUSTER,
            "cluster.wrapper=[apptainer,exec,--nv,image.sif]",
            'cluster.srun_options=["--container-image=it","--mpi=none"]',
        ],
        "launch",
    )
    assert (
        'srun --wait=120 --cpus-per-task="$SLURM_CPUS_PER_TASK" --container-image=it --mpi=none '
        'apptainer exec --nv image.sif python -m modernenc.resume "$run" &'
    ) in script(run)
    assert f"{sys.executable} -m modernenc.resume" in script(composed(CLUSTER, "launch"))


def test_code_of_the_users_own_is_carried_on_by_the_job():
    run = composed([*CLUSTER, "+backbone.x=1", "backbone._target_=their.backbone.Model"], "launch")
    assert '-m modernenc.resume "$run" --allow-code their.backbone &' in script(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cluster.time=''"], "cluster.time: no value"),
        (["trainer.accelerator=gpu"], "cluster.gpus_per_node=0, but the recipe says trainer.accelerator=gpu"),
        (["cluster.gpus_per_node=8"], "cluster.tasks_per_node=2, but cluster.gpus_per_node=8: each GPU needs"),
        (["+cluster.environment.A-B=1"], "cluster.environment.A-B: expected the name of a variable"),
        (["+cluster.environment.A='x\ny'"], "cluster.environment holds a control character"),
        (["cluster.partition='x\n#SBATCH --wrap=evil'"], "cluster.partition holds a control character"),
        (["run_dir='a\nb'"], "run_dir holds a control character"),
    ],
)
def test_a_job_that_could_not_start_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_cluster(composed([*CLUSTER, *settings], "launch"))


def test_a_mapping_of_variables_is_written_as_everywhere_else():
    said = error("modernenc.launch", *CLUSTER, "cluster.environment={A: 1, B-C: 2}", "--dry-run")
    assert "cluster.environment.B-C: expected the name" in said
    run = composed([*CLUSTER, "cluster.environment={NCCL_DEBUG: INFO}"], "launch")
    assert "export NCCL_DEBUG=INFO" in script(run)


def test_secrets_of_the_environment_are_in_the_script_alone(corpus_root, tmp_path):
    """With a stand-in for sbatch, which only says the number of a job."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 7\n")
    sbatch.chmod(0o755)
    line = [sys.executable, "-m", "modernenc.launch", *CLUSTER, f"data.root={corpus_root}", f"run_dir={tmp_path / 'run'}"]
    result = subprocess.run(
        [*line, "cluster.environment={TOKEN: hunter2}"],
        cwd=ROOT, env={**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "data.lanes=4: the run may go on with up to as many ranks" in result.stdout
    held = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert held == [Path(tmp_path / "run" / "job.sh")]
    assert stat.S_IMODE(held[0].stat().st_mode) == 0o600
