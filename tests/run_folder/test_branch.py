"""Rollbacks and branches: what follows changes, what was trained does not."""

import csv
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from modernenc.data.blocks import Corpus
from modernenc.planning.branch import fork
from modernenc.reporting.comparison import compare
from modernenc.run_folder import checkpoints
from modernenc.run_folder.checkpoints import read
from modernenc.run_folder.history import ABANDONED
from modernenc.run_folder.lineage import read as read_lineage
from modernenc.run_folder.tables import Table
from modernenc.saved_config import apply_overrides, load
from modernenc.train import main as train_main
from support.commands import ROOT, command, importing
from support.results import FINAL, losses, same
from support.runs import SMALL, composed, resume, rollback, small, train


@pytest.fixture(scope="module")
def trained(corpus_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    settings = ["+recipe=demo", *SMALL, f"data.root={corpus_root}", f"run_dir={run_dir}", "checkpoint.keep_last=100"]
    return train(composed(settings))


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run that is done."""
    return Path(shutil.copytree(trained, tmp_path / "finished"))


def between(folder: Path, tokens: int) -> Path:
    """The checkpoint between boundaries at or after a position."""
    return min(
        (path for path in folder.glob("checkpoints/step-*.ckpt") if checkpoints.tokens_seen(path) >= tokens),
        key=checkpoints.tokens_seen,
    )


def test_a_rollback_goes_on_under_other_settings_and_keeps_what_it_gave_up(finished):
    checkpoint = between(finished, 3000)
    at = read(checkpoint).state.step
    before = losses(finished)
    position = checkpoints.tokens_seen(checkpoint)
    held = {path.name: checkpoints.tokens_seen(path) for path in (finished / "checkpoints").glob("*.ckpt")}
    rollback(checkpoint, ["optim.lr=1e-3", "optim.weight_decay=0.1"], 0)
    after = losses(finished)
    assert list(after) == list(before)
    assert all(after[step] == before[step] for step in before if step <= at)
    assert after[at + 2] != before[at + 2]
    rows = Table(finished / "metrics.csv").read()
    assert {float(row["weight_decay"]) for row in rows if int(row["step"]) > at} == {0.1}
    assert max(float(row["lr"]) for row in rows if int(row["step"]) > at) == pytest.approx(1e-3)
    assert losses(finished / ABANDONED / "1") == before
    kept = sorted(path.name for path in (finished / ABANDONED / "1" / "checkpoints").glob("*.ckpt"))
    assert kept == sorted(name for name, tokens in held.items() if tokens > position)
    assert "end-of-decay.ckpt" in kept and len(kept) < len(held)
    for name in kept:
        checkpoints.check(finished / ABANDONED / "1" / "checkpoints" / name)
    assert load(finished).optim["lr"] == 1e-3
    entry = read_lineage(finished)[-1]
    assert (entry["event"], entry["checkpoint"], entry["abandoned"]) == ("rollback", checkpoint.stem, "abandoned/1")
    assert entry["changed"] == ["optim.lr=1e-3", "optim.weight_decay=0.1"]
    report = (finished / "report.html").read_text()
    assert "abandoned/1" in report and "rollback" in report


def test_a_rollback_to_the_same_settings_is_the_same_run(finished, tmp_path):
    reference = tmp_path / "reference.ckpt"
    for path in (finished / FINAL, checkpoints.manifest_of(finished / FINAL)):
        reference.with_suffix(path.suffix).write_bytes(path.read_bytes())
    rollback(between(finished, 3000), [], 0)
    assert same(finished / FINAL, reference)


def test_skipped_data_are_not_trained_on_and_are_accounted_for(finished):
    checkpoint = between(finished, 3000)
    before = losses(finished)
    at = read(checkpoint).state.step
    rollback(checkpoint, [], 1024)
    after = losses(finished)
    assert list(after) == list(before)
    assert after[at + 1] != before[at + 1]
    account = read(finished / FINAL).state.data["token_counts"]["stable"]
    assert account["skipped"] > 0.8 * 1024
    assert read_lineage(finished)[-1]["skipped_tokens"] == 1024
    resume(finished / "checkpoints" / "rollback-1.ckpt", [])
    assert losses(finished) == after


KILL = """
import os, sys
from pathlib import Path
folder, operation = sys.argv[1], int(sys.argv[2])

def count(event, arguments):
    global operation
    writes = event in ("os.rename", "os.remove", "os.mkdir") or (event == "open" and str(arguments[1])[:1] in "wxa")
    if writes and folder in str(arguments[0]):
        operation -= 1
        if not operation:
            os.kill(os.getpid(), 9)

sys.addaudithook(count)
"""


def killed(folder: Path, operation: int, act: str) -> bool:
    """Whether kill -9 met a process that does something before so many file operations in the run folder."""
    line = [sys.executable, "-c", KILL + act, str(folder), str(operation)]
    result = subprocess.run(line, cwd=ROOT, env=importing(), capture_output=True, text=True, check=False)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode != 0


@pytest.mark.slow
def test_a_rollback_killed_at_any_file_operation_is_done_or_not_begun(finished, tmp_path):
    """Before its checkpoint is there it never was; from then on it is finished by whoever resumes the run."""
    step = between(finished, 3000)
    seen = set()
    act = f"from support.runs import rollback\nrollback(Path(folder) / 'checkpoints' / '{step.name}', ['optim.lr=1e-3'], 512)"
    for operation in (2, 6, 12, 20, 28):
        folder = Path(shutil.copytree(finished, tmp_path / f"killed{operation}"))
        assert killed(folder, operation, act)
        resume(folder, [])
        rolled_back = load(folder).optim["lr"] == 1e-3
        seen.add(rolled_back)
        state = read(folder / FINAL)
        assert state.run["optim"]["lr"] == load(folder).optim["lr"]
        assert (state.state.data["token_counts"]["stable"]["skipped"] > 0) == rolled_back
        entries = [entry for entry in read_lineage(folder) if entry["event"] == "rollback"]
        assert len(entries) == rolled_back
        assert list(losses(folder)) == list(losses(finished))
        if rolled_back:
            assert entries[0]["changed"] == ["optim.lr=1e-3"] and entries[0]["skipped_tokens"] == 512
            assert losses(folder / ABANDONED / "1") == losses(finished)
            checkpoints.check(folder / ABANDONED / "1" / FINAL)
        else:
            assert losses(folder) == losses(finished)
        shutil.rmtree(folder)
    assert seen == {False, True}


def test_going_on_from_an_older_checkpoint_gives_up_what_came_after(finished):
    """And whatever stops it then, the run folder stands for what was trained last."""
    older, before = between(finished, 3000), losses(finished)
    act = f"from support.runs import resume\nresume(Path(folder) / 'checkpoints' / '{older.name}', [])"
    assert killed(finished, 60, act)
    checkpoints.check(finished / ABANDONED / "1" / FINAL)
    assert not (finished / FINAL).exists()
    resume(finished, [])
    assert losses(finished) == before
    assert same(finished / FINAL, finished / ABANDONED / "1" / FINAL)


def test_a_rollback_with_a_mistake_changes_nothing(finished):
    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.suffix != ".html"}

    before = everything()
    for arguments, message in (
        ((["trainer.accelerator=gpu"], 0), "CUDA devices"),
        ((["optim.momentum=-1"], 0), "optim"),
        ((["optim.lr=abc"], 0), "optim.lr=abc: expected a number"),
        ((["run_dir=elsewhere"], 0), "run_dir=elsewhere: a rollback stays in its run"),
        (([], -5), "--skip-tokens -5: expected"),
        (([], 10**12), r"--skip-tokens 1000000000000: expected 0 to \d+, the tokens of the whole run"),
        ((["phases.extend.seq_len=64"], 0), "does not come out the same|phases.extend"),
    ):
        with pytest.raises(ValueError, match=message):
            rollback(finished / "checkpoints" / "end-of-extend.ckpt", *arguments)
        assert everything() == before, arguments


def test_phases_that_are_done_keep_their_settings(finished):
    rollback(finished / "checkpoints" / "end-of-stable.ckpt", ["optim.lr=1e-3"], 0)
    lrs = {name: phase.lr for name, phase in load(finished).phases.items()}
    assert lrs == {"stable": 3e-3, "extend": 1e-3, "decay": 1e-3}


def test_one_process_trains_a_run_at_a_time(finished):
    import fcntl

    with (finished / "log.txt").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being trained by another process"):
            resume(between(finished, 3000), [])


def test_a_branch_has_its_own_folder_and_leaves_its_origin_alone(finished, small_run, tmp_path):
    """To the decay straight from the midst of a phase: that phase ends where the checkpoint is."""
    parent = between(finished, 3000)
    position = checkpoints.tokens_seen(parent)
    before = {path.name: path.read_bytes() for path in (finished / "checkpoints").iterdir()}
    run = small_run(
        f"phases.stable.tokens={int(position)}",
        "phases.decay.lr=1e-3",
        "phases.decay.tokens=4000",
        f"run_dir={tmp_path / 'branch'}",
    )
    train_main(replace(run, branch_from=str(parent)))
    assert {path.name: path.read_bytes() for path in (finished / "checkpoints").iterdir()} == before
    rows = Table(tmp_path / "branch" / "metrics.csv").read()
    assert int(rows[0]["step"]) == read(parent).state.step + 1
    assert {row["phase"] for row in rows} == {"extend", "decay"}
    assert read_lineage(tmp_path / "branch")[0]["event"] == "branch"
    assert read_lineage(finished)[-1]["event"] == "branched"
    assert read_lineage(finished)[-1]["into"] == str(tmp_path / "branch")
    assert "branch" in (tmp_path / "branch" / "report.html").read_text()


def test_a_branch_from_where_a_rollback_starts_is_no_rollback(finished, small_run, tmp_path):
    rollback(between(finished, 3000), [], 512)
    run = small_run(f"run_dir={tmp_path / 'branch'}")
    train_main(replace(run, branch_from=str(finished / "checkpoints" / "rollback-1.ckpt")))
    for path in (tmp_path / "branch" / "checkpoints").glob("*.ckpt"):
        if path.stem != "branch":
            checkpoints.remove(path)
    resume(tmp_path / "branch", [])
    assert same(finished / FINAL, tmp_path / "branch" / FINAL)
    assert [entry["event"] for entry in read_lineage(tmp_path / "branch")] == ["branch", "resume"]


def test_a_branch_under_the_same_settings_is_the_same_run(finished, small_run, tmp_path):
    run = small_run(f"run_dir={tmp_path / 'branch'}")
    train_main(replace(run, branch_from=str(between(finished, 3000))))
    assert same(finished / FINAL, tmp_path / "branch" / FINAL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("phases.stable.batch_rows=16", r"phases.stable: up to [\d,]+ tokens, .* keep tokens, rows and ramps up to there"),
        ("phases.stable.mix.code=9", r"phases.stable.mix.code=9.*, but 3.* in the checkpoint"),
        ("backbone.num_hidden_layers=2", "backbone.num_hidden_layers=2, but 3 in the checkpoint"),
        ("optim._target_=modernenc.model.optim.adamw", "optim._target_"),
        ("seed=1", "seed=1, but 17 in the checkpoint"),
    ],
)
def test_what_was_trained_cannot_change(finished, small_run, tmp_path, change, message):
    run = apply_overrides(small_run(f"run_dir={tmp_path / 'branch'}"), [change])
    with pytest.raises(ValueError, match=message):
        fork(run, Corpus.of(run.data), read(between(finished, 3000)))


def test_a_checkpoint_of_another_recipe_is_refused_by_its_first_difference(finished, small_run, tmp_path):
    other = train(small_run("optim=adamw", f"run_dir={tmp_path / 'other'}"))
    for path in (other / FINAL, checkpoints.manifest_of(other / FINAL)):
        path.rename(finished / "checkpoints" / f"from-elsewhere{path.suffix}")
    with pytest.raises(
        ValueError, match=r"from-elsewhere.ckpt was trained with .*, but .*config.yaml has .*: it is of another run"
    ):
        resume(finished / "checkpoints" / "from-elsewhere.ckpt", [])


def test_the_command_line_branches_and_rolls_back(finished, corpus_root, tmp_path):
    checkpoint = between(finished, 3000)
    settings = ["+recipe=demo", *SMALL, f"data.root={corpus_root}", f"run_dir={tmp_path / 'branch'}", f"+from={checkpoint}"]
    result = command("modernenc.train", *settings)
    assert result.returncode == 0, result.stderr
    assert same(finished / FINAL, tmp_path / "branch" / FINAL)
    result = command("modernenc.resume", str(checkpoint), "--rollback", "--skip-tokens", "512", "optim.lr=1e-3")
    assert result.returncode == 0, result.stderr
    assert not same(finished / FINAL, tmp_path / "branch" / FINAL)
    assert "add --rollback" in command("modernenc.resume", str(checkpoint), "--skip-tokens", "512").stderr


def test_several_decays_from_one_checkpoint_are_one_command(small_run, tmp_path):
    folder = train(small_run("checkpoint.keep_last=9"))
    checkpoint = tmp_path / "latest" / "checkpoints" / "end-of-extend.ckpt"
    result = command(
        "modernenc.train", "--multirun", "+recipe=demo", *SMALL, f"data.root={small_run().data.root}", f"+from={checkpoint}",
        f"run_dir={tmp_path}/decay-${{phases.decay.tokens}}", "phases.decay.tokens=1500,3000",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    short, long = tmp_path / "decay-1500.0", tmp_path / "decay-3000.0"
    assert same(long / FINAL, folder / FINAL)  # the same settings as the run that it branched off
    assert list(compare([short, long], [])) == [short.name, long.name]


@pytest.mark.slow
def test_a_sweep_runs_all_its_values_and_ends_with_a_table_and_a_plot(corpus_root, tmp_path):
    settings = [
        *small(corpus_root, tmp_path / "run"),
        "run_dir=" + str(tmp_path / "lr-${optim.lr}"),
        f"hydra.sweep.dir={tmp_path}/sweep",
    ]
    result = command("modernenc.train", "--multirun", *settings, "optim.lr=1e-3,-1,3e-3")
    assert result.returncode == 1, result.stderr
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["optim.lr"]) for row in rows] == [1e-3, -1, 3e-3]
    assert [bool(row["run"]) for row in rows] == [True, False, True]
    assert "lr=-1" in rows[1]["error"] and rows[1]["validation"] == "nan"
    table = Table(Path(rows[2]["run"]) / "validation.csv").read()
    assert rows[2]["validation"] in [row["loss"] for row in table if row["source"] == "all"]
    assert "sweep: validation loss" in result.stdout and (tmp_path / "sweep" / "sweep.png").stat().st_size > 5_000


@pytest.mark.slow
def test_a_branch_without_a_recipe_keeps_what_its_parent_was_told(corpus_root, tmp_path):
    parent, branch = tmp_path / "parent", tmp_path / "branch"
    told = ["phases.stable.tokens=4000", "phases.decay.tokens=5000", "backbone.num_hidden_layers=2", "optim=adamw", "seed=5"]
    assert command("modernenc.train", *small(corpus_root, parent, *told)).returncode == 0
    checkpoint = parent / "checkpoints" / "end-of-stable.ckpt"
    result = command("modernenc.train", f"+from={checkpoint}", "phases.decay.tokens=6000", f"run_dir={branch}")
    assert result.returncode == 0, result.stderr
    listed = [line for line in result.stderr.splitlines() if "differs from its parent" in line]
    assert listed == ["the branch differs from its parent: phases.decay.tokens=6000.0, there 5000.0"]
    before, after = load(parent), load(branch)
    assert (after.recipe, after.seed, after.optim, after.backbone) == ("demo", 5, before.optim, before.backbone)
    assert after.branch_from == str(checkpoint) and after.rollbacks == 0
    planned = command("modernenc.plan", f"+from={checkpoint}", "phases.decay.token=6000")
    assert planned.returncode == 2 and "phases.decay.token: unknown key" in planned.stderr
    lost = command("modernenc.train", f"+from={parent}")
    assert lost.returncode == 2 and f"+from={parent}: no checkpoint" in lost.stderr
