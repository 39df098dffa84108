"""Any launcher, any number of ranks, any strategy: the same documents in the same steps, and so the same training."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from modernenc.exit_codes import STOPPED
from modernenc.run_folder.checkpoints import manifest_of, newest, read, read_manifest
from modernenc.run_folder.tables import Table
from support.commands import ROOT
from support.results import FINAL, distance, losses, metrics, same_state
from support.runs import SMALL

EXACT = ["optim=adamw", "optim.lr=1e-3", "trainer.precision=32-true"]
WIDER = ["phases.extend.batch_rows=4", "phases.decay.batch_rows=4", "phases.extend.tokens=6000", "phases.decay.tokens=40000"]
ENDLESS = ["phases.stable.tokens=2000000", "data.workers=1", "checkpoint.every_tokens=0"]


def launched(ranks: int, launcher: str = "torchrun") -> list[str]:
    python = [sys.executable, "-m"]
    if ranks > 1 and launcher == "torchrun":
        python += ["torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m"]
    return python


def run(ranks: int, module: str, *arguments: str, launcher: str = "torchrun") -> str:
    line = [*launched(ranks, launcher), module, *arguments, f"trainer.devices={ranks}"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def begin(ranks: int, module: str, *arguments: str, launcher: str = "torchrun") -> subprocess.Popen[str]:
    line = [*launched(ranks, launcher), module, *arguments, f"trainer.devices={ranks}"]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(process: subprocess.Popen[str], happened) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.02)


def steps_done(folder: Path) -> int:
    rows = Table(folder / "metrics.csv").read()
    return int(rows[-1]["step"] or 0) if rows else 0


def kill_all(process: subprocess.Popen[str], folder: Path) -> None:
    """kill -9 of a launcher and of all that it launched, which torchrun puts into groups of their own."""
    process.kill()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
    process.communicate()


def saved_step(folder: Path) -> int:
    """Step of the newest checkpoint between boundaries."""
    saved = [path for path in folder.glob("checkpoints/step-*.ckpt") if manifest_of(path).exists()]
    return max((int(path.stem.partition("-")[2]) for path in saved), default=0)


@pytest.fixture
def settings(corpus_root: Path) -> list[str]:
    return ["+recipe=demo", *SMALL, f"data.root={corpus_root}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tolerance"), [(EXACT, 1e-4), (["trainer.precision=bf16-mixed"], 2e-2)], ids=["adamw, fp32", "muon, bf16"]
)
def test_other_ranks_workers_and_micro_batches_go_on_with_a_killed_run(settings, tmp_path, kind, tolerance):
    """1 -> 2 -> 3 -> 1 ranks (1 -> 3 -> 1 with Muon), each but the last killed after a checkpoint of its own.

    In fp32, the three share the weights (FSDP2) and write a share of the checkpoints each.
    """
    settings = [*settings, *WIDER, *kind, "checkpoint.every_tokens=1000"]
    alone, elastic = tmp_path / "alone", tmp_path / "elastic"
    run(1, "modernenc.train", *settings, f"run_dir={alone}")
    arguments = ["modernenc.train", *settings, f"run_dir={elastic}"]
    stages = [(1, 0, 256), (2, 1, 128), (3, 0, 512)]
    for ranks, workers, micro_batch_tokens in stages if kind == EXACT else stages[::2]:
        had = saved_step(elastic)
        place = [f"data.workers={workers}", f"trainer.micro_batch_tokens={micro_batch_tokens}"]
        if (kind, ranks) == (EXACT, 3):
            place += ["trainer.strategy=fsdp", "checkpoint.distributed=true"]
        process = begin(ranks, *arguments, *place)
        wait_for(process, lambda had=had: saved_step(elastic) >= had + 8)
        kill_all(process, elastic)
        arguments = ["modernenc.resume", str(elastic)]
    run(1, *arguments, "data.workers=1", "trainer.strategy=auto")
    assert len(losses(alone)) == len(losses(elastic)) > 50
    assert losses(alone) == pytest.approx(losses(elastic), rel=tolerance)
    if kind == EXACT:
        assert distance(alone / FINAL, elastic / FINAL) < 1e-5
    assert read(alone / FINAL).state.data["token_counts"] == read(elastic / FINAL).state.data["token_counts"]


@pytest.mark.slow
def test_ddp_and_fsdp_train_as_one_rank_and_take_up_each_others_checkpoints(settings, tmp_path):
    settings = [*settings, *WIDER, *EXACT, "checkpoint.keep_last=100", "clip_grad_norm=0.5", "phases.decay.tokens=15000"]
    settings += ["init.neighbours=true"]
    folders = {strategy: tmp_path / strategy for strategy in ("auto", "ddp", "fsdp")}
    for strategy, folder in folders.items():
        ranks = 1 if strategy == "auto" else 2
        place = [f"trainer.strategy={strategy}", f"run_dir={folder}", "checkpoint.distributed=true"]
        said = run(ranks, "modernenc.train", *settings, *place)
        assert bool(list(folder.glob("checkpoints/*.part"))) == (strategy == "fsdp")
        assert ("split over ranks" in " ".join(said.split())) == (strategy == "fsdp")
        assert len(losses(folder)) > 50
        assert losses(folder) == pytest.approx(losses(folders["auto"]), rel=1e-4)
        assert distance(folders["auto"] / FINAL, folder / FINAL) < 1e-5
    reference = tmp_path / "reference.ckpt"
    for path in (FINAL, FINAL.with_suffix(".json")):
        (folders["auto"] / path).rename(reference.with_suffix(path.suffix))
    for origin, strategy in (("auto", "fsdp"), ("fsdp", "ddp")):
        checkpoint = folders[origin] / "checkpoints" / "end-of-stable.ckpt"
        place = [f"trainer.strategy={strategy}", "checkpoint.distributed=false"]
        run(2, "modernenc.resume", str(checkpoint), *place)
        assert distance(folders[origin] / FINAL, reference) < 1e-5, (origin, strategy)


@pytest.mark.slow
def test_muon_splits_its_matrices_over_three_ranks_and_two_and_trains_as_on_one(settings, tmp_path, monkeypatch):
    """What three ranks began, two end."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    settings = [
        *settings,
        *WIDER,
        "optim=muon",
        "trainer.precision=32-true",
        "phases.decay.tokens=6000",
        "checkpoint.keep_last=100",
    ]
    alone, split = tmp_path / "alone", tmp_path / "split"
    run(1, "support.exact_muon", "modernenc.train", *settings, f"run_dir={alone}")
    run(3, "support.exact_muon", "modernenc.train", *settings, f"run_dir={split}", "trainer.strategy=fsdp")
    taken = shutil.copytree(split, tmp_path / "taken")
    run(2, "support.exact_muon", "modernenc.resume", str(taken / "checkpoints" / "end-of-stable.ckpt"))
    for folder in (split, taken):
        assert len(losses(folder)) > 20
        assert losses(folder) == pytest.approx(losses(alone), rel=1e-6)
        assert distance(folder / FINAL, alone / FINAL) < 1e-5


@pytest.mark.slow
def test_two_ranks_that_start_at_different_times_share_a_folder_and_resume_to_the_same_bits(settings, tmp_path):
    """The folder's name holds the second of the start, and the second rank starts seconds later."""
    place = ["trainer.devices=2", "trainer.strategy=fsdp", "checkpoint.distributed=true", "logger.every_steps=3"]
    line = [*launched(2, "lightning"), "modernenc.train", *settings, *EXACT, *place, "checkpoint.keep_last=100"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    (whole,) = (path for path in (tmp_path / "runs" / "demo").iterdir() if not path.is_symlink())
    middle = next(path for path in whole.glob("checkpoints/step-*.ckpt") if read_manifest(path)["step"] % 3)
    resumed = Path(shutil.copytree(whole, tmp_path / "resumed"))
    run(2, "modernenc.resume", str(resumed / "checkpoints" / middle.name), launcher="lightning")
    assert same_state(resumed / FINAL, whole / FINAL)
    assert metrics(resumed) == metrics(whole)


@pytest.mark.slow
def test_three_ranks_under_ddp_resume_to_the_same_bits(settings, tmp_path):
    """The order in which ranks add up a gradient must not depend on where the process began."""
    whole = tmp_path / "whole"
    kind = ["optim=muon", "trainer.precision=bf16-mixed", "phases.decay.tokens=6000", "checkpoint.keep_last=100"]
    run(3, "modernenc.train", *settings, *WIDER, *kind, f"run_dir={whole}")
    resumed = Path(shutil.copytree(whole, tmp_path / "resumed"))
    run(3, "modernenc.resume", str(resumed / "checkpoints" / "end-of-stable.ckpt"))
    assert same_state(resumed / FINAL, whole / FINAL)


def two_ranks(arguments: list[list[str]], port: int, ranks: Sequence[int] = (0, 1)) -> list[subprocess.Popen[str]]:
    """Start some of two ranks as a launcher would, each with its own arguments."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "modernenc.train", *arguments[rank], "trainer.devices=2"],
            cwd=ROOT,
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ranks
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["optim.lr=2e-3"], "optim.lr=0.002 on rank 1, but 0.001 on rank 0"),
        (["phases.decay.tokens=50000"], "phases.decay.tokens=50000.0 on rank 1, but 40000.0 on rank 0"),
        (["trainer.micro_batch_tokens=128", "seed=3"], "seed=3 on rank 1, but 17 on rank 0"),
    ],
)
def test_ranks_that_would_train_different_runs_stop_and_name_the_difference(settings, tmp_path, other, message):
    common = [*settings, *WIDER, *EXACT, f"run_dir={tmp_path / 'run'}"]
    for process in two_ranks([common, [*common, *other]], free_port()):
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and message in said and "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_nobody_joins_ends_within_the_timeout(settings, tmp_path):
    arguments = [*settings, *WIDER, f"run_dir={tmp_path / 'run'}", "trainer.timeout_s=5"]
    started = time.monotonic()
    (process,) = two_ranks([arguments, []], free_port(), ranks=[0])
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "trainer.timeout_s=5" in said and "Traceback" not in said
    assert time.monotonic() - started < 90


@pytest.mark.slow
def test_a_rank_that_is_blocked_by_another_ends_at_the_second_signal(settings, tmp_path):
    folder = tmp_path / "run"
    processes = two_ranks([[*settings, *ENDLESS, f"run_dir={folder}"]] * 2, free_port())
    try:
        wait_for(processes[0], lambda: steps_done(folder) > 5)
        processes[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        processes[0].send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            processes[0].wait(timeout=4)
        processes[0].send_signal(signal.SIGTERM)
        said = " ".join(processes[0].communicate(timeout=30)[0].split())
        assert processes[0].returncode == 128 + signal.SIGTERM
        assert "ended without saving: a second signal came" in said
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_a_signal_to_stop_saves_at_a_step_boundary_on_all_ranks(settings, tmp_path, launcher):
    folder = tmp_path / "run"
    process = begin(2, "modernenc.train", *settings, *ENDLESS, f"run_dir={folder}", launcher=launcher)
    wait_for(process, lambda: steps_done(folder) > 5)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == (STOPPED if launcher == "lightning" else 1), said  # torchrun has codes of its own
    assert re.search(r"stopped at step \d+ and saved", " ".join(said.split()))
    checkpoint = newest(folder)
    assert checkpoint is not None and read_manifest(checkpoint)["step"] == steps_done(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "victim"), [("torchrun", 1), ("lightning", 0)])
def test_a_lost_rank_ends_the_run_with_a_message(settings, tmp_path, launcher, victim):
    folder = tmp_path / "run"
    process = begin(2, "modernenc.train", *settings, *ENDLESS, f"run_dir={folder}", launcher=launcher)
    wait_for(process, lambda: steps_done(folder) > 5)
    os.kill(rank_process(process.pid, victim, launcher), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode, said
    assert "another rank was lost after step" in said and f"python -m modernenc.resume {folder}" in said


def rank_process(parent: int, rank: int, launcher: str) -> int:
    """The process of a rank: with Lightning's launcher the first one is the parent of the others."""
    if launcher == "lightning" and rank == 0:
        return parent
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and f"LOCAL_RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError(f"no process of rank {rank}")


def test_another_number_of_processes_than_the_recipe_has_devices_is_an_error(settings, tmp_path):
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    line = [sys.executable, "-m", "modernenc.train", *settings, f"run_dir={tmp_path / 'run'}"]
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "trainer.devices=1 trainer.num_nodes=1, but 2 processes were launched" in result.stderr


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("code", [0, 2])
def test_a_process_of_several_ends_before_the_interpreter_goes_and_with_all_it_said(ranks, code):
    """What is deleted when the interpreter goes stands for the tensors of a process group's threads."""
    program = f"""
import atexit, sys
from modernenc.training.ranks import ending_as_rank
class Deleted:
    def __del__(self):
        print("went with the interpreter", flush=True)
deleted = Deleted()
atexit.register(lambda: print("at exit"))
with ending_as_rank():
    if {ranks} > 1:
        import torch
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    print("done")
    if {code}:
        raise SystemExit({code})
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == code, process.stderr
    assert process.stdout.split("\n") == ["done", "at exit", *(["went with the interpreter"] if ranks == 1 else []), ""]
