"""What a step of two ranks exchanges and waits for, without a second rank: the process group only seems to have one."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import distributed
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from modernenc.backbones import rotary
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.data.loader import Steps
from modernenc.data.state import DataState
from modernenc.kernels.device import assume_gpu
from modernenc.model import optim
from modernenc.training import module as training
from modernenc.training import ranks, snapshot
from support.runs import composed, small, train

PLACE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
COLLECTIVES = (
    "all_reduce", "broadcast", "broadcast_object_list", "all_gather", "all_gather_into_tensor", "all_gather_object",
    "gather_object", "reduce", "barrier", "monitored_barrier",
)  # fmt: skip


@pytest.fixture
def two_ranks(monkeypatch) -> Iterator[None]:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore(), timeout=timedelta(seconds=10))
    yield
    rotary._table.cache_clear()  # of tables that have shapes only
    distributed.destroy_process_group()


class Traced(TorchDispatchMode):
    """The names of all operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Trainer:
    """As much of a trainer as a step asks for. Gradients are not exchanged: that is the strategy's part."""

    world_size = 2
    strategy = None
    should_stop = False


def trace_step(run, monkeypatch) -> tuple[list[str], list[int]]:
    """Take a step on tensors that have shapes only; return its operations, and how many there had been at each reading."""
    corpus = Corpus.of(run.data)
    step = next(iter(Steps(run, Curriculum.of(run), corpus, 0, 2, DataState())))
    traced, readings = Traced(), []

    def read(numbers: torch.Tensor) -> list[float]:
        readings.append(len(traced.names))
        return [100.0, *[0.0] * (len(numbers) - 2), 1.0]

    monkeypatch.setattr(training, "read", read)
    module, trainer = training.Pretraining(run, Curriculum.of(run), corpus), Trainer()
    optimizers = [SimpleNamespace(optimizer=one, step=one.step, zero_grad=one.zero_grad, param_groups=one.param_groups)
                  for one in optim.build(module.objectives, run.optim)]  # fmt: skip
    monkeypatch.setattr(training.Pretraining, "trainer", trainer)
    monkeypatch.setattr(module, "wrapped_optimizers", lambda: optimizers)
    monkeypatch.setattr(module, "manual_backward", lambda loss: loss.backward())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, assume_gpu():
        names = ("input_ids", "target_positions", "targets")
        step.micro_batches = [
            replace(batch, **{name: fake.from_tensor(getattr(batch, name)) for name in names}) for batch in step.micro_batches
        ]
        with traced, torch.autocast("cpu", torch.bfloat16):
            module.training_step(step, 0)
    assert module.step == 1
    return traced.names, readings


@pytest.fixture(params=["adamw", "stable_adamw", "muon"])
def run(request, corpus_root, tmp_path):
    return composed(small(corpus_root, tmp_path / "run", f"optim={request.param}", "init.unigram=false"))


def test_a_step_of_two_ranks_waits_once_and_exchanges_one_tensor_beside_the_gradients(two_ranks, run, monkeypatch):
    names, readings = trace_step(run, monkeypatch)
    exchanged = [place for place, name in enumerate(names) if name.startswith("c10d::")]
    assert [names[place] for place in exchanged] == ["c10d::allreduce_"]
    assert len(readings) == 1
    # All products of the layers are under way when it waits, and then only the update is left.
    products = [place for place, name in enumerate(names) if name in ("aten::mm", "aten::addmm")]
    assert max(products) < exchanged[0] < readings[0] < len(names)


def test_a_step_that_reads_its_targets_before_it_begins_is_found_out(two_ranks, run, monkeypatch):
    summed = training.Pretraining.sum_over_ranks
    monkeypatch.setattr(
        training.Pretraining, "sum_over_ranks", lambda self, numbers: torch.tensor(summed(self, numbers).tolist())
    )
    with pytest.raises(DataDependentOutputException):
        trace_step(run, monkeypatch)


def alone(state: object, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Return the gradients as they are: DDP does not take the answer of a group that only seems to be one."""
    gradients: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    gradients.set_result(bucket.buffer())
    return gradients


class PerStep(L.Callback):
    """Counts the calls of collectives from the start of each step to that of the next."""

    def __init__(self, monkeypatch) -> None:
        self.steps: list[Counter[str]] = [Counter()]
        for name in COLLECTIVES:
            monkeypatch.setattr(distributed, name, self._counting(name, getattr(distributed, name)))

    def _counting(self, name: str, call: Any) -> Any:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.steps[-1][name] += 1
            return call(*arguments, **keywords)

        return counted

    def on_train_batch_start(self, *arguments: Any, **keywords: Any) -> None:
        self.steps.append(Counter())


def test_nor_do_the_loop_and_what_is_called_after_a_step_exchange_more(two_ranks, corpus_root, tmp_path, monkeypatch):
    """Rows are written, checkpoints saved and scores computed at some steps only; all others send one tensor around."""
    counted = PerStep(monkeypatch)
    fit = training.Pretraining.on_train_start
    monkeypatch.setattr(ranks, "agree", lambda settings, own_keys: settings)  # what the other rank would have sent
    monkeypatch.setattr(snapshot, "_data_state_of_all_ranks", lambda module: module.data_state)

    def started(module):
        module.trainer.callbacks.append(counted)
        module.trainer.strategy.model.register_comm_hook(None, alone)
        fit(module)

    monkeypatch.setattr(training.Pretraining, "on_train_start", started)
    settings = ["trainer.devices=2", "logger.every_steps=1000", "checkpoint.every_tokens=0", "checkpoint.every_minutes=30"]
    train(composed(small(corpus_root, tmp_path / "run", *settings)))
    usual, most = Counter(tuple(sorted(step.items())) for step in counted.steps[1:]).most_common()[0]
    assert dict(usual) == {"all_reduce": 1}
    assert most >= len(counted.steps) - 5  # all but the ends of phases
