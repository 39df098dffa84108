"""Inference beside transformers', by the plan of ModernBERT's table of efficiency (Warner et al. 2024, table 2).

Documents of full length, and of lengths by a normal distribution around half of it, short (512) and long (8,192): how many fit
into memory at once, and thousands of tokens a second to their hidden states, over ten runs. Ours takes them packed, that of
transformers (sdpa) padded. How many fit is reckoned from the peaks of two batches.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from modernenc.bench import output
from modernenc.bench.settings import Bench, the_run
from modernenc.bench.step import check_peer
from modernenc.bench.turns import Result, Turn, Work, available_bytes, device, take_turns
from modernenc.config import Run

LENGTHS = (512, 8_192)
KINDS = ("fixed", "variable")
RUNS = 10
OURS, THEIRS = "modernenc", "HF padded"


@dataclass
class Case:
    """A backbone on documents of one kind."""

    backbone: str
    length: int
    kind: str
    """fixed or variable."""
    documents: int
    """At once."""
    results: list[Result]
    fit: list[int]
    """Documents that fit into memory at once, of each."""


def measure(bench: Bench, folder: Path) -> None:
    """Measure every case, and write a table and JSON."""
    cases = []
    for backbone in bench.backbones:
        for length in LENGTHS:
            run = the_run(bench, backbone, length)
            check_peer(backbone, run)
            for kind in KINDS:
                documents = max(4, bench.inference_tokens // length)
                lengths = lengths_of(kind, length, documents)
                results = take_turns([Encoder(name, run, lengths) for name in (OURS, THEIRS)], RUNS)
                fit = [how_many_fit(result, run, lengths) for result in results]
                cases.append(Case(backbone, length, kind, documents, results, fit))
                output.write(folder, "inference", table_of(cases), [asdict(case) for case in cases])
    Console().print(table_of(cases))


def lengths_of(kind: str, length: int, documents: int) -> list[int]:
    """Tokens of each document."""
    if kind == "fixed":
        return [length] * documents
    drawn = np.random.default_rng(0).normal(length / 2, length / 8, documents)
    return drawn.round().clip(1, length).astype(int).tolist()


def how_many_fit(result: Result, run: Run, lengths: list[int]) -> int:
    """Documents that memory holds at once, if the peak is a line in their number."""
    few = lengths[: len(lengths) // 4]
    free = _free_bytes()
    (fewer,) = take_turns([Encoder(result.name, run, few)], 1)
    if result.failure or fewer.failure:
        return 0
    each = (result.peak_bytes - fewer.peak_bytes) / (len(lengths) - len(few))
    return int((free - fewer.peak_bytes) / max(each, 1)) + len(few)


def table_of(cases: list[Case]) -> Table:
    """A row for each contestant, by case."""
    table = output.new_table(f"hidden states, medians of {RUNS} runs", ("", "fit", "batch", "k tokens/s", "ratio", "from-to"))
    for case in cases:
        table.add_row(f"{case.backbone} {case.length:,} {case.kind}")
        for result, fit in zip(case.results, case.fit, strict=True):
            if result.failure or case.results[0].failure:
                output.add_failure(table, result.name, result.failure or case.results[0].failure)
                continue
            ratios = case.results[0].times_faster(result)
            table.add_row(
                f"  {result.name}", f"{fit:,}", f"{case.documents:,}", f"{result.speed / 1e3:,.1f}",
                f"{ratios[len(ratios) // 2]:.2f}", f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
            )  # fmt: skip
    return table


@dataclass
class Encoder:
    """Ours or transformers' model, with the same weights, on documents of random tokens."""

    name: str
    run: Run
    lengths: list[int]

    def start(self) -> Turn:
        """The model, and a batch on its device."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from modernenc.bench.step import transformers_model
        from modernenc.model.allocator import keep_freed_memory
        from modernenc.model.build import build_objectives

        dtype = torch.bfloat16 if self.run.trainer.precision == "bf16-mixed" else torch.float32
        ours = build_objectives(self.run).masked_lm
        ids = torch.randint(ours.backbone.vocab_size, (sum(self.lengths),), device=device())
        if self.name == OURS:
            keep_freed_memory()
            backbone = ours.to(device(), dtype).eval().backbone
            ends = torch.tensor([0, *self.lengths], device=device()).cumsum(0).int()

            def encode() -> None:
                backbone(ids, ends, max(self.lengths))

        else:
            model = transformers_model(ours).base_model.to(device(), dtype).eval()
            documents = ids.split(self.lengths)
            rows = pad_sequence(list(documents), True)
            mask = pad_sequence([torch.ones_like(document) for document in documents], True)

            def encode() -> None:
                model(input_ids=rows, attention_mask=mask)

        def turn(number: int) -> Work:
            with torch.inference_mode():
                encode()
            return Work(len(ids), 0.0)

        return turn


def _free_bytes() -> int:
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_bytes()
