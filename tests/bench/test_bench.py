"""The benchmarks measure what they say, in processes that do not disturb each other."""

import csv
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from modernenc.backbones import attention, rotary
from modernenc.bench import gpu, inference, kernels, step, time_to_loss
from modernenc.bench.interleave import Result, StepWork, run_interleaved
from modernenc.bench.settings import PARTS, Bench
from modernenc.bench.trainings import Training
from modernenc.cli import to_schema
from modernenc.config import CONF_DIR, register
from modernenc.quoting import quote_values
from support.commands import command
from support.turns import candidate, touch_after


def test_all_take_their_turns_each_in_its_process():
    one, other = run_interleaved({"one": candidate, "other": candidate}, 3)
    assert [work.flops for work in one.work] == [1.0, 2.0, 3.0]
    assert len({work.tokens for work in one.work}) == 1
    assert one.work[0].tokens not in (other.work[0].tokens, os.getpid())
    assert one.peak_bytes > 0 and not one.failure


def test_a_candidate_that_needs_too_much_memory_or_dies_is_reported_and_the_rest_go_on():
    candidates = {"fine": candidate, "killed": partial(candidate, dies_at=2), "large": partial(candidate, needs_gb=1e5)}
    fine, killed, large = run_interleaved(candidates, 3)
    assert len(fine.work) == 3
    assert "killed" in killed.failure and len(killed.work) == 1
    assert "GB that are free" in large.failure


def test_ratios_are_taken_turn_by_turn():
    fast = Result("fast", [StepWork(10, 0.0), StepWork(10, 0.0), StepWork(10, 0.0)], [1.0, 2.0, 1.0])
    slow = Result("slow", [StepWork(5, 0.0), StepWork(5, 0.0), StepWork(5, 0.0)], [1.0, 8.0, 2.0])
    assert fast.times_faster(slow) == [2.0, 4.0, 8.0]
    assert fast.speeds == [10.0, 5.0, 10.0]


def test_the_data_path_is_measured(corpus_root, tmp_path):
    result = command(
        "modernenc.bench", "parts=[data]", "lengths=[512]", "repetitions=1", f"root={corpus_root}", f"out={tmp_path / 'bench'}"
    )
    assert result.returncode == 0, result.stderr
    (case,) = json.loads((tmp_path / "bench" / "data.json").read_text())
    assert next(entry["name"] for entry in case["results"]) == "modernenc"
    assert all(len(entry["work"]) == 1 and entry["work"][0][0] >= 4_000_000 for entry in case["results"])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("parts=[speed]", f"parts=speed is unknown; available: {', '.join(PARTS)}"),
        ("parts=[gpu] gpu.cells=[cache]", "gpu.cells=cache is unknown; available: products, copies, step"),
        ("parts=[gpu] gpu.lengths=[64]", "gpu.lengths=[64]: expected two"),
        ("parts=[gpu] gpu.run_steps=5", "gpu.run_steps=5: expected at least 25"),
        ("backbones=[bert]", "backbones=bert is unknown; available: eurobert_210m"),
        ("root=nowhere", "nowhere: no manifest.json there"),
    ],
)
def test_mistakes_are_told(corpus_root, tmp_path, setting, expected):
    result = command("modernenc.bench", f"root={corpus_root}", f"out={tmp_path}", "lengths=[64]", *setting.split())
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and expected in result.stderr


@pytest.fixture
def bench(corpus_root, tmp_path) -> Iterator[Callable[..., Bench]]:
    """Settings of the benchmark, where they can be composed."""

    def make(*overrides: str) -> Bench:
        line = quote_values([f"root={corpus_root}", f"out={tmp_path / 'bench'}", *overrides])
        cfg = compose("bench", line, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return to_schema(cfg, Bench, ())

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield make


def test_a_peer_that_transformers_has_not_is_told_before_anything_is_measured(bench, tmp_path):
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 has a MEGA")
    with pytest.raises(ValueError, match=r"backbones=mega_tiny: transformers 5.* has no mega .*install 'transformers<5'"):
        step.measure(bench("backbones=[mega_tiny]", "lengths=[64]"), tmp_path)


@pytest.mark.slow
def test_inference_is_measured_beside_transformers(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "LENGTHS", (64,))
    monkeypatch.setattr(inference, "KINDS", ("variable",))
    monkeypatch.setattr(inference, "RUNS", 2)
    inference.measure(bench("inference_tokens=512"), tmp_path)
    (case,) = json.loads((tmp_path / "inference.json").read_text())
    ours, theirs = case["results"]
    lengths = inference.lengths_of("variable", 64, 8)
    assert ours["work"] == theirs["work"] == [[sum(lengths), 0.0]] * 2 and len(set(lengths)) > 1
    assert min(case["fit"]) > case["documents"] == 8
    assert inference.lengths_of("fixed", 64, 8) == [64] * 8


TO_LOSS = (
    *("time_to_loss.tokens=[8192]", "time_to_loss.seeds=2", "time_to_loss.trainer_lrs=[1e-5,1e-3,3e-3]", "num_hidden_layers=1"),
    *("time_to_loss.trainer_rows=[4]", "~time_to_loss.recipes.own_random", "time_to_loss.validation_tokens=1024"),
    "time_to_loss.keep_models=true",
)


@pytest.mark.slow
def test_recipes_are_held_against_the_best_of_the_trainer_and_trained_once(bench, tmp_path, capsys):
    time_to_loss.measure(bench(*TO_LOSS), tmp_path)
    (found,) = json.loads((tmp_path / "time_to_loss.json").read_text())
    best, ours = found["trainings"]
    assert ours == "own" and best in ("Trainer, 0.001, 4 rows", "Trainer, 0.003, 4 rows")
    final = {name: [one["losses"][-1] for one in seeds.values()] for name, seeds in found["trainings"].items()}
    assert len(final[best]) == len(final[ours]) == 2 and found["target"] == sum(final[best]) / 2
    for seeds in found["trainings"].values():
        for one in seeds.values():
            assert len(one["losses"]) >= 4
            assert all(one[axis] == sorted(one[axis]) and one[axis][0] > 0 for axis in ("seconds", "tokens", "flops"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "trainings").glob("*.json")}
    assert len(files) == 3 + 2 + 2  # the grid, another seed of two finalists, and ours
    assert len(list((tmp_path / "trainings").glob("*/model.safetensors"))) == 7
    assert (tmp_path / "time_to_loss-modernbert_tiny-8192.png").stat().st_size > 0
    time_to_loss.measure(bench(*TO_LOSS), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "trainings").glob("*.json")} == files


def test_a_recipe_keeps_its_shape_on_a_share_of_the_tokens(bench):
    settings = bench("+time_to_loss.recipes.mine={recipe:own,share:0.5,overrides:{phases.stable.causal_share:0.2}}")
    run = time_to_loss.recipe_run(settings, "modernbert_tiny", 100_000, "mine", 3)
    assert sum(phase.tokens for phase in run.phases.values()) == pytest.approx(50_000, abs=3)
    stable, _, decay = run.phases.values()
    assert stable.tokens / decay.tokens == pytest.approx(4, rel=1e-3)
    assert (run.seed, stable.causal_share, run.data.root) == (3, 0.2, settings.root)
    assert set(stable.mix) == {"code", "docstrings", "reference"}


def test_time_stands_still_while_a_training_is_validated(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    training = Training(started=now)

    def loss() -> float:
        nonlocal now
        now += 50
        return 5.0 - len(training.losses)

    for trained in (3, 4):
        now += trained
        training.validate(10 * trained, 20 * trained, loss)
    assert training.seconds == [3, 7]
    assert training.reaches(4.0) == 1 and training.reaches(3.0) is None


TINY = (
    *("gpu.backbone=modernbert_tiny", "gpu.lengths=[64,256]", "num_hidden_layers=1", "+gpu.others.mega_tiny=128"),
    *("~gpu.others.modernbert_large", "~gpu.others.mega_small_16k", "gpu.step_tokens=512", "gpu.micro_batch_tokens=512"),
    *("gpu.repetitions=2", "gpu.matrix_size=64", "gpu.run_steps=25"),
)


CELLS = (
    "products",
    "step",
    "sparse",
    "run",
    "window tiled 64",
    "window FA3 64",
    "other ettin",
    "optimizer muon",
    "chunk 1024",
    "eager mega",
    "tests",
)


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "gpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_gpu_part_has_figures_without_a_gpu_too_or_says_why_not(bench, tmp_path):
    gpu.measure(bench(*TINY, f"gpu.cells={list(CELLS)}", "gpu.seconds=1e4"), tmp_path)
    rows = {row["cell"]: row for row in _rows(tmp_path)}
    assert all(any(name.startswith(cell) for name in rows) for cell in CELLS)
    failed = [name for name, row in rows.items() if row["failure"]]
    assert failed == ["window FA3 64"] or torch.cuda.is_available()
    tests = rows.pop("tests")
    assert (tests["passed"] == "not run") != torch.cuda.is_available()
    assert all(float(row["ms"]) > 0 and row["torch"] == torch.__version__ for row in rows.values() if not row["failure"])
    step, run = rows["step modernbert_tiny 64"], rows["run modernbert_tiny 64"]
    assert all(float(row["tokens_per_s"]) > 0 for row in (step, run, rows["sparse modernbert_tiny 64"]))
    assert float(step["of_products"]) == pytest.approx(float(step["tflops"]) / float(rows["products"]["tflops"]), rel=1e-2)
    assert float(step["plan_gb"]) > 0 and (step["graphs"] == step["recompiled"] == "0") != torch.cuda.is_available()
    assert (step["kernels"] == step["busy"] == "not run") != torch.cuda.is_available()
    assert float(run["between_ms"]) < float(run["ms"]) and run["save_s"]


def test_the_gpu_part_begins_what_fits_into_its_time_and_keeps_the_rows_of_before(corpus_root, tmp_path):
    settings = [*TINY, f"root={corpus_root}", f"out={tmp_path}", "gpu.cells=[products,copies,run]"]
    for seconds in (30, 100):
        result = command("modernenc.bench", "gpu", *settings, f"gpu.seconds={seconds}")
        assert result.returncode == 0, result.stderr
    rows = _rows(tmp_path)
    assert [row["cell"] for row in rows] == 2 * ["products", "copies", "run modernbert_tiny 64"]
    assert ["not started" in row["failure"] for row in rows] == [True, True, True, False, False, True]
    assert result.stdout.count("cell=") == 3 and float(rows[4]["gb_per_s"]) > 0
    assert [case["cell"] for case in json.loads((tmp_path / "gpu.json").read_text())] == [row["cell"] for row in rows[3:]]
    assert "products" in (tmp_path / "gpu.txt").read_text()
    assert re.search(r"run modernbert_tiny 64 +not started", result.stdout)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (partial(os._exit, 9), "its process was killed"),
        (partial(int, "ten"), "ValueError: invalid literal for int"),
    ],
)
def test_a_cell_that_fails_is_a_row_with_its_reason(figures, expected):
    assert expected in gpu.run_in_process(gpu.GpuCell("one", 60, figures))["failure"]


def test_a_cell_that_takes_too_long_is_ended_and_is_a_row_with_its_reason(tmp_path):
    late = partial(touch_after, tmp_path / "ended", seconds=20)
    assert "took more than 5 s" in gpu.run_in_process(gpu.GpuCell("one", 5, late))["failure"]
    assert not (tmp_path / "ended").exists()  # it was not waited for


def test_tests_that_are_ended_still_name_those_that_failed(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_good(): pass\ndef test_bad(): assert 0\ndef test_slow(): time.sleep(60)\n"
    )
    row = gpu.run_pytest(["-p", "no:xdist", "test_it.py"], tmp_path, 10)
    assert (
        "ended after 10 s, in test_it.py::test_slow" in str(row["passed"]) and "test_it.py::test_bad FAILED" in row["failure"]
    )
    assert "good" not in row["failure"]


@pytest.mark.parametrize("lengths", [[64, 64], [5, 1, 90, 32]])
def test_the_window_that_is_measured_as_a_function_of_scores_is_the_same_attention(lengths):
    tokens, window = sum(lengths), 8
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    layout = attention.VarlenInfo(ends, max(lengths), tokens, torch.device("cpu"))
    rotation = rotary.rotation(1e4, 16, rotary.positions_of(ends, tokens), max(lengths))
    qkv = torch.randn(tokens, 3, 2, 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
        found = kernels.build_flex_attention(layout, window)(qkv, rotation, layout, window)
    torch.testing.assert_close(found, attention.tiled(qkv, rotation, layout, window))
