"""Settings of an evaluation: `conf/evaluate/NAME.yaml`, or a file of the user's, with changes from the command line."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Len, MinLen
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modernenc import ranges
from modernenc.config import CONF_DIR
from modernenc.frozen import frozen

FOLDER = CONF_DIR / "evaluate"
Schema = TypeVar("Schema")


@frozen
class Setting:
    """How one fine-tuning is done."""

    lr: Annotated[float, Gt(0)]
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Interval(ge=0, lt=1)]
    """Fraction by which a step at the peak learning rate shrinks the weights: fully decoupled, as in pretraining; torch's value
    is this over `lr`."""
    epochs: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)] = MISSING
    """Items a step."""
    schedule: Annotated[str, Literal["linear", "cosine"]] = MISSING
    """How the learning rate falls to 0."""
    warmup: Annotated[float, Interval(ge=0, lt=1)] = MISSING
    """Fraction of the steps in which the learning rate rises."""
    max_grad_norm: Annotated[float, Ge(0)] = MISSING
    """Norm to which gradients are clipped; 0 means that they are not."""
    betas: Annotated[list[float], Len(2, 2)] = MISSING
    eps: Annotated[float, Gt(0)] = MISSING
    max_length: Annotated[int, Ge(8)] = MISSING
    """Tokens of an item, or of a choice of it, beyond which its texts are cut; the model's own limit holds too."""
    patience: Annotated[int, Ge(0)] = MISSING
    """After how many epochs without a better score on the held-out items training ends; the best epoch is scored. With 0 all
    epochs are trained and the last one is scored."""
    precision: Annotated[str, Literal["bf16", "fp32"]] = MISSING
    model: dict[str, float] = MISSING
    """Keys of the model's configuration, such as its dropout, each with the value to give it where the model has the key."""


@frozen
class FineTuning:
    """A grid of settings for each task: every combination of learning rate, weight decay and epochs is tried."""

    lr: Annotated[list[float], MinLen(1)] = MISSING
    weight_decay: Annotated[list[float], MinLen(1)] = MISSING
    epochs: Annotated[list[int], MinLen(1)] = MISSING
    batch_size: int = MISSING
    schedule: str = MISSING
    warmup: float = MISSING
    max_grad_norm: float = MISSING
    betas: list[float] = MISSING
    eps: float = MISSING
    max_length: int = MISSING
    patience: int = MISSING
    precision: str = MISSING
    model: dict[str, float] = MISSING
    start_from: dict[str, str] = MISSING
    """For a task, the task whose fine-tuned model it begins with."""
    tasks: dict[str, Any] = MISSING
    """For a task, the values of other keys that it has in place of those above."""

    def of_task(self, task: str) -> list[Setting]:
        """Return all settings that are tried on a task."""
        own = next((values for name, values in self.tasks.items() if same_task(name, task)), {})
        values = {**vars(self), **own}
        grid = product(*(values.pop(key) for key in ("lr", "weight_decay", "epochs")))
        shared = {key: value for key, value in values.items() if key not in ("start_from", "tasks")}
        settings = [Setting(*point, **shared) for point in grid]
        for setting in settings:
            ranges.check(f"tasks.{task}", Setting, setting)
        return settings

    def source_of(self, task: str) -> str:
        """Return the task whose model a task begins with; empty where it begins with the encoder."""
        return next((source for name, source in self.start_from.items() if same_task(name, task)), "")


def same_task(one: str, other: str) -> bool:
    """Return whether two names mean the same task: SST-2 is sst2."""
    return one.lower().replace("-", "") == other.lower().replace("-", "")


def read_fine_tuning(name: str, changes: Sequence[str]) -> FineTuning:
    """Return the settings of fine-tuning; raises the errors of `read_settings`, and ValueError for an unknown key of a task."""
    settings = read_settings(FineTuning, name, changes)
    known = set(Setting.__annotations__)
    for task, values in settings.tasks.items():
        if not isinstance(values, dict):
            raise ValueError(f"--settings {name}: tasks.{task}={values}: expected keys of a setting, as tasks.{task}.lr=1e-4")
        if empty := [key for key in ("lr", "weight_decay", "epochs") if values.get(key) == []]:
            raise ValueError(f"--settings {name}: tasks.{task}.{empty[0]} is empty; expected a value or more")
        if wrong := sorted(set(values) - known):
            raise ValueError(f"--settings {name}: tasks.{task}.{wrong[0]}: unknown key; there are {', '.join(sorted(known))}")
        settings.of_task(task)
    return settings


def read_settings(schema: type[Schema], name: str, changes: Sequence[str]) -> Schema:
    """Return the settings of a shipped name or of a YAML file, changed by KEY=VALUE.

    Raises FileNotFoundError or ValueError, naming the file and the key, for what is no setting.
    """
    shipped = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{name}.yaml" if name in shipped else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"--settings {name}: no such file; the shipped settings are {', '.join(shipped)}")
    try:
        changed = OmegaConf.from_dotlist([_as_list(schema, change) for change in changes])
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path), changed)
        if missing := OmegaConf.missing_keys(merged):
            raise ValueError(f"--settings {path}: no value for {', '.join(sorted(missing))}")
        settings: Any = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--settings {path}, changed by {' '.join(changes) or 'nothing'}: {reason}") from error
    ranges.check("", schema, settings)
    return settings


def _as_list(schema: type, change: str) -> str:
    """Return a change that gives one value to a key that has a list as a list of this value."""
    key, _, value = change.partition("=")
    kind = get_type_hints(schema).get(key.rpartition(".")[2])
    return f"{key}=[{value}]" if get_origin(kind) is list and not value.startswith("[") else change
