"""A training step beside transformers': forward, backward and AdamW, on the same documents.

Ours takes them packed, without padding, with logits at the predicted tokens. `AutoModelForMaskedLM` (sdpa) takes them as its
users give them: padded to the longest of a batch; and as rows of full length, one document after the other without regard to
where each ends. Each has a process of its own, as a training script would.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from modernenc.bench import output
from modernenc.bench.settings import Bench, the_run
from modernenc.bench.turns import MatrixProducts, Result, Turn, Work, device, take_turns
from modernenc.config import Run

if TYPE_CHECKING:
    import torch

    from modernenc.data.batch import MicroBatch
    from modernenc.objectives.masked_lm import MaskedLM

OURS = "modernenc"
PEERS = {"padded": "HF padded", "rows": "HF full rows"}
LR = 1e-4


@dataclass
class Case:
    """A backbone at a length, beside one peer or alone."""

    backbone: str
    length: int
    peak: Result
    """Matrix products of the same rounds."""
    ours: Result
    peer: Result | None = None


def measure(bench: Bench, folder: Path) -> None:
    """Measure every case, and write a table, JSON and a plot."""
    console, cases = Console(), []
    for backbone in bench.backbones:
        for length in bench.lengths:
            run = the_run(bench, backbone, length)
            if bench.peers:
                check_peer(backbone, run)
            peers = [[Theirs(peer, run)] for peer in bench.peers] or [[]]
            for peer in peers:  # one at a time: two may need more memory than there is
                contestants = [MatrixProducts(precision=bench.precision), Ours(run), *peer]
                cases.append(Case(backbone, length, *take_turns(contestants, bench.repetitions)))
            output.write(folder, "step", table_of(cases), [asdict(case) for case in cases])
            if bench.peers:
                draw(cases, folder / "step.png")
    console.print(table_of(cases))


def table_of(cases: list[Case]) -> Table:
    """A row for each contestant, by case."""
    table = output.new_table("real tokens a second", ("", "tokens/s", "ours / it", "from-to", "of peak", "GB"))
    for case in cases:
        table.add_row(f"{case.backbone} {case.length:,}")
        for result in filter(None, (case.ours, case.peer)):
            name = PEERS.get(result.name, result.name)
            if result.failure or case.ours.failure:
                output.add_failure(table, name, result.failure or case.ours.failure)
                continue
            ratios = case.ours.times_faster(result)
            share = f"{result.flops / case.peak.flops:.0%}"
            spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
            middle = f"{ratios[len(ratios) // 2]:.2f}"
            table.add_row(f"  {name}", f"{result.speed:,.0f}", middle, spread, share, f"{result.peak_bytes / 1e9:.1f}")
    return table


def draw(cases: list[Case], path: Path) -> None:
    """How many times faster, by case, with the spread."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pairs = [(case, case.peer) for case in reversed(cases) if case.peer and not case.ours.failure and not case.peer.failure]
    figure, axis = pyplot.subplots(figsize=(8, 0.9 + 0.45 * len(pairs)), constrained_layout=True)
    for place, (case, peer) in enumerate(pairs):
        ratios = case.ours.times_faster(peer)
        middle = ratios[len(ratios) // 2]
        error = [[middle - ratios[0]], [ratios[-1] - middle]]
        colour = "#1f4e79" if peer.name == "padded" else "#c55a11"
        axis.barh(place, middle, 0.7, xerr=error, color=colour, error_kw={"ecolor": "#666666"})
        axis.text(ratios[-1] * 1.02, place, f"{middle:.1f}", va="center", fontsize=8)
    labels = [f"{case.backbone} {case.length:,}, {PEERS[peer.name]}" for case, peer in pairs]
    axis.set_yticks(range(len(pairs)), labels, fontsize=8)
    axis.axvline(1, color="#444444", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("times as many real tokens a second")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@dataclass
class Ours:
    """This package's step, the loop left out."""

    run: Run
    name: str = OURS

    def start(self) -> Turn:
        """The model, its optimizer and the batches of every turn."""
        import torch

        from modernenc import optim
        from modernenc.fit import keep_freed_memory
        from modernenc.model import build_objectives, compile_parts

        keep_freed_memory()
        steps = _steps(self.run)
        objectives = build_objectives(self.run).to(device())
        if compiles(self.run):
            compile_parts(objectives.backbone)
        optimizers = optim.build(objectives, {**self.run.optim, "lr": LR})

        def turn(number: int) -> Work:
            step = steps[number]
            with torch.autocast(device().type, torch.bfloat16, enabled=self.run.trainer.precision == "bf16-mixed"):
                for batch in step:
                    loss, _ = objectives(batch.to(device()))
                    (loss / sum(len(batch.targets) for batch in step)).backward()
            optim.step(optimizers)
            return work(objectives.masked_lm, step)

        return turn


@dataclass
class Theirs:
    """transformers' model under the loop that its documentation shows."""

    name: str
    run: Run
    sparse: bool = False
    """Whether it makes logits at the predicted tokens only."""

    def start(self) -> Turn:
        """The same weights, and the same documents in batches of its own."""
        import torch

        from modernenc.model import build_objectives

        steps = _steps(self.run)
        ours = build_objectives(self.run).masked_lm
        model = transformers_model(ours).to(device()).train()
        model.sparse_prediction = self.sparse
        if compiles(self.run):
            model.compile(dynamic=None if self.sparse else self.name == "padded")
        optimizer = torch.optim.AdamW(model.parameters(), LR, fused=True)
        chunk = self.run.backbone.get("chunk_size", 1)

        def turn(number: int) -> Work:
            step = steps[number]
            if self.name == "padded":
                batches = list(padded(step, self.run, chunk))
            else:
                step = [joined(step, self.run)]
                batches = list(full_rows(step[0], self.run))
            for batch in batches:
                with torch.autocast(device().type, torch.bfloat16, enabled=self.run.trainer.precision == "bf16-mixed"):
                    loss = model(**{key: value.to(device()) for key, value in batch.items()}).loss
                (loss / len(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
            return work(ours, step)

        return turn


def compiles(run: Run) -> bool:
    """Whether a step is to be compiled, and there is a GPU, as in `Pretraining`."""
    return run.trainer.compile and run.trainer.precision == "bf16-mixed" and device().type == "cuda"


def check_peer(backbone: str, run: Run) -> None:
    """ValueError where transformers has no such model of its own: 5 has no MEGA."""
    import transformers
    from hydra.utils import get_class
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from modernenc.hugging_face import converter_of

    types = converter_of(get_class(run.backbone["_target_"])).model_types
    if not set(types) & set(CONFIG_MAPPING_NAMES):
        raise ValueError(
            f"backbones={backbone}: transformers {transformers.__version__} has no {types[0]} to measure beside it; "
            "install 'transformers<5', or take the parts that need no peer: step with peers=[], growth, data, loop, roofline"
        )


def new_transformers_model(ours: "MaskedLM") -> Any:
    """Its own class, not one that is shipped with an export, of the same shape, initialised as transformers does."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    from modernenc.hugging_face import converter_of

    settings = converter_of(ours.backbone).new_model(ours.backbone).config
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(**settings.to_dict()))


def transformers_model(ours: "MaskedLM") -> Any:
    """The same with our weights."""
    from modernenc.hugging_face import converter_of

    model = new_transformers_model(ours)
    model.load_state_dict(converter_of(ours.backbone).to_hugging_face(ours.state_dict()))
    return model


def work(model: "MaskedLM", step: list["MicroBatch"]) -> Work:
    """Tokens of a step, and the products that they need: forward, and twice as many backward."""
    head = sum(parameter.numel() for parameter in model.head.parameters() if parameter.ndim == 2)
    backbone = model.backbone.describe()
    tokens, flops = 0, 0.0
    for batch in step:
        batch = batch.unpadded()
        tokens += batch.num_tokens
        flops += 6.0 * len(batch.targets) * (head + model.decoder.weight.numel())
        flops += sum(3 * length * backbone.forward_flops(length) for length in batch.cu_seqlens.diff().tolist())
    return Work(tokens, flops)


def padded(step: list["MicroBatch"], run: Run, chunk: int) -> Iterator[dict[str, "torch.Tensor"]]:
    """So many documents at a time as there would be rows, padded to the longest; to whole chunks, which transformers wants."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    at_once = max(1, run.trainer.micro_batch_tokens // run.phases["decay"].seq_len)
    documents = [document for batch in step for document in _documents(batch)]
    for first in range(0, len(documents), at_once):
        some = documents[first : first + at_once]
        columns = zip(*((ids, torch.ones_like(ids), labels) for ids, labels in some), strict=True)
        rows = [pad_sequence(list(column), True, fill) for column, fill in zip(columns, (0, 0, -100), strict=True)]
        more = -rows[0].shape[1] % chunk if rows[0].shape[1] > chunk else 0
        rows = [torch.nn.functional.pad(row, (0, more), value=fill) for row, fill in zip(rows, (0, 0, -100), strict=True)]
        yield dict(zip(("input_ids", "attention_mask", "labels"), rows, strict=True))


def joined(step: list["MicroBatch"], run: Run) -> "MicroBatch":
    """All documents one after the other as rows of full length; the last is filled up with the first tokens again.

    So is the last micro-batch where it is compiled, which is best done for one shape.
    """
    import torch

    length = run.phases["decay"].seq_len
    step = [batch.unpadded() for batch in step]
    labels = torch.cat([_labels(batch) for batch in step])
    ids = torch.cat([batch.input_ids for batch in step])
    at_once = min(run.trainer.micro_batch_tokens // length, -(-len(ids) // length)) if compiles(run) else 1
    more = -len(ids) % (length * at_once)
    ids, labels = torch.cat((ids, ids[:more])), torch.cat((labels, labels[:more]))
    places = (labels >= 0).nonzero().flatten()
    ends = torch.arange(0, len(ids) + 1, length)
    return replace(
        step[0], input_ids=ids, cu_seqlens=ends, max_seqlen=length, target_positions=places, targets=labels[places],
        num_tokens=len(ids),
    )  # fmt: skip


def full_rows(rows: "MicroBatch", run: Run) -> Iterator[dict[str, "torch.Tensor"]]:
    """As many rows at a time as a micro-batch has."""
    at_once = max(1, run.trainer.micro_batch_tokens // rows.max_seqlen)
    columns = (x.view(-1, rows.max_seqlen).split(at_once) for x in (rows.input_ids, _labels(rows)))
    for ids, labels in zip(*columns, strict=True):
        yield {"input_ids": ids, "labels": labels}


def _documents(batch: "MicroBatch") -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    batch = batch.unpadded()
    lengths = batch.cu_seqlens.diff().tolist()
    return zip(batch.input_ids.split(lengths), _labels(batch).split(lengths), strict=True)


def _labels(batch: "MicroBatch") -> "torch.Tensor":
    import torch

    return torch.full_like(batch.input_ids, -100).index_copy(0, batch.target_positions, batch.targets)


def _steps(run: Run) -> list[list["MicroBatch"]]:
    """The micro-batches of every turn."""
    from modernenc.curriculum import Curriculum
    from modernenc.data.blocks import Corpus
    from modernenc.data.loader import DataState, Steps

    steps = Steps(run, Curriculum.of(run), Corpus.of(run.data), 0, 1, DataState())
    return [step.micro_batches for step in steps]
