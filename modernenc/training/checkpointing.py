"""Save checkpoints when they are due."""

import time
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L

from modernenc.config import Run
from modernenc.run_folder.checkpoints import UNSHARDED, CheckpointWriter, RankShard, name_at_end, name_at_step
from modernenc.training.module import Pretraining
from modernenc.training.snapshot import capture


class Checkpointing(L.Callback):
    """Saves at each phase boundary, between them by tokens and by time, and on a request to stop; always after a whole step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._time_of_save = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and the writer: all ranks know the run folder only since they synchronised."""
        self._writer = CheckpointWriter(Path(cast(Pretraining, pl_module).run.run_dir), self.run.checkpoint.keep_last)
        self._time_of_save = time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Request a save on the first rank when one is due by its clock; the ranks learn of it in the step."""
        every_s = self.run.checkpoint.every_minutes * 60
        due = 0 < every_s <= time.monotonic() - self._time_of_save
        cast(Pretraining, pl_module).save_requested = trainer.is_global_zero and due

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of a phase, before a stop, and as `checkpoint.every_tokens` and `every_minutes` say.

        Raises OSError if the last checkpoint could not be written, and ValueError if its weights were not finite.
        """
        module = cast(Pretraining, pl_module)
        self._writer.check()
        phase = module.finished_phase
        due = phase or module.stop_all_ranks or module.save_all_ranks or module.crossed(self.run.checkpoint.every_tokens)
        if module.abort_all_ranks or not due:
            return
        sharded = self.run.checkpoint.distributed and module.is_split
        content = capture(module, sharded)
        shard = UNSHARDED
        if sharded:
            shard = RankShard(trainer.global_rank, trainer.world_size, save=trainer.strategy.broadcast(time.time_ns()))
        if sharded or trainer.is_global_zero:
            name = name_at_end(phase) if phase else name_at_step(module.step)
            self._writer.save(content, name, shard, module.unstable_since)
        self._time_of_save = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait on all ranks until everything is on disk, because a launcher may kill the first rank once another has ended."""
        self._writer.close()
        trainer.strategy.barrier()
