"""The tokenizer: trained on the corpus or given; its special tokens by role."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROLE_NAMES = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}
"""Usual names of special tokens by what they are for."""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries; every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[names[0] for names in ROLE_NAMES.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Fill-mask writes "a [MASK] b", but the token learnt was " word": the mask takes the space before it.
    tokenizer.add_special_tokens([tokenizers.AddedToken("[MASK]", lstrip=True, special=True)])
    return tokenizer


def load(path: Path) -> Tokenizer:
    """A tokenizer for encoding text: special tokens that occur in it literally are text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def roles(tokenizer: Tokenizer, given: dict[str, str]) -> dict[str, int]:
    """Id of each role; ValueError, naming the role, when the tokenizer lacks it."""
    ids = {}
    for role, names in ROLE_NAMES.items():
        tried = (given[role],) if role in given else names
        found = [number for name in tried if (number := tokenizer.token_to_id(name)) is not None]
        if not found:
            raise ValueError(
                f"tokenizer.roles.{role}: the tokenizer has none of {', '.join(tried)}; "
                f"name its {role} token with tokenizer.roles.{role}=TOKEN"
            )
        ids[role] = found[0]
    return ids


def special_ids(tokenizer: Tokenizer, ids_by_role: dict[str, int]) -> list[int]:
    """Ids that never stand for text."""
    added = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    return sorted({*added, *ids_by_role.values()})


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def batches(texts: Iterable[str], characters: int = 1 << 20) -> Iterator[list[str]]:
    """Lists of texts of about so many characters: long documents must not fill the memory a thousand at a time."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
