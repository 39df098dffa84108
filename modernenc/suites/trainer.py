"""Fine-tune an encoder on a task with transformers' Trainer, and score it on the held-out items."""

import sys
import tempfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modernenc.evaluation.cells import Curve, Findings
from modernenc.evaluation.kept import writing
from modernenc.evaluation.metrics import Predictions, scores_of
from modernenc.evaluation.models import know_mega, max_positions
from modernenc.evaluation.settings import Setting
from modernenc.suites.examples import CHOICES, CLASSES, REGRESSION, TAGS, Example
from modernenc.suites.tasks import LabelledTask

CLASSES_OF_MODELS = {
    CLASSES: AutoModelForSequenceClassification, REGRESSION: AutoModelForSequenceClassification,
    CHOICES: AutoModelForMultipleChoice, TAGS: AutoModelForTokenClassification,
}  # fmt: skip
COLLATORS = {
    CLASSES: DataCollatorWithPadding, REGRESSION: DataCollatorWithPadding, CHOICES: DataCollatorForMultipleChoice,
    TAGS: DataCollatorForTokenClassification,
}  # fmt: skip
MULTIPLE = 8
"""Batches are padded to a multiple of this many tokens: fewer shapes, for which kernels are chosen and compiled."""
PARTS = 2
"""Parts that a batch of training is computed in, each of texts of like lengths."""
FEWEST = 512
"""Tokens of a batch, with padding, below which it is computed at once: parts would take longer than what they save."""
IGNORED = -100
"""Label of tokens that no tag is predicted for."""


def fine_tune(encoder: Path, task: LabelledTask, setting: Setting, seed: int, keep: Path | None = None) -> Findings:
    """Train the encoder with a new head, and return the predictions for the held-out items.

    A task without items for training is scored with the head that the model has. `keep` is a folder to write the model to.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(seed)  # of the head's weights, and of dropout
    know_mega(encoder)
    tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
    model = _with_head(encoder, task, setting)
    limit = min(setting.max_length, tokenizer.model_max_length, max_positions(model.config))
    labels = task.labels or tuple(model.config.id2label.values())
    (train, train_cut), (dev, dev_cut) = (
        _encode(items, task.kind, labels, tokenizer, limit) for items in (task.train, task.dev)
    )
    words = [_encode_words(item, labels, tokenizer, limit)[1] for item in task.dev] if task.kind == TAGS else []
    in_order = sorted(range(len(dev)), key=lambda number: -len(dev[number]["input_ids"]))  # batches of like lengths
    best = _Best(task, labels, in_order, words, model, setting.patience, bool(keep))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _Trainer(
            model,
            _arguments(setting, seed, scratch, len(train)),
            data_collator=COLLATORS[task.kind](tokenizer, pad_to_multiple_of=MULTIPLE),
            train_dataset=train or None,  # pyright: ignore[reportArgumentType]
            eval_dataset=[dev[number] for number in in_order],  # pyright: ignore[reportArgumentType]
            compute_metrics=best.score,
            callbacks=[best],
        )
        trainer.remove_callback(ProgressCallback if sys.stderr.isatty() else PrinterCallback)  # either prints scores
        if sys.stderr.isatty():
            trainer.add_callback(QuietProgress)
        if train:
            trainer.train()
        if not (train and setting.patience):
            trainer.evaluate()
    if keep:
        model.load_state_dict(best.weights)
        with writing(keep) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    cut = train_cut + dev_cut
    note = f"{cut / (len(train) + len(dev)):.1%} of the texts are cut at {limit} tokens"
    epochs = [str(epoch + 1) for epoch in range(len(best.history))]
    curve = Curve(epochs, best.history, [0.0] * len(epochs))
    return Findings(best.predictions, (note,) if cut else (), {"score by epoch": curve})


class _Trainer(Trainer):
    """Batches of training are drawn at random, as in the papers.

    Batches of like lengths take half of the time, and cost a MiniLM 0.2 to 0.3 of its correlation on STS-B after an epoch: the
    length of a text tells there where it is from, and so its score. So a batch is computed in parts of like lengths: padded to
    their own longest text, they take less time, and the mean of their losses by their numbers of labels is that of the batch.
    """

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the mean loss of the batch."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs)
        parts = parts_of_like_lengths(inputs) if inputs["attention_mask"].numel() >= FEWEST else [inputs]
        counts = [int((part["labels"] != IGNORED).sum()) for part in parts]
        shares: list[Any] = [
            super(_Trainer, self).compute_loss(model, part) * count for part, count in zip(parts, counts, strict=True) if count
        ]
        return sum(shares) / sum(counts)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Leave out the norm that transformers 5 would compute after each step for logs that are not written."""
        return grad_norm


def parts_of_like_lengths(batch: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return `PARTS` parts of a batch, whose texts are padded to the longest of a part, in multiples of `MULTIPLE`."""
    mask = batch["attention_mask"]  # (items, tokens), or (items, choices, tokens)
    lengths, made = mask.sum(-1).reshape(len(mask), -1).amax(1), []
    for rows in lengths.argsort(stable=True).chunk(PARTS):
        used = mask[rows].reshape(-1, mask.shape[-1]).any(0).nonzero()
        first, last = int(used[0]) // MULTIPLE * MULTIPLE, -(-int(used[-1] + 1) // MULTIPLE) * MULTIPLE
        of_tokens = {name for name, x in batch.items() if x.shape[: mask.dim()] == mask.shape}
        made.append(
            {name: x[rows][..., first:last].contiguous() if name in of_tokens else x[rows] for name, x in batch.items()}
        )
    return made


class _Best(TrainerCallback):
    """Keeps the predictions of the best epoch, and ends training after some epochs without a better one."""

    def __init__(
        self,
        task: LabelledTask,
        labels: Sequence[str],
        in_order: Sequence[int],
        words: Sequence[Sequence[int]],
        model: torch.nn.Module,
        patience: int,
        keep: bool,
    ) -> None:
        self.task = task
        self.labels = labels
        self.in_order = in_order
        self.words = words
        """For tags, the number of the word that each labelled token of an item begins."""
        self.model = model
        self.patience = patience
        self.keep = keep
        self.predictions: Predictions = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.history: list[float] = []

    def score(self, output: Any) -> dict[str, float]:
        """Note the predictions if they are the best so far, and the weights if they are wanted."""
        predictions = _predictions(output.predictions, output.label_ids, self.task, self.labels, self.in_order, self.words)
        scores = scores_of(self.task.metrics, predictions)
        score = float(np.mean(list(scores.values())))
        if not self.history or score > max(self.history):
            self.predictions = predictions
            if self.keep:
                self.weights = {name: weight.detach().cpu().clone() for name, weight in self.model.state_dict().items()}
        self.history.append(score)
        return scores

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop when the last epochs were no better."""
        since = len(self.history) - 1 - self.history.index(max(self.history))
        control.should_training_stop = control.should_training_stop or bool(self.patience and since >= self.patience)


class QuietProgress(ProgressCallback):
    """A progress bar without the scores, which the table has."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Print nothing."""


def _with_head(encoder: Path, task: LabelledTask, setting: Setting) -> Any:
    """Load the model with the settings' values in its configuration, and with a new head if it is to be trained."""
    kind = CLASSES_OF_MODELS[task.kind]
    # On a CPU the backward pass of torch's attention takes a third of the time of a step of short texts.
    options: Any = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    options |= {"dtype": torch.float32, "trust_remote_code": False}  # whatever they were saved as: training updates them
    if not task.train:
        return kind.from_pretrained(encoder, **options)
    config = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
    for key, value in setting.model.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: number for number, label in enumerate(task.labels)}
    elif task.kind == REGRESSION:
        config.num_labels, config.problem_type = 1, "regression"
    model = kind.from_pretrained(encoder, config=config, ignore_mismatched_sizes=True, **options)
    if hasattr(model, "classifier"):  # which a model of another task has already
        model.classifier.load_state_dict(kind.from_config(config).classifier.state_dict())
    return model


def _arguments(setting: Setting, seed: int, scratch: str, items: int) -> TrainingArguments:
    steps = -(-items // setting.batch_size) * setting.epochs
    return TrainingArguments(
        scratch,
        seed=seed,
        per_device_train_batch_size=setting.batch_size,
        per_device_eval_batch_size=max(32, setting.batch_size),
        num_train_epochs=setting.epochs,
        learning_rate=setting.lr,
        weight_decay=setting.weight_decay / setting.lr,
        lr_scheduler_type=setting.schedule,
        warmup_steps=round(setting.warmup * steps),
        max_grad_norm=setting.max_grad_norm,
        adam_beta1=setting.betas[0],
        adam_beta2=setting.betas[1],
        adam_epsilon=setting.eps,
        bf16=setting.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="epoch" if setting.patience else "no",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
    )


def _encode(
    items: Sequence[Example], kind: str, labels: Sequence[str], tokenizer: Any, limit: int
) -> tuple[list[dict[str, Any]], int]:
    """Tokenize items as a collator wants them, each with its `labels`; return with them how many texts are cut."""
    if not items:
        return [], 0
    if kind == TAGS:
        coded = [_encode_words(item, labels, tokenizer, limit) for item in items]
        return [one for one, _, _ in coded], sum(cut for _, _, cut in coded)
    if kind == CHOICES:
        tokenizer.truncation_side = "left"  # what is nearest to the endings is kept
        counts = [len(item.texts) - 1 for item in items]
        pairs = [(item.texts[0], ending) for item in items for ending in item.texts[1:]]
        encoded = tokenizer([one for one, _ in pairs], [two for _, two in pairs], truncation="longest_first", max_length=limit)
        starts = [0, *accumulate(counts)]
        cut = [bool(one.overflowing) for one in encoded.encodings]
        examples = [
            {**{key: encoded[key][start : start + count] for key in encoded}, "labels": item.label}
            for item, start, count in zip(items, starts, counts, strict=False)
        ]
        return examples, sum(any(cut[start : start + count]) for start, count in zip(starts, counts, strict=False))
    encoded = tokenizer(
        *(list(texts) for texts in zip(*(item.texts for item in items), strict=True)), truncation=True, max_length=limit
    )
    number_of = {label: number for number, label in enumerate(labels)}
    examples = [
        {**{key: encoded[key][at] for key in encoded}, "labels": item.label if kind == REGRESSION else number_of[item.label]}
        for at, item in enumerate(items)
    ]
    return examples, sum(bool(one.overflowing) for one in encoded.encodings)


def _encode_words(item: Example, labels: Sequence[str], tokenizer: Any, limit: int) -> tuple[dict[str, Any], list[int], bool]:
    """Tokenize words that stand apart by spaces, as text has them; the first token of each has the word's tag.

    Returns with it the numbers of the words that have a token, which not all need to have, and whether the text is cut.
    """
    starts = [0, *accumulate(len(word) + 1 for word in item.texts)]
    encoded = tokenizer(" ".join(item.texts), truncation=True, max_length=limit, return_offsets_mapping=True)
    tags, words = [], []
    for start, end in encoded.pop("offset_mapping"):
        word = bisect_right(starts, end - 1) - 1 if end > start else -1
        first = word >= 0 and word not in words[-1:]
        tags.append(labels.index(item.label[word]) if first else IGNORED)
        words += [word] if first else []
    return {**encoded, "labels": tags}, words, bool(encoded.encodings[0].overflowing)


def _predictions(
    logits: Any,
    targets: Any,
    task: LabelledTask,
    labels: Sequence[str],
    in_order: Sequence[int],
    words: Sequence[Sequence[int]],
) -> Predictions:
    """Return predictions in the order of the task's items, as numbers of labels; of tags, the entities that are right."""
    numbers = np.argsort(np.array(in_order))
    logits = (logits[0] if isinstance(logits, tuple) else logits)[numbers]
    if task.kind == REGRESSION:
        return {"labels": [item.label for item in task.dev], "predictions": logits.reshape(-1).astype(float).tolist()}
    if task.kind == CHOICES:
        return {"labels": [item.label for item in task.dev], "predictions": logits.argmax(-1).tolist()}
    if task.kind == CLASSES:
        groups = {"groups": [item.group for item in task.dev]} if task.dev[0].group else {}
        return {"labels": [labels.index(item.label) for item in task.dev], "predictions": logits.argmax(-1).tolist(), **groups}
    counts = []
    for item, best, target, mine in zip(task.dev, logits.argmax(-1), targets[numbers], words, strict=True):
        tags = ["O"] * len(item.label)
        for word, number in zip(mine, best[target != IGNORED], strict=True):
            tags[word] = str(labels[number])
        counts.append(_entity_counts(item.label, tags))
    return {"counts": counts}


def _entity_counts(true: Sequence[str], predicted: Sequence[str]) -> list[int]:
    """Return the numbers of entities that are right, predicted, and true."""
    from seqeval.metrics.sequence_labeling import get_entities

    found, there = set(get_entities(list(predicted))), set(get_entities(list(true)))
    return [len(found & there), len(found), len(there)]
