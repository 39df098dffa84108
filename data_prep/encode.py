"""The tokenizer: trained on the corpus or given; its special tokens by role."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_prep.config import Roles

ROLE_NAMES = {
    "cls": ("[CLS]", "<s>", "<bos>"),
    "sep": ("[SEP]", "</s>", "<eos>"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}
"""Usual names of special tokens by what they are for."""
_LETTERS = r"\p{L}\p{M}" + "\u200c\u200d"  # joiners stand within words of Indic and Persian scripts
_PIECES = rf"'(?:[sdmt]|ll|ve|re)| ?[{_LETTERS}]+| ?\p{{N}}+| ?[^\s\p{{N}}{_LETTERS}]+|\s+(?!\S)|\s+"
"""GPT-2's words, whose letters take the marks that go with them: without these a word ends at each vowel sign of Hindi."""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries, or fewer when the texts have no more pairs; every text can be encoded.

    Text is put into the normal form NFC first, so that a word has one spelling.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
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
    """A tokenizer for encoding text: whole, and special tokens that occur in it literally are text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def given(path: Path) -> Tokenizer:
    """The tokenizer that a user names; FileNotFoundError or ValueError when it is none."""
    key = f"tokenizer.file={path}"
    if not path.is_file():
        raise FileNotFoundError(f"{key} does not exist; give the path of a tokenizer.json")
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or "model" not in content:
            raise ValueError("it has no model")
        return load(path)
    except Exception as error:  # `tokenizers` raises no narrower class
        raise ValueError(
            f"{key} is no tokenizer.json ({' '.join(str(error).split())}); a SentencePiece model, or a folder of transformers, "
            "becomes one by AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer.json without truncation and padding, which would follow it into what is exported."""
    unfinished = path.with_suffix(".tmp")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(unfinished))
    unfinished.replace(path)


def roles(tokenizer: Tokenizer, named: Roles) -> dict[str, int]:
    """Id of each role; ValueError, naming the role, when the tokenizer lacks it or has one token for two."""
    ids: dict[str, int] = {}
    for role, usual in ROLE_NAMES.items():
        tried = (name,) if (name := getattr(named, role)) else usual
        found = [number for name in tried if (number := tokenizer.token_to_id(name)) is not None]
        if not found:
            specials = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
            raise ValueError(
                f"tokenizer.roles.{role}: the tokenizer has none of {', '.join(tried)}; name its {role} token, as in "
                f"'tokenizer.roles.{role}=\"TOKEN\"'; its special tokens are {', '.join(specials) or 'none'}"
            )
        twice = [other for other, number in ids.items() if number == found[0]]
        if twice:
            raise ValueError(
                f"tokenizer.roles.{role} and tokenizer.roles.{twice[0]} are one token, {tokenizer.id_to_token(found[0])}; "
                "name a token of its own for each"
            )
        ids[role] = found[0]
    return ids


def special_ids(tokenizer: Tokenizer, ids_by_role: dict[str, int]) -> list[int]:
    """Ids of special tokens. Some tokenizers write them in text too, such as [UNK] for what they do not know."""
    added = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    return sorted({*added, *ids_by_role.values()})


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def normalized(tokenizer: Tokenizer, text: str) -> str:
    """The text as the tokenizer encodes it."""
    return tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text


def changed_characters(text: str, normal: str) -> int:
    """How many characters stand in words of `text` that `normal`, the same text normalized, writes otherwise."""
    if text == normal:
        return 0
    kept = set(normal.split())
    return sum(len(word) for word in text.split() if word not in kept)


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
