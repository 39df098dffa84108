"""The check that a converted model computes the same: logits, or scores of choices, on random documents of many lengths."""

from typing import Any

import torch

from modernenc.backbones import Backbone
from modernenc.curriculum import CHOICES
from modernenc.objectives.masked_lm import MaskedLM
from modernenc.objectives.multiple_choice import MultipleChoice

TOLERANCE = 1e-4
"""Largest difference of logits that passes, relative to the largest logit or to 1."""


@torch.no_grad()
def logit_difference(ours: MaskedLM, theirs: Any, vocab_size: int) -> float:
    """Return the largest difference of logits, relative to the largest logit or to 1; NaN if a logit is.

    Documents are packed here and given one by one to `theirs`, a masked-LM model of transformers. Lengths lie around windows
    and segments.
    """
    longest = min(700, ours.backbone.max_position)
    lengths = [n for n in (1, 2, 31, 64, 65, 129, 300, longest) if n <= longest]
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = ours.logits(torch.cat(documents), ends, max(lengths), torch.arange(int(ends[-1])))
    alone = torch.cat([theirs.eval()(input_ids=document[None]).logits[0] for document in documents])
    return float((alone - packed).abs().max() / alone.abs().max().clamp(min=1))


@torch.no_grad()
def score_difference(backbone: Backbone, choice: MultipleChoice, theirs: Any, vocab_size: int) -> float:
    """Return the largest difference of the scores of choices, relative to the largest score or to 1; NaN if a score is.

    Choices are packed here, and padded for `theirs`, a multiple-choice model of transformers.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, backbone.max_position) for length in (3, 17, 65, 130, 9, 64, 200, 31)]
    documents = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    hidden = backbone(torch.cat(documents), ends, max(lengths), ends[:-1].long())
    packed = choice.score(choice.head(hidden)).view(-1, CHOICES)
    rows, kept = (
        torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).view(-1, CHOICES, max(lengths))
        for parts in (documents, [torch.ones_like(document) for document in documents])
    )
    alone = theirs.eval()(input_ids=rows, attention_mask=kept).logits
    return float((alone - packed).abs().max() / alone.abs().max().clamp(min=1))
