"""A user's mistake is one line that names it, before the first step; status not 0; nothing overwritten."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modernenc.cli import one_line_errors
from modernenc.exit_codes import MISTAKE, STOPPED
from modernenc.planning.checks import check_run
from modernenc.run_folder.overrides import check_overrides
from support.commands import ROOT, command, error
from support.damage import flip
from support.runs import composed, small

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for package in ("modernenc", "data_prep")
    for path in (ROOT / package).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
"""All commands."""
HELP = """
import runpy, sys
module, sys.argv = sys.argv[1], [sys.argv[1], "--help"]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    assert not ended.code
heavy = {"torch", "lightning", "transformers", "datatrove", "matplotlib", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("module", MODULES)
def test_help_is_there_before_a_library_that_takes_seconds_to_import(module):
    result = subprocess.run([sys.executable, "-c", HELP, module], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "python -m" in result.stdout


@pytest.mark.wall_clock
@pytest.mark.parametrize("module", MODULES)
def test_help_is_there_at_once(module):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = command(module, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert "python -m" in result.stdout
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert seconds < 2, seconds  # 0.4 on an idle machine; time on a processor, since other tests run beside


CASES = {
    "an unknown key": (["data.lane=3"], r"data\.lane: unknown key; there are root"),
    "a key that has no fixed names beside it": (["optim.beta=3"], r"optim.beta: unknown key; --cfg job .* \+optim.beta=VALUE"),
    "a word alone": (["demo"], r"demo: expected KEY=VALUE"),
    "an unknown key that is added": (["+trainer.foo=3"], r"trainer.foo: unknown key; there are accelerator"),
    "an unknown key of a phase that is added": (["+phases.decay.ramp.foo=3"], r"phases.decay.ramp.foo: unknown key; there"),
    "no heads": (["backbone.num_attention_heads=0"], r"backbone.num_attention_heads=0: expected 1 or more"),
    "half an optimizer": (["optim.betas=[0.9]"], r"optim.betas=\[0.9\]: expected 2 values"),
    "no such optimizer": (
        ["optim._target_=modernenc.model.optim.nothing"],
        r"optim._target_=modernenc.model.optim.nothing: there is no",
    ),
    "a negative seed": (["seed=-1"], r"seed=-1: expected 0 or more"),
    "no learning rate": (["optim.lr=0", "phases.stable.lr=1", "phases.extend.lr=1", "phases.decay.lr=1"], r"optim.lr=0: exp"),
    "a theta in words": (["phases.extend.backbone.global_rope_theta=abc"], r"global_rope_theta=abc: expected a number"),
    "a branch from nothing": (["+from=/nonexistent.ckpt"], r"\+from=/nonexistent.ckpt: no checkpoint"),
    "a wrong type": (["data.lanes=many"], r"data\.lanes=many: expected a whole number"),
    "a wrong type that others take over": (["optim.lr=fast"], r"optim\.lr=fast: expected a number"),
    "neither true nor false": (["init.unigram=perhaps"], r"init\.unigram=perhaps: expected true or false"),
    "several values": (
        ["phases.stable.lr=1e-4,1e-3"],
        r"lr=1e-4,1e-3: one value, or, with --multirun, several\?",
    ),
    "an unknown key of the backbone": (["+backbone.depth=3"], r"backbone.depth: unknown key; ModernBERT takes vocab_size"),
    "no orthogonalisation": (["optim.ns_steps=0"], r"optim.ns_steps=0: expected 1 to 99"),
    "half a step of an optimizer": (["optim.ns_steps=1.5"], r"optim.ns_steps=1.5: expected a whole number"),
    "an unknown key of the optimizer": (["+optim.beta=3"], r"optim.beta: unknown key; muon takes lr"),
    "a wrong type in the backbone": (["backbone.hidden_size=wide"], r"backbone.hidden_size=wide: expected a whole number"),
    "an unknown precision": (["trainer.precision=fp7"], r"trainer.precision=fp7: expected one of bf16-mixed, 32-true"),
    "more devices than there are": (
        [
            "trainer.accelerator=gpu",
            "trainer.devices=99",
            "data.lanes=100",
            "phases={stable: {batch_rows: 200, ramp: {tokens: 0}}, extend: {batch_rows: 200}, decay: {batch_rows: 200}}",
        ],
        r"trainer.accelerator=gpu trainer.devices=99: this machine has \d+ CUDA devices",
    ),
    "two workers": (["data.workers=2"], r"data.workers=2: expected one of 0, 1"),
    "more ranks than lanes": (["trainer.devices=5"], r"5 ranks exceed data.lanes=4"),
    "fewer rows than ranks": (["trainer.devices=3"], r"phases.extend.batch_rows=2: 3 ranks and 4 lanes need at least 4 rows"),
    "fewer blocks than lanes": (["data.lanes=5000"], r"data.lanes=5000 exceeds the \d+ blocks of .*phases.stable.mix"),
    "an unknown source": (["+phases.decay.mix.poetry=1"], r"phases.decay.mix.poetry: .* has code, docstrings, reference"),
    "rows longer than the model": (
        ["phases.decay.seq_len=4096"],
        r"phases.decay.seq_len=4096 exceeds backbone.max_position=1024",
    ),
    "an unknown attribute": (
        ["+phases.decay.backbone={rope: 3}"],
        r"phases.decay.backbone.rope: a phase may set global_rope_theta",
    ),
    "a small vocabulary": (["backbone.vocab_size=100"], r"backbone.vocab_size=100 is smaller than the 512 entries"),
    "more than all of a phase": (["phases.stable.causal_share=1.5"], r"phases.stable.causal_share=1.5: expected 0 to 1"),
    "causal LM among the objectives": (
        ["+phases.decay.objectives={masked_lm: 1, causal_lm: 1}"],
        r"phases.decay.objectives.causal_lm: is no objective of a cycle; give phases.decay.causal_share",
    ),
    "an unknown curve": (["phases.stable.lr_curve=sine"], r"phases.stable.lr_curve=sine: expected one of constant"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_in_a_recipe_is_one_line(corpus_root, tmp_path, case):
    overrides, expected = CASES[case]
    import re

    line = error("modernenc.train", *small(corpus_root, tmp_path / "run", *overrides))
    assert re.search(expected, line), line
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_names_those_there_are():
    line = error("modernenc.train", "+recipe=nope")
    assert "nope" in line and "base" in line and "demo" in line


def test_no_recipe_names_those_there_are():
    assert "base, bioclinical, demo" in error("modernenc.train")


@pytest.mark.parametrize(("recipe", "corpus"), [("demo", "demo"), ("base", "base")])
def test_missing_data_name_the_command_that_makes_them(tmp_path, recipe, corpus):
    line = error("modernenc.train", f"+recipe={recipe}", cwd=tmp_path)
    assert f"python -m data_prep +corpus={corpus}" in line
    assert not any(tmp_path.iterdir())


def test_a_recipe_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("phases: {a: {tokens: 3}")
    assert "mine.yaml" in error("modernenc.train", "--config-dir", str(tmp_path), "+recipe=mine")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("phases: {stable: {tokens: 3}}", r"recipe/mine.yaml: its first line must be: # @package _global_"),
        ("# @package _global_\nphases: {stable: {tokns: 3}}", r"recipe/mine.yaml: phases.stable.tokns: unknown key; there are"),
        ("# @package _global_\ndata: {seed: 3}", r"recipe/mine.yaml: data.seed: unknown key; there are root"),
    ],
)
def test_a_mistake_in_a_recipes_file_names_the_file(tmp_path, content, expected):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(content)
    assert expected in error("modernenc.train", "--config-dir", str(tmp_path), "+recipe=mine")


def test_a_corpus_without_files_is_named(tmp_path):
    line = error("data_prep", "+corpus=jsonl", f"input={tmp_path}", "sources.text.licence=x", cwd=tmp_path)
    assert f"sources.text.reader: no files to read in {tmp_path}" in line


def test_a_run_folder_that_holds_another_run_is_left_alone(corpus_root, tmp_path):
    (tmp_path / "run").mkdir()
    config = tmp_path / "run" / "config.yaml"
    config.write_text(yaml.safe_dump({"recipe": "other"}))
    line = error("modernenc.train", *small(corpus_root, tmp_path / "run"))
    assert "holds a run of recipe other" in line and "modernenc.resume" in line
    assert config.read_text() == yaml.safe_dump({"recipe": "other"})
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_resuming_what_is_no_run_is_an_error(tmp_path):
    assert "holds no run" in error("modernenc.resume", str(tmp_path))
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "config.yaml").touch()
    assert error("modernenc.resume", str(tmp_path)).endswith(f"give {tmp_path / 'latest'}")
    assert "does not exist" in error("modernenc.resume", str(tmp_path / "x.ckpt"))


def test_resuming_may_not_change_what_is_trained(tmp_path):
    assert "makes another run" in error("modernenc.resume", str(tmp_path), "optim.lr=1")


@pytest.mark.slow
def test_a_corrupt_shard_or_checkpoint_stops_the_run_by_name(corpus_root, tmp_path):
    """At the shard's first opening, with a loader worker and without; nothing of the run is lost."""
    root = tmp_path / "copy"
    shutil.copytree(corpus_root, root)
    shard = sorted(root.glob("docstrings/slice-000/bucket-*/*.mds"))[0]
    flip(shard)
    for workers in (0, 1):
        result = command("modernenc.train", *small(root, tmp_path / f"run{workers}", f"data.workers={workers}"))
        assert result.returncode != 0
        assert f"{shard.name} is corrupt" in result.stderr.strip().splitlines()[-1], result.stderr
        assert "Traceback" not in result.stderr
    result = command("modernenc.train", *small(corpus_root, tmp_path / "good"))
    assert result.returncode == 0, result.stderr
    checkpoint = tmp_path / "good" / "checkpoints" / "end-of-decay.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert "end-of-decay.ckpt is not whole" in error("modernenc.resume", str(checkpoint))
    result = command("modernenc.resume", str(tmp_path / "good"))
    assert result.returncode == 0, result.stderr
    assert "end-of-decay.ckpt is not whole" in result.stdout + result.stderr


def test_a_logger_that_is_not_installed_is_told_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    with pytest.raises(ValueError, match=r"logger.wandb=offline: wandb is not installed; pip install 'modernenc\[wandb\]'"):
        check_run(composed(["+recipe=demo", "logger.wandb=offline"]))


def test_a_full_disk_is_said_with_what_to_do(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "plan.txt")
    said = capsys.readouterr().err
    assert (
        said.startswith("error: plan.txt could not be written: No space left on device; make room, then ")
        and said.count("\n") == 1
    )


_SIGNALLED = """
import atexit, signal, time
from modernenc.cli import end_if_stopped, one_line_errors
end_if_stopped("start again")
atexit.register(time.sleep, 0.5)  # as a library that closes its connections
with one_line_errors():
    try:
        raise RuntimeError("the connection was closed")
    except RuntimeError as error:
        signal.raise_signal(signal.SIGTERM)
        {then}
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("then", "status", "said"),
    [
        ("raise ConnectionError('another rank was lost') from error", MISTAKE, "error: another rank was lost\n"),
        ("pass", STOPPED, "SIGTERM while no step was under way: nothing was lost; start again\n"),
    ],
    ids=["an error that ends it", "an error that a library handles"],
)
def test_a_signal_that_meets_an_error_neither_hides_it_nor_is_lost(then, status, said):
    """As when a launcher ends the ranks of a run because one of them is gone, and as while libraries are imported."""
    result = subprocess.run([sys.executable, "-c", _SIGNALLED.format(then=then)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (status, said)


def test_a_resume_names_the_keys_there_are():
    with pytest.raises(ValueError, match=r"^trainer\.devicse: unknown key; there are accelerator, devices"):
        check_overrides(Path("runs/demo/x"), ["trainer.devicse=2"], rollback=False)
