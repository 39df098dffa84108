"""Runs that start at the same time, and what goes on being one run."""

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modernenc.atomic import partial_path
from modernenc.planning.checks import check_run
from modernenc.run_folder import checkpoints
from modernenc.run_folder.lineage import Event
from modernenc.run_folder.lineage import read as read_lineage
from modernenc.run_folder.tables import Table
from modernenc.saved_config import load
from modernenc.train import main
from modernenc.training import recorder
from modernenc.training.fit import fit
from support.commands import ROOT, importing
from support.runs import SMALL, resume, rollback, train

BEGIN = """
import sys, time
from dataclasses import replace
from pathlib import Path
from support.shapes import check_shapes
check_shapes()
from support.runs import composed
from modernenc.run_folder.create import create
from modernenc.planning.checks import check_run
run = composed(sys.argv[4:])
curriculum, corpus = check_run(run)
run, go, numbered = replace(run, run_dir=sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "numbered"
Path(go.parent, f"ready-{run.seed}").touch()
while not go.exists():
    time.sleep(0.001)
run = create(run, "", None, numbered)
print(run.run_dir)
"""


def begun_at_once(
    number: int, folder: Path, tmp_path: Path, how: str, settings: list[str]
) -> list[subprocess.CompletedProcess]:
    """So many processes that start a run at the same moment, each with its own seed."""
    go = tmp_path / "go"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN, str(folder), str(go), how, *settings, f"seed={seed}"],
            cwd=ROOT, env=importing(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for seed in range(number)
    ]  # fmt: skip
    while len(list(tmp_path.glob("ready-*"))) < number:
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
    go.touch()
    said = [process.communicate(timeout=120) for process in processes]
    return [subprocess.CompletedProcess([], p.returncode, *out) for p, out in zip(processes, said, strict=True)]


@pytest.fixture
def settings(corpus_root: Path) -> list[str]:
    return ["+recipe=demo", *SMALL, f"data.root={corpus_root}"]


@pytest.mark.slow
def test_runs_of_the_same_second_have_a_folder_each(settings, tmp_path):
    folder = tmp_path / "runs" / "2026-01-02_03-04-05"
    ended = begun_at_once(3, folder, tmp_path, "numbered", settings)
    assert [process.returncode for process in ended] == [0] * 3, [process.stderr for process in ended]
    folders = {Path(process.stdout.split()[-1]) for process in ended}
    assert folders == {folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 4))}
    assert {load(made).seed for made in folders} == set(range(3))
    assert all(load(made).run_dir == str(made) for made in folders)
    assert len({load(made).logger.run_id for made in folders}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("there", [False, True])
def test_of_runs_in_one_given_folder_one_starts_and_the_others_are_refused_by_name(settings, tmp_path, there):
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    ended = begun_at_once(3, folder, tmp_path, "given", settings)
    (won,) = (seed for seed, process in enumerate(ended) if process.returncode == 0)
    for process in ended[:won] + ended[won + 1 :]:
        said = process.stderr.strip().splitlines()[-1]
        assert f"run_dir={folder} holds a run of recipe" in said or f"run_dir={folder} is being started by another" in said
    assert load(folder).seed == won
    assert not list(folder.rglob("*.tmp"))


def test_a_start_that_was_cut_short_can_be_made_again(small_run):
    run = small_run()
    folder = Path(run.run_dir)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "log.txt").touch()
    (folder / "checkpoints" / "branch.ckpt").touch()
    assert (train(run) / "checkpoints" / "end-of-decay.ckpt").exists()


def test_processes_write_files_beside_each_other():
    name = Path("runs/demo/latest")
    other = subprocess.run(
        [sys.executable, "-c", f"from modernenc.atomic import *\nprint(partial_path(Path({str(name)!r})))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert other != str(partial_path(name)) and other.endswith(".tmp") and Path(other).parent == name.parent


def test_branches_of_one_run_at_once_are_all_in_its_lineage(small_run):
    folder = train(small_run())
    act = "import sys\nfrom pathlib import Path\nfrom modernenc.run_folder import lineage\nfor n in range(20):\n"
    act += "    lineage.add(Path(sys.argv[1]), lineage.Event('branched', into=f'{sys.argv[2]}-{n}'), 1, 0)"
    processes = [subprocess.Popen([sys.executable, "-c", act, str(folder), str(n)], cwd=ROOT) for n in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 3
    into = [entry["into"] for entry in read_lineage(folder) if entry["event"] == "branched"]
    assert sorted(into) == sorted(f"{process}-{n}" for process in range(3) for n in range(20))


def test_what_went_on_while_the_folder_was_waited_for_is_not_trained_again(small_run, monkeypatch):
    """Another process trains the run to its end between the reading of a checkpoint and the lock."""
    folder = train(small_run())
    held = (folder / "log.txt").open("a")
    lock, attempts = fcntl.flock, []
    lock(held, fcntl.LOCK_EX)

    def released_after_the_first_attempt(file, operation):
        attempts.append(operation)
        if len(attempts) == 2:
            held.close()
        return lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", released_after_the_first_attempt)
    run = replace(load(folder), run_dir=str(folder))
    curriculum, corpus = check_run(run)
    rows = Table(folder / "metrics.csv").read()
    with pytest.raises(ValueError, match="went on in another process until just now; go on with: "):
        fit(run, curriculum, corpus, "", None, Event("resume"))
    assert len(attempts) == 2 and Table(folder / "metrics.csv").read() == rows


def ids(folder: Path) -> list[str]:
    """Of the runs that wandb wrote for a run."""
    return [path.name.rpartition("-")[2] for path in sorted((folder / "wandb").glob("offline-run-*"))]


@pytest.mark.slow
def test_resumes_go_on_in_weights_and_biases_and_rollbacks_and_branches_are_new_runs_of_the_group(small_run, tmp_path):
    run = small_run("logger.wandb=offline", "checkpoint.keep_last=99")
    main(run)
    folder = Path(run.run_dir)
    begun = load(folder).logger
    for path in (folder / "checkpoints").glob("end-of-[ed]*.ckpt"):
        checkpoints.remove(path)
    resume(folder, [])
    assert len(ids(folder)) == 2 and set(ids(folder)) == {begun.run_id} and begun.group == begun.run_id
    boundary = folder / "checkpoints" / "end-of-stable.ckpt"
    rollback(boundary, ["optim.lr=1e-3"], 0)
    assert len(set(ids(folder))) == 2 and load(folder).logger.run_id in ids(folder)[-1:]
    assert load(folder).logger.group == begun.group
    branch = small_run("logger.wandb=offline", f"branch_from={boundary}", f"run_dir={tmp_path / 'branch'}")
    main(branch)
    assert load(tmp_path / "branch").logger.group == begun.group
    assert not set(ids(tmp_path / "branch")) & set(ids(folder))


@pytest.mark.slow
def test_a_service_that_does_not_answer_ends_no_run(small_run, tmp_path, monkeypatch):
    """With a login, and without a network."""
    environment = {
        **os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "5",
        "WANDB_HTTP_TIMEOUT": "2",
    }  # fmt: skip
    line = [sys.executable, "-m", "modernenc.train", *SMALL, "+recipe=demo", "logger.wandb=online"]
    run = small_run()
    line += [f"data.root={run.data.root}", f"run_dir={run.run_dir}"]
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "the service does not answer: logging offline" in " ".join(result.stdout.split())
    assert (Path(run.run_dir) / "report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the service is found through /proc")
def test_a_service_that_dies_in_the_midst_ends_no_run(small_run, monkeypatch, caplog):
    log_numbers = recorder.log_numbers

    def kill_and_log(trainer: Any, step: int, values: Any) -> None:
        if step == 5:
            for entry in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    mine = f"PPid:\t{os.getpid()}\n" in (entry / "status").read_text()
                    if mine and b"wandb-core" in (entry / "cmdline").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)
        log_numbers(trainer, step, values)

    monkeypatch.setattr(recorder, "log_numbers", kill_and_log)
    folder = train(small_run("logger.wandb=offline"))
    assert caplog.text.count("Weights & Biases is gone, and nothing more is sent there; metrics.csv has it all") == 1
    assert (folder / "checkpoints" / "end-of-decay.ckpt").exists()
    monkeypatch.undo()
    train(small_run("logger.wandb=offline", f"run_dir={folder.parent / 'next'}"))
    assert ids(folder.parent / "next")
