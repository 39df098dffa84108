"""The loop: it learns, it obeys the curriculum, and a run that was cut ends as one that was not."""

import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch.accelerators import MPSAccelerator

from modernenc.backbones.attention import describe_backends
from modernenc.curriculum import Curriculum
from modernenc.evaluation.validation import Validator
from modernenc.exit_codes import STOP_SIGNALS
from modernenc.model import optim
from modernenc.model.build import build_objectives, checkpoint_activations
from modernenc.model.load import load_masked_lm
from modernenc.run_folder.checkpoints import read, remove, tokens_seen, write
from modernenc.run_folder.lineage import read as read_lineage
from modernenc.run_folder.tables import Table
from modernenc.saved_config import apply_overrides
from modernenc.training.hardware import advise_precision
from support.commands import command
from support.results import FINAL, metrics, same, same_state, weights
from support.runs import DROPOUT, SMALL, resume, train


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "stable_adamw"])
def test_it_crosses_every_phase_and_learns(small_run, optimizer):
    run = small_run(f"optim={optimizer}", "optim.lr=3e-3", "optim.weight_decay=1e-5")
    folder = train(run)
    curriculum = Curriculum(run.phases)
    rows = Table(folder / "metrics.csv").read()
    assert [int(row["step"]) for row in rows] == list(range(1, curriculum.total_steps + 1))
    for row, spec in zip(rows, curriculum.steps(), strict=True):
        assert row["phase"] == spec.phase
        assert float(row["lr"]) == pytest.approx(spec.lr)
        assert (int(row["batch_rows"]), int(row["seq_len"])) == (spec.batch_rows, spec.seq_len)
    scores = [row for row in Table(folder / "validation.csv").read() if row["source"] == "all" and row["seq_len"] == "64"]
    assert float(scores[-1]["loss"]) < float(scores[0]["loss"]) < 6.3
    ends = sorted(path.stem for path in (folder / "checkpoints").glob("end-of-*.ckpt"))
    assert ends == ["end-of-decay", "end-of-extend", "end-of-stable"]
    assert (folder.parent / "latest").resolve() == folder
    for name in ("config.yaml", "plan.txt", "curriculum.png", "report.html", "lineage.json", "log.txt"):
        assert (folder / name).stat().st_size > 0


@pytest.mark.parametrize(("recipe", "optimizer"), [("demo", "muon"), ("demo", "stable_adamw"), ("demo_mega", "adamw")])
def test_each_checkpoint_resumes_to_the_same_bits(small_run, tmp_path, recipe, optimizer):
    """Dropout on, and a loader worker now and then: neither may matter. Nor may the checkpoints that came after."""
    settings = [*DROPOUT[recipe], f"optim={optimizer}", "optim.lr=3e-3", "checkpoint.keep_last=100", "logger.every_steps=3"]
    settings += ["phases.stable.causal_share=0.5", "phases.decay.causal_share=0.3"]
    whole = train(small_run(*settings, recipe=recipe))
    checkpoints = sorted((whole / "checkpoints").glob("*.ckpt"), key=tokens_seen)
    assert len(checkpoints) >= 7
    for number, checkpoint in enumerate(checkpoints[:-1] if optimizer == "muon" else checkpoints[1:-1:3]):
        copied = Path(shutil.copytree(whole, tmp_path / f"copy{number}"))
        for later in checkpoints if number % 2 else ():
            if tokens_seen(later) > tokens_seen(checkpoint):
                remove(copied / "checkpoints" / later.name)
        resume(copied / "checkpoints" / checkpoint.name, [f"data.workers={number % 2}"])
        assert same_state(copied / FINAL, whole / FINAL), checkpoint.stem
        assert metrics(copied) == metrics(whole)
        event = "resume" if number % 2 else "rollback"
        assert [entry["event"] for entry in read_lineage(copied)] == ["start", event]


def test_a_checkpoint_and_the_report_say_the_versions_that_made_it(small_run):
    folder = train(small_run())
    (checkpoint, *_) = sorted((folder / "checkpoints").glob("step-*.ckpt"), key=tokens_seen)
    content = read(checkpoint)
    made_by = content.state.versions
    assert made_by["torch"] == torch.__version__ and set(made_by) == {"modernenc", "python", "torch", "lightning", "numpy"}
    assert f"torch {torch.__version__}" in (folder / "report.html").read_text()
    content.state.versions = {**made_by, "torch": "2.10.0"}
    write(content, checkpoint)
    resume(checkpoint, [])
    assert f"torch {torch.__version__}" in (folder / "log.txt").read_text()
    assert "torch 2.10.0" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("recipe", DROPOUT)
def test_activations_made_again_change_nothing(small_run, tmp_path, recipe):
    finals = [
        train(
            small_run(
                *DROPOUT[recipe],
                f"trainer.activation_checkpointing_every={every}",
                f"run_dir={tmp_path / str(every)}",
                recipe=recipe,
            )
        )
        / FINAL
        for every in (0, 2)
    ]
    assert same(*finals)


@pytest.mark.parametrize("recipe", DROPOUT)
def test_activations_made_again_are_not_kept(small_run, recipe):
    def kept(every: int) -> int:
        """Bytes that a forward pass keeps for the backward pass, weights left out."""
        objective = build_objectives(small_run(*DROPOUT[recipe], recipe=recipe)).masked_lm
        checkpoint_activations(objective.backbone, every)
        own = {weight.data_ptr() for weight in objective.parameters()}
        held: dict[int, int] = {}

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            hidden = objective.backbone(torch.arange(500), torch.tensor([0, 100, 500], dtype=torch.int32), 400)
        assert hidden.requires_grad
        return sum(held.values())

    assert kept(1) < kept(2) < kept(0)
    assert kept(1) < kept(0) / 5


def test_checkpoints_are_saved_by_the_clock_too(small_run):
    folder = train(small_run("checkpoint.every_tokens=0", "checkpoint.every_minutes=1e-6", "checkpoint.keep_last=100"))
    saved = {path.stem for path in (folder / "checkpoints").glob("step-*.ckpt")}
    assert {"step-00000001", "step-00000002"} <= saved


def test_a_phase_is_not_validated_twice_at_its_end(small_run):
    run = small_run("validation.every_tokens=2900", "phases.stable.ramp.tokens=0")
    rows = Table(train(run) / "validation.csv").read()
    seen = {int(row["step"]): int(row["tokens_seen"]) for row in rows}
    ends = [Curriculum.of(run).end_of(phase) for phase in run.phases]
    assert set(ends) <= set(seen.values()) and ends[0] % 2900 < 512, "a multiple is reached within the last steps"
    between = [tokens for tokens in seen.values() if tokens not in ends]
    assert between and all(min(abs(end - tokens) for end in ends if end > tokens) > 290 for tokens in between)


def test_a_mac_trains_on_its_processor(small_run, monkeypatch):
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    assert "device cpu" in (train(small_run("trainer.accelerator=auto")) / "log.txt").read_text() or torch.cuda.is_available()


def test_a_loader_worker_changes_nothing(small_run, tmp_path):
    one = train(small_run())
    other = train(small_run("data.workers=1", f"run_dir={tmp_path / 'other'}"))
    assert same(one / FINAL, other / FINAL)


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_strict_determinism_gives_the_same_bits(small_run, tmp_path, accelerator):
    settings = ["trainer.determinism=strict", f"trainer.accelerator={accelerator}", "backbone.attention_out_dropout=0.1"]
    one, other = (train(small_run(*settings, f"run_dir={tmp_path / name}")) for name in ("one", "other"))
    assert same(one / FINAL, other / FINAL)


def test_micro_batches_change_the_weights_by_rounding_only(small_run, tmp_path):
    settings = ["optim=adamw", "optim.lr=1e-3", "trainer.precision=32-true"]
    one = weights(train(small_run(*settings, "trainer.micro_batch_tokens=64")) / FINAL)
    other = weights(train(small_run(*settings, "trainer.micro_batch_tokens=4096", f"run_dir={tmp_path / 'other'}")) / FINAL)
    for name, value in one.items():
        assert float((value - other[name]).norm() / other[name].norm()) < 1e-4, name


@pytest.mark.slow
def test_wandb_without_a_login_logs_offline_and_stops_nothing(corpus_root, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = ["+recipe=demo", *SMALL, f"data.root={corpus_root}", f"run_dir={tmp_path / 'run'}", "logger.wandb=online"]
    result = command("modernenc.train", *settings)
    assert result.returncode == 0, result.stderr
    assert "there is no login: logging offline" in " ".join(result.stdout.split())
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_finished_run_is_left_alone(small_run, capsys):
    folder = train(small_run())
    before = (folder / "metrics.csv").read_text()
    resume(folder, [])
    assert "is finished" in capsys.readouterr().out
    assert (folder / "metrics.csv").read_text() == before


def test_the_backbone_is_loaded_as_its_phase_left_it(small_run):
    run = small_run()
    folder = train(run)
    thetas = {
        phase: getattr(load_masked_lm(folder / "checkpoints" / f"end-of-{phase}.ckpt").backbone, "global_rope_theta")
        for phase in run.phases
    }
    assert thetas == {"stable": 10_000, "extend": 160_000, "decay": 160_000}


def test_resuming_with_other_data_is_refused(small_run):
    folder = train(small_run("checkpoint.keep_last=100"))
    checkpoint = folder / "checkpoints" / "end-of-stable.ckpt"
    content = read(checkpoint)
    for lane in content.state.data["lanes"].values():
        lane["checksum"] = "0" * 16
    write(content, checkpoint)
    with pytest.raises(ValueError, match="cannot be rebuilt identically"):
        resume(checkpoint, [])


def test_the_peak_that_decay_is_relative_to_follows_the_phase(small_run):
    run = small_run("optim=stable_adamw", "optim.lr=1e-3", "phases.extend.lr=4e-4", "phases.decay.lr=2e-4")
    curriculum = Curriculum(run.phases)
    objective = build_objectives(run).masked_lm
    optimizers = optim.stable_adamw(list(objective.parameters()), [], 1e-3, 1e-5, [0.9, 0.98], 1e-6)
    for phase, peak in (("stable", 1e-3), ("extend", 4e-4), ("decay", 2e-4)):
        optim.apply(optimizers, curriculum.at(curriculum.start_of(phase)), run.optim["lr"])
        decaying, others = optimizers[0].param_groups
        assert decaying["max_lr"] == pytest.approx(peak)
        assert decaying["weight_decay"] == run.phases[phase].weight_decay
        assert others["weight_decay"] == 0
        assert {parameter.ndim for parameter in decaying["params"]} == {2}
        assert {parameter.ndim for parameter in others["params"]} == {1}


def test_one_learning_rate_scales_all_weights(small_run):
    """A rollback under another `optim.lr` must reach embedding, head, norms and biases too."""
    rates = []
    for lr in (3e-3, 3e-4):
        run = small_run(f"optim.lr={lr}", f"phases.stable.lr={lr}", "optim.adamw_lr_ratio=0.5")
        optimizers = optim.build(build_objectives(run), run.optim)
        spec = Curriculum.of(run).at(2000)
        optim.apply(optimizers, spec, run.optim["lr"])
        rates.append([group["lr"] for optimizer in optimizers for group in optimizer.param_groups])
    assert rates[0] == pytest.approx([10 * rate for rate in rates[1]])
    assert rates[0][-1] == pytest.approx(rates[0][0] / 2)


def test_muon_takes_the_matrices_and_adamw_the_rest(small_run):
    run = apply_overrides(small_run(), ["optim.ns_steps=3"])
    objective = build_objectives(run).masked_lm
    arguments = {key: value for key, value in run.optim.items() if key != "_target_"}
    muon, adamw = optim.muon(list(objective.parameters()), objective.backbone.describe().linear_weights(), **arguments)
    chosen = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    rest = {id(parameter) for group in adamw.param_groups for parameter in group["params"]}
    assert chosen == {id(parameter) for parameter in objective.backbone.describe().linear_weights()}
    assert chosen | rest == {id(parameter) for parameter in objective.parameters()}
    assert not chosen & rest
    assert {group["ns_steps"] for group in muon.param_groups} == {3}


def test_attention_in_fp32_on_a_gpu_is_advised_against(caplog):
    gpu = torch.device("cuda")
    for dtype, precision in ((torch.bfloat16, "bf16-mixed"), (torch.float32, "32-true")):
        assert not caplog.text
        advise_precision(gpu, precision, describe_backends(gpu, dtype))
    assert "trainer.precision=bf16-mixed" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_signals_are_handled_after_a_run_as_before_it(small_run, monkeypatch, fails):
    """Also where Lightning restores handlers of its own: a process may train several runs, and start others."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    if fails:
        monkeypatch.setattr(Validator, "scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        train(small_run("phases.stable.tokens=2000", "phases.extend.tokens=1000", "phases.decay.tokens=1000"))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
