"""Masked-LM loss of any encoder on held-out text: where it is good, and what longer context is worth to it.

Every document stands alone, between its special tokens, and is cut where it is longer than the model reads. The tokens that are
predicted, and what replaces them, are functions of the number of the piece, so that models with one tokenizer and one length
have the same targets. Losses are in nats per predicted token of the model's own tokenizer: those of different tokenizers do not
compare. Bits per byte of text do, roughly: a token that is a smaller part of a word is easier to guess from the rest of it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import xxhash
from annotated_types import Ge, Gt, Interval, MinLen
from jaxtyping import Bool, Float, Integer
from omegaconf import MISSING

from modernenc.data.packing import SPECIALS
from modernenc.evaluation.cells import Cell, Curve, Findings, Request
from modernenc.evaluation.intervals import NORMAL
from modernenc.evaluation.settings import read_settings
from modernenc.frozen import frozen
from modernenc.suites.held_out import read_documents

if TYPE_CHECKING:
    from modernenc.suites.predictor import Masked, Predictor

CHARACTERS_PER_TOKEN = 8
"""More than tokenizers pack into a token on average: so many characters hold the tokens that are wanted."""
PARTS = 8
"""Parts of a full context for which the loss is given by position."""
ALL = "all"
Bins = Iterable[tuple[str, Bool[np.ndarray, " targets"]]]
"""Names, and which targets each stands for."""


@frozen
class Settings:
    """What is measured."""

    mask_ratios: Annotated[list[Annotated[float, Interval(gt=0, lt=1)]], MinLen(1)] = MISSING
    """Fractions of the tokens that are predicted; the first is that of all tables but the one by mask ratio."""
    tokens_per_source: Annotated[int, Ge(1)] = MISSING
    """About how many tokens of each source are read."""
    max_length: Annotated[int, Ge(8)] = MISSING
    """Tokens beyond which documents are cut; the model's own limit holds too."""
    shortest_context: Annotated[int, Ge(8)] = MISSING
    """The shortest of the contexts, each twice the last, in which the same tokens are predicted."""
    pseudo_targets: Annotated[int, Ge(0)] = MISSING
    """Tokens that are masked one at a time for the pseudo-perplexity; 0 leaves it out."""
    pseudo_context: Annotated[int, Ge(8)] = MISSING
    """Tokens around and with each of them."""
    batch_tokens: Annotated[int, Gt(0)] = MISSING
    """Tokens, with padding, that are computed at once."""
    precision: Annotated[str, Literal["bf16", "fp32"]] = MISSING


SCHEMA = Settings


@dataclass(frozen=True)
class MaskedLMCell(Cell):
    """The losses of one model on the documents of all sources."""

    documents: dict[str, list[str]] = field(default_factory=dict)

    def work(self, out: Path) -> Findings:
        """Measure the loss and its curves."""
        from modernenc.suites.predictor import Predictor  # transformers takes seconds to import

        settings = Settings(**self.setting)
        return measure(Predictor(self.model.folder, settings.batch_tokens, settings.precision), self.documents, settings)


def make_cells(request: Request) -> tuple[list[MaskedLMCell], list[str]]:
    """Return a cell for each model that predicts tokens, and the names of the others.

    Raises FileNotFoundError or ValueError for what is no text or no setting.
    """
    settings = read_settings(Settings, request.settings, request.changes)
    documents = read_documents(request.data, settings.tokens_per_source * CHARACTERS_PER_TOKEN)
    digest = xxhash.xxh3_64(json.dumps(documents).encode()).hexdigest()
    cells, notes = [], []
    for model in request.models:
        kinds = json.loads((model.folder / "config.json").read_text()).get("architectures") or [""]
        if kinds[0].endswith(("ForMaskedLM", "ForPreTraining")):
            cells.append(MaskedLMCell("mlm", model, "loss", digest, ("loss",), asdict(settings), documents=documents))
        else:
            notes.append(f"{model.name} is left out: {kinds[0] or 'it'} does not predict tokens")
    return cells, notes


@dataclass(frozen=True)
class Losses:
    """What a model made of each target; arrays over all targets."""

    loss: Float[np.ndarray, " targets"]
    """In nats."""
    right: Float[np.ndarray, " targets"]
    """1 where the likeliest token is right, else 0."""
    position: Integer[np.ndarray, " targets"]
    """Position in its sequence."""
    document: Integer[np.ndarray, " targets"]
    """Number of its document."""

    @classmethod
    def of(cls, predictor: "Predictor", sequences: Sequence["Masked"]) -> "Losses":
        """Predict all targets of all sequences."""
        counts = [len(one.positions) for one in sequences]
        positions = np.concatenate([one.positions for one in sequences])
        return cls(*predictor.losses(sequences), positions, np.repeat([one.document for one in sequences], counts))

    def curve(self, bins: Bins, of: str = "loss", less: Float[np.ndarray, " targets"] | float = 0.0) -> Curve:
        """Return the mean loss (or fraction right) of each bin that has targets, minus the mean of `less`."""
        values = getattr(self, of) - less
        points = [
            (name, float(values[mine].mean()), _error(values[mine], self.document[mine])) for name, mine in bins if mine.any()
        ]
        return Curve([name for name, _, _ in points], [mean for _, mean, _ in points], [error for _, _, error in points])

    def all(self) -> Bool[np.ndarray, " targets"]:
        """Return a bin of all targets."""
        return np.ones(len(self.loss), bool)

    def by_document(self) -> dict[str, list[float]]:
        """Return the summed loss and the number of targets of each document."""
        return {
            "loss": np.bincount(self.document, self.loss).tolist(),
            "targets": np.bincount(self.document).astype(float).tolist(),
        }


def measure(predictor: "Predictor", documents: dict[str, list[str]], settings: Settings) -> Findings:
    """Return the loss of a model over all documents, and its curves."""
    texts = [(source, text) for source, own in documents.items() for text in own]
    ids = predictor.tokenizer([text for _, text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    tokens = [(source, np.array(own)) for (source, _), own in zip(texts, ids, strict=True) if own]
    names = np.array([source for source, _ in tokens])
    sizes = np.array([len(own) for _, own in tokens])
    length = min(settings.max_length, predictor.longest)
    step = length - SPECIALS
    pieces = [(number, own[at : at + step]) for number, (_, own) in enumerate(tokens) for at in range(0, len(own), step)]

    def masked_at(ratio: float) -> list["Masked"]:
        return [predictor.mask(own, ratio, seed, number) for seed, (number, own) in enumerate(pieces)]

    at_ratio = {ratio: Losses.of(predictor, masked_at(ratio)) for ratio in settings.mask_ratios}
    losses = at_ratio[settings.mask_ratios[0]]
    sources = [(ALL, losses.all()), *((name, names[losses.document] == name) for name in documents)]
    by_source = losses.curve(sources[1:])
    held = {name: int(sizes[names == name].sum()) for name in documents}
    curves = {
        "loss by source": losses.curve(sources),
        "bits per byte by source": _bits_per_byte(by_source, held, documents),
        "accuracy by source": losses.curve(sources, "right"),
        "loss by length of the document": losses.curve(_powers_of_two(sizes[losses.document])),
        "loss by mask ratio": _joined(one.curve([(f"{ratio:.0%}", one.all())]) for ratio, one in at_ratio.items()),
    }
    if full := [one for one in masked_at(settings.mask_ratios[0]) if len(one.ids) == length]:
        curves |= _in_full_contexts(predictor, full, length, settings.shortest_context)
    if settings.pseudo_targets:
        curves["pseudo-perplexity"] = _pseudo_perplexity(predictor, [own for _, own in tokens], settings)
    return Findings(losses.by_document(), (), curves)


def _bits_per_byte(losses: Curve, tokens: Mapping[str, int], documents: Mapping[str, Sequence[str]]) -> Curve:
    """Return the losses of sources per byte of their text, of which another tokenizer makes more or fewer tokens."""
    sizes = [sum(len(text.encode()) for text in documents[name]) for name in losses.x]
    scales = [tokens[name] / (size * math.log(2)) for name, size in zip(losses.x, sizes, strict=True)]
    means = [loss * scale for loss, scale in zip(losses.y, scales, strict=True)]
    errors = [error * scale for error, scale in zip(losses.error, scales, strict=True)]
    shares = [size / sum(sizes) for size in sizes]
    over_all = sum(share * mean for share, mean in zip(shares, means, strict=True))
    error = math.hypot(*(share * error for share, error in zip(shares, errors, strict=True)))
    return Curve([ALL, *losses.x], [over_all, *means], [error, *errors])


def _in_full_contexts(predictor: "Predictor", full: Sequence["Masked"], length: int, shortest: int) -> dict[str, Curve]:
    """Return the loss in contexts of the model's full length by position, and what shorter ones add.

    A shorter context is a piece of the full one, with the same tokens masked. What counts is the difference to the full
    context, in which the difficulty of the targets cancels.
    """
    whole = Losses.of(predictor, full)
    edges = np.linspace(0, length, PARTS + 1).astype(int).tolist()
    by_position = whole.curve(
        (f"{low:,} to {high - 1:,}", (whole.position >= low) & (whole.position < high)) for low, high in pairwise(edges)
    )
    contexts = [shortest << power for power in range(32) if shortest << power < length]
    curves = []
    for context in contexts:
        losses = Losses.of(predictor, [piece for one in full for piece in _pieces(one, context)])
        curves.append(losses.curve([(f"{context:,}", losses.all())], less=whole.loss))
    return {
        f"loss by position in contexts of {length:,}": by_position,
        **({f"loss added by a shorter context than {length:,}": _joined(curves)} if curves else {}),
    }


def _pieces(one: "Masked", context: int) -> Iterator["Masked"]:
    """Cut a masked sequence into pieces of at most `context` tokens, each between the special tokens of the whole."""
    step = context - SPECIALS
    text = one.ids[1:-1]
    for start in range(0, len(text), step):
        mine = (one.positions > start) & (one.positions <= start + step)
        ids = np.concatenate([one.ids[:1], text[start : start + step], one.ids[-1:]])
        yield one._replace(ids=ids, positions=one.positions[mine] - start, targets=one.targets[mine])


def _pseudo_perplexity(predictor: "Predictor", tokens: Sequence[Integer[np.ndarray, " tokens"]], settings: Settings) -> Curve:
    """Return the exponential of the mean loss of tokens that are masked one at a time: Salazar et al. 2020, arXiv:1910.14659.

    The tokens are drawn from all documents, each with the text around it.
    """
    starts = np.cumsum([0, *(len(own) for own in tokens)])
    drawn = np.random.default_rng(0).permutation(starts[-1])[: settings.pseudo_targets]
    width = min(settings.pseudo_context, predictor.longest) - SPECIALS
    sequences = []
    for place in np.sort(drawn).tolist():
        document = int(np.searchsorted(starts, place, "right")) - 1
        at = place - int(starts[document])
        first = max(0, min(at - width // 2, len(tokens[document]) - width))
        sequences.append(predictor.mask_one(tokens[document][first : first + width], at - first, document))
    losses = Losses.of(predictor, sequences)
    ((mean,), (error,)) = losses.curve([("", losses.all())]).y, losses.curve([("", losses.all())]).error
    value = float(np.exp(mean))
    return Curve([f"{len(drawn):,} tokens, {settings.pseudo_context} around each"], [value], [value * error])


def _powers_of_two(sizes: Integer[np.ndarray, " targets"]) -> Bins:
    """Yield the targets whose size lies between a power of two and the next."""
    powers = np.log2(sizes).astype(int)
    for power in np.unique(powers).tolist():
        yield f"{2**power:,} to {2 ** (power + 1) - 1:,}", powers == power


def _joined(curves: Iterable[Curve]) -> Curve:
    """Return the points of several curves as one."""
    x, y, error = zip(*((curve.x, curve.y, curve.error) for curve in curves), strict=True)
    return Curve(*(list(chain.from_iterable(parts)) for parts in (x, y, error)))


def _error(values: Float[np.ndarray, " targets"], documents: Integer[np.ndarray, " targets"]) -> float:
    """Return half of the 95 % interval of a mean over targets, of which those of one document are alike.

    It is that of a ratio of sums over documents: Cochran 1977, Sampling Techniques, equation 6.13. One document alone says
    nothing of others: there the interval is that of its tokens, which is too narrow, but not 0.
    """
    _, number = np.unique(documents, return_inverse=True)
    if not number.any():
        number = np.arange(len(values))
    residuals = np.bincount(number, values - values.mean())
    count = len(residuals)
    return NORMAL * float(np.sqrt((residuals**2).sum() * count / max(1, count - 1)) / len(values))
