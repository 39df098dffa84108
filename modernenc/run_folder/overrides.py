"""Which settings a resume or a rollback may change."""

from pathlib import Path

from modernenc.cli import check_key, checkpoint_argument
from modernenc.config import is_identity, is_resumable, resumable_keys


def check_overrides(path: Path, overrides: list[str], rollback: bool) -> None:
    """Raise ValueError for a setting that cannot be changed."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        check_key(key)
        if rollback and is_identity(key):
            raise ValueError(
                f"{override}: a rollback stays in its run; branch with python -m modernenc.train +recipe=NAME "
                f"+from={checkpoint_argument(path)}"
            )
        if not rollback and not (equals and is_resumable(key)):
            raise ValueError(
                f"{override}: a resumed run may change {', '.join(resumable_keys())} only; anything else makes "
                "another run: add --rollback, or branch with python -m modernenc.train +recipe=NAME "
                f"+from={checkpoint_argument(path)}"
            )
    if rollback and path.suffix != ".ckpt":
        raise ValueError(f"{path}: name the checkpoint to go back to, one of {path}/checkpoints/*.ckpt")
