"""The tokenizer of a new corpus: trained on its text, or given by the user; and what it does to the text."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from modernenc.data.tokenizer import ROLE_NAMES, load_tokenizer

_LETTERS = r"\p{L}\p{M}" + "\u200c\u200d"  # joiners occur within words of Indic and Persian scripts
_PIECES = rf"'(?:[sdmt]|ll|ve|re)| ?[{_LETTERS}]+| ?\p{{N}}+| ?[^\s\p{{N}}{_LETTERS}]+|\s+(?!\S)|\s+"
"""GPT-2's pattern of words, with marks counted as letters; without them a Hindi word would be split at each vowel sign."""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, which can encode every text.

    It has `vocab_size` entries, or fewer when the texts do not contain enough pairs. Texts are normalised to NFC first, so
    that a word has one spelling.
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
    # Users of fill-mask write "a [MASK] b", but the token that the mask stands for is " word": the mask takes in the space.
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True)])
    return tokenizer


def load_given(path: Path) -> Tokenizer:
    """Load the tokenizer that the user gave; raises FileNotFoundError or ValueError when the file is not a tokenizer."""
    key = f"tokenizer.file={path}"
    if not path.is_file():
        raise FileNotFoundError(f"{key} does not exist; give the path of a tokenizer.json")
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or "model" not in content:
            raise ValueError("it has no model")
        return load_tokenizer(path)
    except Exception as error:  # `tokenizers` raises no narrower class
        raise ValueError(
            f"{key} is not a tokenizer.json ({' '.join(str(error).split())}); a SentencePiece model, or a folder of "
            "transformers, becomes one by AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer.json without truncation and padding, which would otherwise end up in exported models."""
    unfinished = path.with_suffix(".tmp")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(unfinished))
    unfinished.replace(path)


def normalized(tokenizer: Tokenizer, text: str) -> str:
    """Return a text as the tokenizer's normaliser changes it before encoding."""
    return tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text


def changed_characters(text: str, normal: str) -> int:
    """Return the number of characters of `text` in words that do not occur in `normal`, its normalised form."""
    if text == normal:
        return 0
    kept = set(normal.split())
    return sum(len(word) for word in text.split() if word not in kept)


def batches(texts: Iterable[str], characters: int = 1 << 20) -> Iterator[list[str]]:
    """Group texts into lists of about `characters` characters each, so that long texts are not encoded all at once."""
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
