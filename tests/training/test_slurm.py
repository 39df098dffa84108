"""Under SLURM, a real one of one node: launch, signal ahead of the time limit, requeue, resume, end."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modernenc.run_folder.checkpoints import read
from modernenc.run_folder.tables import Table
from support.commands import ROOT, command
from support.results import FINAL
from support.runs import SMALL

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=20
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A controller and a node of its own."""
    if "MODERNENC_SLURM" not in os.environ:
        pytest.skip("starts SLURM's daemons and takes ten minutes: set MODERNENC_SLURM=1")
    if os.geteuid() or not all(shutil.which(name, path="/usr/sbin:/usr/bin") for name in NEEDED):
        pytest.skip("needs root and Debian's packages slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    Path("/run/munge").mkdir(exist_ok=True)
    subprocess.run(["chown", "munge:munge", "/run/munge"], check=True)
    subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True)
    daemons = [subprocess.Popen([f"/usr/sbin/{name}", "-D"], stderr=subprocess.DEVNULL) for name in ("slurmctld", "slurmd")]
    deadline = time.monotonic() + 60
    while "idle" not in output("sinfo", "--noheader", "--format=%t"):
        assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
        time.sleep(0.5)
    yield
    for daemon in daemons:
        daemon.kill()
        daemon.wait()
    subprocess.run(["pkill", "munged"], check=True)
    del os.environ["SLURM_CONF"]


def output(*line: str) -> str:
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout


def submit(run_dir: Path, *arguments: str) -> str:
    """The number of the job."""
    result = command("modernenc.launch", *arguments, f"run_dir={run_dir}")
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[1].rstrip(":")


def log_of(run_dir: Path, job: str) -> str:
    path = run_dir / f"slurm-{job}.log"
    return path.read_text() if path.exists() else ""


def wait_for(text: str, run_dir: Path, job: str, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while text not in log_of(run_dir, job):
        assert time.monotonic() < deadline, log_of(run_dir, job)
        time.sleep(0.2)
    return log_of(run_dir, job)


@pytest.fixture
def settings(corpus_root: Path) -> list[str]:
    two_ranks = ["trainer.precision=32-true", "phases.extend.batch_rows=4", "phases.decay.batch_rows=4"]
    return ["+recipe=demo", *SMALL, *two_ranks, f"data.root={corpus_root}", "checkpoint.every_tokens=0"]


def test_a_dry_run_shows_the_job_and_writes_nothing(settings, tmp_path):
    arguments = [*settings, "+cluster=cpu_node", f"run_dir={tmp_path / 'run'}", "--dry-run"]
    arguments += ["cluster.scratch=/scratch/me", "cluster.partition=long", "cluster.account=us"]
    result = command("modernenc.launch", *arguments)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run").exists()
    for line in ("#SBATCH --ntasks-per-node=2", "#SBATCH --signal=USR1@60", "#SBATCH --partition=long", "#SBATCH --account=us"):
        assert line in result.stdout.splitlines()
    assert f"run={tmp_path / 'run'}" in result.stdout
    script = tmp_path / "job.sh"
    script.write_text(result.stdout)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_a_job_needs_a_cluster_that_the_recipe_fits(settings, tmp_path, monkeypatch):
    place = f"run_dir={tmp_path / 'run'}"
    assert (
        "no cluster chosen; add +cluster=NAME, with one of: cpu_node, gpu_node"
        in command("modernenc.launch", *settings, place).stderr
    )
    crowded = command("modernenc.launch", *settings, place, "+cluster=gpu_node", "--dry-run")
    assert "8 ranks exceed data.lanes=4" in crowded.stderr
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch is not on this machine" in command("modernenc.launch", *settings, place, "+cluster=cpu_node").stderr


@pytest.mark.slow
def test_one_job_goes_on_over_time_limits_until_the_run_is_done(slurm, settings, tmp_path):
    settings = [*settings, "phases.stable.tokens=300000", "phases.extend.tokens=800000", "phases.decay.tokens=500000"]
    run_dir, whole = tmp_path / "job", tmp_path / "whole"
    job = submit(run_dir, *settings, "+cluster=cpu_node", 'cluster.time="00:02:00"', "cluster.signal_s=50")
    script = str(run_dir / "job.sh")
    assert subprocess.run(["sbatch", "--test-only", script], check=False).returncode == 0
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    log = wait_for("is done", run_dir, job, 1500)
    assert "stopped ahead of its time limit and is queued again" in log
    assert f"job {job}, start 2" in log
    starts = log.count(", start ")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "modernenc.train"]
    subprocess.run([*torchrun, *settings, f"run_dir={whole}", "trainer.devices=2"], cwd=ROOT, env=environment, check=True)
    one, other = read(whole / FINAL).weights, read(run_dir / FINAL).weights
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    steps = [int(row["step"]) for row in Table(run_dir / "metrics.csv").read()]
    assert steps == list(range(1, len(steps) + 1))
    print(f"{starts} starts, {len(steps)} steps")


@pytest.mark.slow
def test_a_cancelled_and_a_failed_job_say_so(slurm, settings, tmp_path):
    endless = [*settings, "phases.stable.tokens=5000000", "+cluster=cpu_node"]
    job = submit(tmp_path / "cancelled", *endless)
    deadline = time.monotonic() + 90
    while len(Table(tmp_path / "cancelled" / "metrics.csv").read()) < 5:
        assert time.monotonic() < deadline, log_of(tmp_path / "cancelled", job)
        time.sleep(0.2)
    subprocess.run(["scancel", job], check=True)
    log = wait_for("was cancelled; what it saved", tmp_path / "cancelled", job, 40)
    assert "saved" in log and list((tmp_path / "cancelled" / "checkpoints").glob("step-*.json"))
    failed = submit(tmp_path / "failed", *endless, "+cluster.environment.RANK='0'", "+cluster.environment.WORLD_SIZE='7'")
    log = wait_for("failed with status 2", tmp_path / "failed", failed, 90)
    assert "7 processes were launched" in log
