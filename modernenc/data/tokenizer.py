"""The tokenizer of a corpus: loading it for text, and the ids of its special tokens."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

ROLE_NAMES = {
    "cls": ("[CLS]", "<s>", "<bos>"),
    "sep": ("[SEP]", "</s>", "<eos>"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}
"""The usual names of the special token for each role; the first is the one that a tokenizer trained here has."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer that encodes text in full and treats the literal name of a special token as text.

    Its settings of truncation and padding, which would end up in exported models, are removed.
    """
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def role_ids(tokenizer: Tokenizer, names: Mapping[str, str]) -> dict[str, int]:
    """Return the token id of each role.

    `names` gives the token of a role by its name; roles that it lacks, or leaves empty, are looked up under their usual
    names. Raises ValueError, naming the role, when the tokenizer has no such token or uses one token for two roles.
    """
    ids: dict[str, int] = {}
    for role, usual in ROLE_NAMES.items():
        candidates = (names[role],) if names.get(role) else usual
        found = [number for name in candidates if (number := tokenizer.token_to_id(name)) is not None]
        if not found:
            specials = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
            raise ValueError(
                f"tokenizer.roles.{role}: the tokenizer has none of {', '.join(candidates)}; name its {role} token, as in "
                f"'tokenizer.roles.{role}=\"TOKEN\"'; its special tokens are {', '.join(specials) or 'none'}"
            )
        same = [other for other, number in ids.items() if number == found[0]]
        if same:
            raise ValueError(
                f"tokenizer.roles.{role} and tokenizer.roles.{same[0]} are one token, {tokenizer.id_to_token(found[0])}; "
                "name a different token for each"
            )
        ids[role] = found[0]
    return ids


def special_token_ids(tokenizer: Tokenizer, ids_by_role: Mapping[str, int]) -> list[int]:
    """Return the sorted ids of all special tokens.

    Some tokenizers write special tokens into encoded text too, such as [UNK] for a character they do not know.
    """
    added = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    return sorted({*added, *ids_by_role.values()})


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the largest id plus one, which is more than the number of tokens where ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def check_same_ids(theirs: Path, ours: Path, who: str, remedy: str = "") -> None:
    """Raise ValueError if a token of our tokenizer has another id in theirs, which may have more tokens.

    `who` is what has their tokenizer, and `remedy` what else a user can do besides preparing the text again.
    """
    old, new = (Tokenizer.from_file(str(file)).get_vocab() for file in (theirs, ours))
    if moved := sorted(token for token, number in new.items() if old.get(token) != number):
        raise ValueError(
            f"{who} has another tokenizer than {ours}: {len(moved):,} of {len(new):,} tokens have other ids, such as "
            f"{moved[0]!r}; prepare the corpus with tokenizer.file={theirs}{remedy}"
        )
