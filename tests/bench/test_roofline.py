"""A step on a GPU, traced without one: it never waits for a number, and its products are those that the model needs."""

import pytest
from torch._subclasses.fake_tensor import DataDependentOutputException

from modernenc.bench.ours import step_work
from modernenc.bench.roofline import trace_step
from modernenc.config import Run, register
from modernenc.model.build import build_objectives
from modernenc.objectives.masked_lm import MaskedLM
from support.runs import composed

TOKENS, LENGTH = 2_048, 512


@pytest.fixture(params=["modernbert_tiny backbone.attention_out_dropout=0.1", "mega_tiny backbone.dropout_prob=0.1"])
def run(request) -> Run:
    register()
    backbone, dropout = request.param.split()
    return composed(["+recipe=demo", f"backbone={backbone}", "optim=adamw", dropout])


def test_it_needs_the_products_that_the_formula_says(run):
    kernels = trace_step(run, LENGTH, TOKENS)
    model = build_objectives(run).masked_lm
    needed = step_work(model, [LENGTH] * (TOKENS // LENGTH), int(TOKENS * run.phases["decay"].mask_ratio)).flops
    counted = sum(kernel.flops for kernel in kernels)
    print(f"{len(kernels)} kernels, {counted / needed:.3f} of the formula's FLOPs")
    assert 0.8 < counted / needed < 1.2  # the last layer is not asked everywhere, attention makes its scores again
    assert all(kernel.seconds > 0 for kernel in kernels if kernel.flops)


def test_a_step_that_waits_is_found_out(run, monkeypatch):
    forward = MaskedLM.forward

    def waits(self, batch):
        loss, correct = forward(self, batch)
        return loss * float(loss.detach() > 0), correct

    monkeypatch.setattr(MaskedLM, "forward", waits)
    with pytest.raises(DataDependentOutputException):
        trace_step(run, LENGTH, TOKENS)
