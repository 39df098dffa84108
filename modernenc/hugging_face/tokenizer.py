"""A corpus's tokenizer as one of transformers."""

from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from modernenc.data.blocks import Corpus


def pretrained_tokenizer(corpus: Corpus, max_position: int) -> Any:
    """Build a `PreTrainedTokenizerFast` that puts cls and sep around texts, as training does."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    tokenizer.no_truncation()  # a given file may cut or pad texts, which only transformers itself would ignore
    tokenizer.no_padding()
    names = {role: tokenizer.id_to_token(number) for role, number in vars(corpus.roles).items()}
    cls, sep = names["cls"], names["sep"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(cls, corpus.roles.cls), (sep, corpus.roles.sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_position,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{role}_token": name for role, name in names.items()},
    )
