"""Predict masked tokens with any masked-LM model of transformers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, logging

from modernenc.data.blocks import Roles
from modernenc.data.lanes import Chunk
from modernenc.data.masking import Masker
from modernenc.evaluation.models import know_mega, max_positions

MULTIPLE = 64
"""Batches are padded to a multiple of this many tokens, so that few shapes occur, for which kernels are chosen."""


class Masked(NamedTuple):
    """A sequence of tokens, special ones included, some of which are to be predicted."""

    ids: Integer[np.ndarray, " tokens"]
    positions: Integer[np.ndarray, " targets"]
    targets: Integer[np.ndarray, " targets"]
    document: int
    """Number of the document that it is a part of."""


class Predictor:
    """A masked-LM model with its tokenizer. Raises ValueError, naming the folder, where the tokenizer has no mask token."""

    def __init__(self, folder: Path, batch_tokens: int, precision: str) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        know_mega(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        specials = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.mask_token_id)
        if None in specials:
            raise ValueError(f"{folder}: its tokenizer has no cls, sep or mask token, which masked LM needs")
        cls, sep, mask = specials
        self.roles = Roles(cls, sep, self.tokenizer.pad_token_id or 0, mask, self.tokenizer.unk_token_id or 0)
        self._ordinary_ids = np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options: Any = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
        model, loaded = AutoModelForMaskedLM.from_pretrained(folder, **options)
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"{folder} has no weights for {missing[0]}: it does not predict tokens, which mlm measures")
        self.model: Any = model.eval().to(device)
        self.longest = min(max_positions(self.model.config), self.tokenizer.model_max_length)
        self._batch_tokens = batch_tokens
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
        self._places: Tensor = torch.empty(0)
        # Logits are computed only where a token is predicted: all of them would be gigabytes.
        self.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (self._at_places(given[0]),))

    def mask(self, ids: Integer[np.ndarray, " tokens"], ratio: float, seed: int, document: int) -> Masked:
        """Put special tokens around a text's tokens and choose those to predict, as in training, by a seed."""
        batch = Masker(self.roles, self._ordinary_ids, ratio).batch([[Chunk(ids, "")]], [(seed,)], 0).unpadded()
        return Masked(batch.input_ids.numpy(), batch.target_positions.numpy(), batch.targets.numpy(), document)

    def mask_one(self, ids: Integer[np.ndarray, " tokens"], at: int, document: int) -> Masked:
        """Put special tokens around a text's tokens, and mask the one at a place."""
        whole = np.concatenate([[self.roles.cls], ids, [self.roles.sep]])
        target = whole[at + 1]
        whole[at + 1] = self.roles.mask
        return Masked(whole, np.array([at + 1]), np.array([target]), document)

    def losses(self, sequences: Sequence[Masked]) -> tuple[Float[np.ndarray, " targets"], Float[np.ndarray, " targets"]]:
        """Return the loss in nats of each target, and 1 where the likeliest token is right, else 0; in the order given."""
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for numbers in self._batches(sequences):
            losses, right = self._predict([sequences[number] for number in numbers])
            ends = np.cumsum([len(sequences[number].positions) for number in numbers])[:-1]
            found.update(zip(numbers, zip(np.split(losses, ends), np.split(right, ends), strict=True), strict=True))
        losses, right = zip(*(found[number] for number in range(len(sequences))), strict=True)
        return np.concatenate(losses), np.concatenate(right)

    def _batches(self, sequences: Sequence[Masked]) -> Iterator[list[int]]:
        """Yield the numbers of sequences of like lengths that fit into a batch."""
        batch: list[int] = []
        for number in sorted(range(len(sequences)), key=lambda number: -len(sequences[number].ids)):
            if batch and (len(batch) + 1) * len(sequences[batch[0]].ids) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(number)
        yield batch

    @torch.no_grad()
    def _predict(self, batch: Sequence[Masked]) -> tuple[np.ndarray, np.ndarray]:
        length = min(-(-max(len(one.ids) for one in batch) // MULTIPLE) * MULTIPLE, max(self.longest, len(batch[0].ids)))
        ids = torch.full((len(batch), length), self.roles.pad)
        kept = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            ids[row, : len(one.ids)] = torch.from_numpy(one.ids)
            kept[row, : len(one.ids)] = 1
        places = torch.from_numpy(np.concatenate([row * length + one.positions for row, one in enumerate(batch)]))
        targets = torch.from_numpy(np.concatenate([one.targets for one in batch])).to(self.model.device)
        self._places = places.to(self.model.device)
        with self._autocast:
            logits = self.model(input_ids=ids.to(self.model.device), attention_mask=kept.to(self.model.device)).logits
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        return losses.double().cpu().numpy(), (logits.argmax(-1) == targets).double().cpu().numpy()

    def _at_places(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "targets hidden"]:
        return hidden.reshape(-1, hidden.shape[-1])[self._places]
