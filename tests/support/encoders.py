"""A small encoder as a Hugging Face folder, and tasks that it can learn in a second."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from support.corpora import WORDS

ROLES = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
LEARN = [
    "lr=1e-2", "weight_decay=0", "epochs=6", "batch_size=16", "max_length=32", "precision=fp32", "max_grad_norm=1",
    "model={mlp_dropout: 0}",
]  # fmt: skip
"""Settings under which it does."""


def write_encoder(folder: Path, seed: int = 0, max_position: int = 64, words: Sequence[str] = WORDS) -> Path:
    """Write a ModernBERT of two layers with random weights, and a tokenizer of whole words."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*ROLES, *words, *map(str, range(10))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", special_tokens=specials)
    names = {f"{role.strip('[]').lower()}_token": role for role in ROLES}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_position, model_input_names=["input_ids", "attention_mask"], **names
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = ModernBertConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=max_position, local_attention=16, classifier_pooling="mean", pad_token_id=0, cls_token_id=1,
        sep_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    ModernBertForMaskedLM(config).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[list[str]]:
    """Return sentences of 3 to 9 words."""
    rng = np.random.default_rng(seed)
    return [rng.choice(WORDS, int(rng.integers(3, 10))).tolist() for _ in range(count)]


def write_rows(path: Path, header: list[str], rows: list[list[str]]) -> None:
    """Write a table as GLUE has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))


def write_tasks(root: Path, count: int = 200) -> Path:
    """Write a task of each kind: whether a fox is there, how many foxes, which ending is about a fox, and which words are."""
    for split, seed, size in (("train", 0, count), ("dev", 1, count // 2)):
        words = sentences(size, seed)
        texts = [" ".join(one) for one in words]
        foxes = [one.count("fox") for one in words]
        write_rows(
            root / "fox" / f"{split}.tsv",
            ["label", "sentence"],
            [["yes" if n else "no", t] for n, t in zip(foxes, texts, strict=True)],
        )
        rows = [[f"{float(n):.1f}", text, "fox"] for n, text in zip(foxes, texts, strict=True)]
        write_rows(root / "foxes" / f"{split}.tsv", ["label", "sentence1", "sentence2"], rows)
        lines = []
        for number, one in enumerate(words):
            endings = ["lazy dog", "quick wizards", "mix quartz"]
            endings.insert(number % 4, "brown fox")
            lines.append(json.dumps({"question": " ".join(one), "choices": endings, "label": number % 4}))
        (root / "ending").mkdir(exist_ok=True)
        (root / "ending" / f"{split}.jsonl").write_text("\n".join(lines))
        tagged = "\n\n".join(
            "\n".join(f"{word} X {'B-ANIMAL' if word in ('fox', 'dog') else 'O'}" for word in one) for one in words
        )
        (root / "tags").mkdir(exist_ok=True)
        (root / "tags" / f"{split}.conll").write_text(tagged + "\n")
    return root
