"""Train under SLURM: `python -m modernenc.launch +recipe=NAME +cluster=NAME [KEY=VALUE ...] [--dry-run]`.

It creates the run folder, writes `job.sh` into it and submits it; --dry-run prints the script and writes nothing. SLURM signals
the run ahead of its time limit; the run saves after its step, and the job requeues itself and resumes, until the run is done.
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from modernenc.cli import is_given
from modernenc.cli import run as run_cli
from modernenc.config import Run, register
from modernenc.exit_codes import STOPPED
from modernenc.planning.checks import check_run, check_settings
from modernenc.planning.resolve import resolve
from modernenc.saved_config import own_modules, plain

JOB = "job.sh"
_DRY_RUN = "--dry-run"


def main() -> None:
    """Submit the job that the command line describes, or print it."""
    dry = _DRY_RUN in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != _DRY_RUN]
    register()
    run_cli(Run, ("recipe", "cluster"), "launch", show if dry else submit)


def show(config: Run) -> None:
    """Print the script, after the checks that need no data."""
    run = _apply_cluster(resolve(config))
    check_settings(run)
    check_cluster(run)
    print(script(run), end="")


def submit(config: Run) -> None:
    """Create the run folder and submit the job; FileNotFoundError without SLURM, ValueError for a run that cannot train."""
    if shutil.which("sbatch") is None:
        raise FileNotFoundError(
            f"sbatch is not on this machine: run this where jobs are submitted, or see the script with {_DRY_RUN}"
        )
    run = _apply_cluster(resolve(config))
    curriculum, corpus = check_run(run)
    check_cluster(run)
    run = replace(run, data=replace(run.data, root=str(corpus.store)))
    from modernenc.planning.tables import plan_text  # torch takes seconds to import
    from modernenc.run_folder.create import create

    secret = run.cluster.environment
    run = replace(run, cluster=replace(run.cluster, environment={}))
    run = create(run, plan_text(run, curriculum), numbered=not is_given("run_dir"), corpus_files=corpus.small_files())
    path = Path(run.run_dir) / JOB
    path.touch(mode=0o600)
    path.write_text(script(replace(run, cluster=replace(run.cluster, environment=secret))))
    print(f"data.lanes={run.data.lanes}: the run may go on with up to as many ranks, now {run.trainer.devices} x "
          f"{run.trainer.num_nodes}")  # fmt: skip
    result = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(f"sbatch refused {path}: {result.stderr.strip()}; mend cluster.*, or the script, and sbatch it")
    print(f"job {result.stdout.strip()}: {path}\nits log: {path.parent}/slurm-{result.stdout.strip()}.log")


def check_cluster(run: Run) -> None:
    """Raise ValueError for settings of `cluster` under which no job could start, or train what the recipe says."""
    cluster = run.cluster
    if not cluster.time:
        raise ValueError("cluster.time: no value; give the job a time limit, hours:minutes:seconds")
    if run.trainer.accelerator == "gpu" and not cluster.gpus_per_node:
        raise ValueError("cluster.gpus_per_node=0, but the recipe says trainer.accelerator=gpu; request GPUs, or set it to cpu")
    if cluster.gpus_per_node and cluster.tasks_per_node != cluster.gpus_per_node:
        raise ValueError(
            f"cluster.tasks_per_node={cluster.tasks_per_node}, but cluster.gpus_per_node={cluster.gpus_per_node}: each GPU "
            "needs a process of its own"
        )
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"cluster.environment.{name}: expected the name of a variable, of letters, digits and `_`")
    for key, value in {**plain(run)["cluster"], "run_dir": run.run_dir, "recipe": run.recipe}.items():
        texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not all(str(text).isprintable() for text in texts):
            raise ValueError(f"cluster.{key} holds a control character, such as a line break, which no script may")


def script(run: Run) -> str:
    """Return the job as a shell script."""
    cluster, run_dir = run.cluster, run.run_dir
    options = [
        f"--job-name={run.recipe}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.tasks_per_node}",
        f"--cpus-per-task={cluster.cpus_per_task}",
        *([f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []),
        f"--time={cluster.time}",
        *([f"--partition={cluster.partition}"] if cluster.partition else []),
        *([f"--account={cluster.account}"] if cluster.account else []),
        *cluster.options,
        f"--signal=USR1@{cluster.signal_s}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(run_dir)}/slurm-%j.log",
    ]
    allowed = "".join(f" --allow-code {module}" for module in own_modules(run))
    if "://" in run.data.root:
        allowed += f" {shlex.quote(f'data.root={run.data.root}')}"
    srun_options = "".join(f" {shlex.quote(option)}" for option in cluster.srun_options)
    command = shlex.join([*cluster.wrapper, "python" if cluster.wrapper else sys.executable])  # a container has its own
    environment = {"OMP_NUM_THREADS": str(cluster.cpus_per_task), **cluster.environment}
    scratch = f"""
export TMPDIR={shlex.quote(cluster.scratch)}/"$SLURM_JOB_ID"
srun --ntasks-per-node=1 mkdir -p "$TMPDIR"
trap 'srun --ntasks-per-node=1 rm -rf "$TMPDIR"' EXIT
"""
    return f"""#!/bin/bash
{chr(10).join(f"#SBATCH {option}" for option in options)}

# Trains {run_dir} to its end from its newest checkpoint, and is requeued each time the limit comes near.
run={shlex.quote(run_dir)}

{chr(10).join(cluster.setup)}
{chr(10).join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
{scratch if cluster.scratch else ""}
cancelled=no
trap 'cancelled=yes' TERM
echo "job $SLURM_JOB_ID, start $((${{SLURM_RESTART_COUNT:-0}} + 1)), on $SLURM_JOB_NODELIST"

# Ranks end within moments of each other; --kill-on-bad-exit would kill those that are still ending.
srun --wait=120 --cpus-per-task="$SLURM_CPUS_PER_TASK"{srun_options} {command} -m modernenc.resume "$run"{allowed} &
step=$!
wait "$step"
status=$?
if [ "$cancelled" = yes ]; then  # bash stopped waiting in order to handle the signal; the run is saving
    wait "$step"
    echo "job $SLURM_JOB_ID was cancelled; what it saved is in $run/checkpoints; go on with: sbatch $run/{JOB}"
elif [ "$status" -eq {STOPPED} ]; then  # saved at a step boundary, ahead of the time limit
    echo "job $SLURM_JOB_ID stopped ahead of its time limit and is queued again"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" -ne 0 ]; then
    echo "job $SLURM_JOB_ID failed with status $status, see above; when that is mended: sbatch $run/{JOB}"
else
    echo "job $SLURM_JOB_ID is done: $run/report.html"
fi
exit "$status"
"""


def _apply_cluster(run: Run) -> Run:
    """Return the run with the devices and nodes that `cluster` requests, and an absolute `run_dir`."""
    trainer = replace(run.trainer, devices=run.cluster.tasks_per_node, num_nodes=run.cluster.nodes)
    return replace(run, run_dir=str(Path(run.run_dir).resolve()), trainer=trainer)


if __name__ == "__main__":
    main()
