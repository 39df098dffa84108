"""Training by sentence-transformers' trainer, of models with one vector for each text or for each token."""

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import PrinterCallback, ProgressCallback

from modernenc.suites.search import SearchSettings
from modernenc.suites.trainer import QuietProgress


class _Trainer(SentenceTransformerTrainer):
    """A trainer that gathers nothing for the card of a model, which takes time and a progress bar of its own."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none."""


def fit(
    model: SentenceTransformer,
    data: Dataset,
    loss: torch.nn.Module,
    setting: SearchSettings,
    seed: int,
    sampler: str,
    collator: Any = None,
) -> None:
    """Train a model by a loss. `sampler` is the name of sentence-transformers' sampler of batches."""
    steps = -(-len(data) // setting.batch_size) * setting.epochs
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _Trainer(
            model,
            SentenceTransformerTrainingArguments(
                scratch,
                seed=seed,
                per_device_train_batch_size=setting.batch_size,
                num_train_epochs=setting.epochs,
                learning_rate=setting.lr[0],
                warmup_steps=round(setting.warmup * steps),
                batch_sampler=sampler,
                bf16=setting.precision == "bf16",
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=not sys.stderr.isatty(),
            ),
            train_dataset=data,
            loss=loss,
            data_collator=collator,
        )
        trainer.remove_callback(ProgressCallback if sys.stderr.isatty() else PrinterCallback)  # either prints losses
        if sys.stderr.isatty():
            trainer.add_callback(QuietProgress)
        trainer.train()
