"""The tokenizer of a new corpus: trained on its text, or given by the user; and what it does to the text."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from modernenc.data.tokenizer import ROLE_NAMES, load_tokenizer

_LETTERS = r"\p{L}\p{M}" + "\u200c\u200d"  # joiners occur within words of Indic and Persian scripts
_PIECES = rf"'(?:[sdmt]|ll|ve|re)| ?[{_LETTERS}]+| ?\p{{N}}+| ?[^\s\p{{N}}{_LETTERS}]+|\s+(?!\S)|\s+"
"""GPT-2's pattern of words, with marks counted as letters; without them a Hindi word would be split at each vowel sign."""
_BATCH_CHARACTERS = 1 << 20


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
    """Write a tokenizer.json, whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    tokenizer.save(str(unfinished))
    unfinished.replace(path)


def text_size(tokenizer: Tokenizer, text: str) -> dict[str, int]:
    """Count the bytes and words of a text as the tokenizer's normaliser changes it, and the characters of the original.

    `changed_characters` are those of the original in words that do not occur in the normalised text.
    """
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    words = normal.split()
    kept = set(words)
    changed = 0 if text == normal else sum(len(word) for word in text.split() if word not in kept)
    return {"bytes": len(normal.encode()), "words": len(words), "characters": len(text), "changed_characters": changed}


def token_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Yield the token ids of each text, without special tokens around them."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:  # so that long texts are not encoded all at once
            yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
            batch, size = [], 0
    yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
