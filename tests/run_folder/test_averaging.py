"""Averages of checkpoints, alone, exported, and beside their members."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from modernenc.hugging_face.parity import TOLERANCE
from modernenc.model.export import export
from modernenc.reporting.comparison import compare
from modernenc.run_folder.averaging import KINDS, average
from modernenc.run_folder.checkpoints import read
from modernenc.run_folder.tables import ALL, Table
from support.commands import command
from support.results import FINAL
from support.runs import train


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [2, 3, 10])
def test_shares_are_a_whole(kind, number):
    shares = KINDS[kind](number)
    assert len(shares) == number and sum(shares) == pytest.approx(1) and min(shares) > 0
    if kind == "uniform":
        assert shares == [1 / number] * number
    if kind == "exponential":
        assert all(after == pytest.approx(2 * before) for before, after in pairwise(shares))


def test_a_sum_stands_for_a_decay_of_what_was_learnt_between_checkpoints():
    """Two ways to one number: weights summed, and steps from the first to the last scaled by 1 - sqrt at their middles."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(9, 5, generator=generator).double().cumsum(0)
    summed = torch.stack([share * weight for share, weight in zip(KINDS["one_minus_sqrt"](9), weights, strict=True)]).sum(0)
    stepped = weights[0].clone()
    for step in range(8):
        stepped += (1 - math.sqrt((step + 0.5) / 8)) * (weights[step + 1] - weights[step])
    assert torch.allclose(summed, stepped, atol=1e-12)


@pytest.fixture
def checkpoints(small_run):
    run = small_run("checkpoint.keep_last=20")
    folder = train(run)
    found = sorted((folder / "checkpoints").glob("step-*.ckpt"))
    assert len(found) >= 4
    return folder, found


def test_an_average_of_checkpoints_is_that_of_their_weights(checkpoints):
    _, found = checkpoints
    contents = [read(path) for path in found]
    averaged = average(found[::-1], "exponential")  # in whatever order they are named
    shares = KINDS["exponential"](len(found))
    assert averaged.state == contents[-1].state
    for name, value in averaged.weights.items():
        expected = torch.zeros_like(value, dtype=torch.float64)
        for share, content in zip(shares, contents, strict=True):
            expected += share * content.weights[name].double()
        assert torch.equal(value, expected.float())


def test_averages_are_exported_and_compared(checkpoints, tmp_path):
    folder, found = checkpoints
    assert export(found, tmp_path / "out", "uniform") <= TOLERANCE
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"the average (uniform) of {found[0].stem}, " in card and "## Validation" not in card
    compared = compare([*found[-2:], folder], ["uniform", "one_minus_sqrt"])
    assert list(compared) == [found[-2].stem, found[-1].stem, "run", "average: uniform", "average: one_minus_sqrt"]
    rows = [row for row in Table(folder / "validation.csv").read() if row["source"] == ALL and row["phase"] == "decay"]
    recorded = [row["loss"] for row in rows if (row["seq_len"], row["mask_ratio"]) == ("64", "0.15")][-1]
    assert compared["run"][1][ALL].loss == pytest.approx(float(recorded), rel=2e-3)  # in fp32 here, in bf16 there
    result = command("modernenc.compare", str(found[0]), str(folder / FINAL), "--average", "uniform")
    assert result.returncode == 0, result.stderr
    twin = tmp_path / "twin" / "run"
    shutil.copytree(folder, twin)
    assert len(compare([folder, twin], [])) == 2  # of one name, and not one
    assert "average: uniform" in result.stdout and "* the lowest" in result.stdout


def test_a_hugging_face_folder_stands_beside_runs(checkpoints, tmp_path):
    folder, found = checkpoints
    out = tmp_path / "out"
    export([folder], out)
    compared = compare([out, folder, found[0]], [])
    assert list(compared) == [str(out), "run", found[0].stem] and compared[str(out)][0] is None
    assert compared[str(out)][1][ALL].loss == pytest.approx(compared["run"][1][ALL].loss, rel=1e-6)
    result = command("modernenc.compare", str(out), str(folder))
    assert result.returncode == 0 and "out" in result.stdout, result.stderr
    with pytest.raises(ValueError, match="expected a run folder or a checkpoint too"):
        compare([out], [])
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    names = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["vocab"] |= {names[300]: 301, names[301]: 300}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"out has another tokenizer than"):
        compare([out, folder], [])
    (out / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"out is of model_type gpt2; expected"):
        compare([folder, out], [])


def test_what_cannot_be_averaged_is_named(checkpoints, small_run, tmp_path):
    _, found = checkpoints
    other = train(small_run(f"run_dir={tmp_path / 'other'}", recipe="demo_mega")) / FINAL
    with pytest.raises(ValueError, match="is of another model than those before it"):
        average([found[0], other], "uniform", across_runs=True)
    twin = train(small_run(f"run_dir={tmp_path / 'twin'}", "seed=1")) / FINAL
    with pytest.raises(ValueError, match=r"end-of-decay.ckpt is of another run than those before it.*--across-runs"):
        average([found[0], twin], "uniform")
    average([found[0], twin], "uniform", across_runs=True)


def test_branches_of_one_run_can_be_averaged(checkpoints, small_run, tmp_path):
    _, found = checkpoints
    branch = train(replace(small_run(f"run_dir={tmp_path / 'branch'}"), branch_from=str(found[0]))) / FINAL
    average([found[0], branch], "uniform")


def test_an_average_takes_as_many_checkpoints_as_its_kind_says(checkpoints, tmp_path):
    _, found = checkpoints
    with pytest.raises(ValueError, match="one checkpoint, or several and --average"):
        export(found, tmp_path / "out")
    with pytest.raises(ValueError, match="one checkpoint, or several and --average"):
        export(found[:1], tmp_path / "out", "uniform")


def test_an_unknown_average_is_named(checkpoints):
    _, found = checkpoints
    with pytest.raises(ValueError, match="--average median: expected one of exponential, one_minus_sqrt, uniform"):
        average(found, "median")
