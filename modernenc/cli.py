"""The command line of Hydra programs: a user's mistake becomes one clear line instead of a traceback."""

import atexit
import errno
import itertools
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modernenc.config import CONF_DIR, RECIPES_DIR, RENAMED, Run
from modernenc.exit_codes import MISTAKE, STOP_SIGNALS, STOPPED, UNSTABLE
from modernenc.quoting import quote_values
from modernenc.saved_config import load, own_modules, register_parent, trust

Config = TypeVar("Config")

_NOT_OF_A_RUN = ("corpus", "evaluate")
"""Folders of conf/ with parts of other commands' configurations."""
_ALLOW_CODE = "--allow-code"
_TRACEBACK = "HYDRA_FULL_ERROR"
_AGAIN_S = 0.1
"""Seconds after which a signal that met an error is sent again."""
_KINDS = {"Float": "a number", "Integer": "a whole number", "bool": "true or false"}
"""OmegaConf's names of types as messages give them."""
_FIELDS = {"from": "branch_from"}
"""Keys of the command line that are keywords of Python, each with the name of its field."""


@dataclass
class Outcome:
    """How one run of a sweep ended."""

    overrides: list[str]
    """Its settings, as KEY=VALUE."""
    result: str = ""
    """What the job returned."""
    error: str = ""
    """Why it failed, in one line."""


def run(
    schema: type[Config],
    groups: tuple[str, ...],
    config_name: str,
    job: Callable[[Config], str | None],
    after_sweep: Callable[[list[Outcome], Path], None] | None = None,
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line, and call `job` with the typed result.

    `groups` must be chosen with `+group=NAME`. Mistakes end the process with status 2 and one line; HYDRA_FULL_ERROR=1 shows
    where they arose. With `after_sweep`, a value that fails under --multirun does not keep the others from being run, and
    `after_sweep` gets all outcomes and the folder of the sweep; the status is then 1.
    """
    outcomes: list[Outcome] = []
    folder = Path()
    take_allowed_code()
    if {"--help", "-h"} & set(sys.argv):  # Hydra's own takes seconds: it copies all recipes for each group
        print(help_text(groups if schema is not Run else [group for group in parts() if group not in _NOT_OF_A_RUN]))
        return
    verbose = os.environ.get(_TRACEBACK) == "1"
    os.environ[_TRACEBACK] = "1"  # so that Hydra raises errors instead of printing several lines

    def main(cfg: DictConfig) -> None:
        if not verbose:
            os.environ.pop(_TRACEBACK, None)
        hydra_config = HydraConfig.get()
        outcome = Outcome(list(hydra_config.overrides.task))
        try:
            with one_line_errors(verbose):  # Hydra would report the job's errors in its own way
                outcome.result = job(to_schema(cfg, schema, groups)) or ""
        except SystemExit as ended:
            if hydra_config.mode != RunMode.MULTIRUN or after_sweep is None or ended.code not in (MISTAKE, UNSTABLE):
                raise
            outcome.error = _message(ended.__context__) if ended.__context__ else f"ended with status {ended.code}"
        if hydra_config.mode == RunMode.MULTIRUN:
            nonlocal folder
            outcomes.append(outcome)
            folder = Path(hydra_config.sweep.dir)

    with one_line_errors(verbose, composing=True):
        if config_name == "train" and (parent := _branch_without_recipe(sys.argv)):
            register_parent(load(parent.parent.parent))
            groups, config_name = (), "branch"
        for flag, argument in itertools.pairwise(sys.argv):
            _check_not_renamed(argument.partition("=")[0].lstrip("+~"))
            if "=" not in argument and not argument.startswith(("-", "~")) and not flag.startswith("-"):
                raise ValueError(f"{argument}: expected KEY=VALUE, +KEY=VALUE or ~KEY")
        sys.argv[1:] = quote_arguments(sys.argv[1:])
        try:
            hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base="1.3")(main)()
        except ConfigCompositionException as error:
            _check_composed(schema, f"{error}: {error.__cause__}")
            raise
    if outcomes and after_sweep:
        after_sweep(outcomes, folder)
        if any(outcome.error for outcome in outcomes):
            raise SystemExit(1)


class one_line_errors:
    """End the process with one line for a mistake of the user's, unless `verbose`."""

    def __init__(self, verbose: bool | None = None, composing: bool = False) -> None:
        self.verbose = os.environ.get(_TRACEBACK) == "1" if verbose is None else verbose
        self.composing = composing

    def __enter__(self) -> None:
        """Enter the context."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Turn a mistake into one line on stderr and status 2."""
        mistakes = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)
        if self.composing and isinstance(error, RecursionError):
            error = ValueError("the defaults of a recipe lead back to itself; give it a name that no shipped recipe has")
        if isinstance(error, mistakes) and not self.verbose:
            rank = os.environ.get("RANK", "0")
            print(f"error{'' if rank == '0' else f' on rank {rank}'}: {_message(error)}", file=sys.stderr)
            sys.stderr.flush()
            raise SystemExit(MISTAKE) from None


def end_if_stopped(go_on: str) -> None:
    """From now on, end the process when it is asked to stop and no step is under way, so that there is nothing to save.

    While it trains, a run has handlers of its own. `go_on` tells the user what to do next.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if sys.exc_info()[0] is not None:  # an error is ending the process, and says more, or a library handles one of its own
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            atexit.register(again.cancel)
            return
        print(f"{signal.Signals(number).name} while no step was under way: nothing was lost; {go_on}", file=sys.stderr)
        raise SystemExit(STOPPED)

    for number in STOP_SIGNALS:
        signal.signal(number, end)


def take_allowed_code() -> None:
    """Take each `--allow-code MODULE` off the command line, and let saved configurations name code of these modules."""
    while _ALLOW_CODE in sys.argv:
        at = sys.argv.index(_ALLOW_CODE)
        trust(sys.argv[at + 1 : at + 2])
        del sys.argv[at : at + 2]


def _branch_without_recipe(arguments: list[str]) -> Path | None:
    """Return the checkpoint that a command line branches from without a recipe of its own, if it does.

    Raises FileNotFoundError if there is no such checkpoint.
    """
    parents = [argument.partition("=")[2] for argument in arguments if argument.startswith("+from=")]
    if not parents or any(argument.startswith("+recipe=") for argument in arguments):
        return None
    parent = Path(parents[-1]).resolve()
    if parent.suffix != ".ckpt" or not parent.is_file():
        raise FileNotFoundError(f"+from={parents[-1]}: no checkpoint; name one of RUN_DIR/checkpoints/*.ckpt")
    return parent


def checkpoint_argument(path: Path) -> str:
    """Return a checkpoint as a command line can name it: its path, or a placeholder for one in a run folder."""
    return shlex.quote(str(path)) if path.suffix == ".ckpt" else f"{shlex.quote(str(path))}/checkpoints/NAME.ckpt"


def _message(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        what = f"{error.filename} could not be written" if error.filename else "a file could not be written"
        text = f"{what}: No space left on device; make room, then give the command again, or resume the run"
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        text += f": {error.__cause__}"
    text = text.partition("\nConfig search path")[0]
    text = "\n".join(line for line in text.splitlines() if not line.strip().startswith(("object_type", "reference_type")))
    return _in_our_words(" ".join(text.split()))


def _in_our_words(text: str) -> str:
    """Return a message of Hydra's or OmegaConf's about a value as we write such messages; any other as it is."""
    if several := re.match(r"Ambiguous value for argument '(.*?)' 1\. ", text):
        as_text = shlex.quote(several[1].replace("=", '="', 1) + '"')
        return f"{several[1]}: one value, or, with --multirun, several? write {as_text} or add --multirun"
    if wrong := re.search(
        r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+).* full_key: ([\w.]+)", text
    ):
        value, kind, key = wrong.groups()
        source = re.search(r"interpolation '\$\{([\w.]+)\}'", text)
        return f"{source[1] if source else key}={value}: expected {_KINDS.get(kind, kind)}"
    return text


def help_text(groups: Iterable[str]) -> str:
    """Return the docstring of the module that runs, and the parts to choose from."""
    lines = [sys.modules["__main__"].__doc__ or "", "Parts, chosen with KEY=NAME, or +KEY=NAME where there is none yet:"]
    lines += [f"  {group}: {', '.join(names)}" for group, names in parts().items() if group in groups]
    schema = "data_prep" if "corpus" in groups else "modernenc"
    return "\n".join([*lines, f"Every key is explained in {schema}/config.py; --cfg job shows the composed configuration."])


def quote_arguments(arguments: Iterable[str]) -> list[str]:
    """Return arguments that Hydra can parse; the choice of a part is always text, and so has quotes if it were a number."""
    groups = parts()

    def quote(argument: str) -> str:
        key, equals, value = argument.partition("=")
        is_choice = equals and key.lstrip("+").partition("@")[0] in groups and "'" not in value and '"' not in value
        return f"{key}='{value}'" if is_choice and re.fullmatch(r"[\d.+-][\w.+-]*|true|false|null|nan|inf", value) else argument

    return quote_values([quote(argument) for argument in arguments])


def parts() -> dict[str, list[str]]:
    """Return the names of the shipped options by group."""
    folders = {"recipe": RECIPES_DIR, **{path.name: path for path in sorted(CONF_DIR.iterdir()) if path.is_dir()}}
    return {group: sorted(path.stem for path in folder.glob("*.yaml")) for group, folder in folders.items()}


def to_schema(cfg: DictConfig, schema: type[Config], groups: tuple[str, ...]) -> Config:
    """Return the composed configuration as an object of `schema`; ValueError names what is missing."""
    choices = HydraConfig.get().runtime.choices
    for group in groups:
        if group not in choices:
            known = sorted(hydra_options(group))
            raise ValueError(f"no {group} chosen; add +{group}=NAME, with one of: {', '.join(known)}")
    with open_dict(cfg):
        for said, field in _FIELDS.items():
            if said in cfg:
                cfg[field] = cfg.pop(said)
    _check_keys(schema, OmegaConf.to_container(cfg, resolve=False), "")
    missing = OmegaConf.missing_keys(cfg)
    cfg = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(schema), cfg))
    missing = sorted(missing | OmegaConf.missing_keys(cfg))
    if missing:
        where = f"in the {groups[0]} or on the command line" if groups else "on the command line"
        raise ValueError(f"{', '.join(missing)}: no value; set it {where}")
    OmegaConf.resolve(cfg)
    composed = cast(Config, OmegaConf.to_object(cfg))
    if isinstance(composed, Run):
        trust(own_modules(composed))  # the user named them
    return composed


def recipe(name: str) -> Run:
    """Return a shipped recipe other than the one on the command line; ValueError if there is none of this name."""
    if name not in hydra_options("recipe"):
        raise ValueError(f"recipe {name}: there is none; there are {', '.join(sorted(hydra_options('recipe')))}")
    cfg = hydra.compose("train", [f"+recipe={name}"])
    with open_dict(cfg):
        cfg["recipe"] = name
    return to_schema(cfg, Run, ())


def is_given(key: str) -> bool:
    """Return whether the command line sets a key."""
    return any(override.partition("=")[0].lstrip("+") == key for override in HydraConfig.get().overrides.task)


def check_key(key: str) -> None:
    """Raise ValueError for a key that no run has, naming those there are in its place."""
    _check_keys(Run, _nest(key), "")


def _check_keys(schema: Any, content: Any, prefix: str) -> None:
    """Raise ValueError for a key that the schema does not have, because Hydra itself accepts any `+key=value`."""
    if not isinstance(content, dict):
        return
    if get_origin(schema) is dict:
        for key, value in content.items():
            _check_keys(get_args(schema)[1], value, f"{prefix}{key}.")
    elif is_dataclass(schema):
        fields = get_type_hints(schema)
        for key, value in content.items():
            if key not in fields:
                _check_not_renamed(f"{prefix}{key}")
                raise ValueError(f"{prefix}{key}: unknown key; there are {', '.join(fields)}")
            _check_keys(fields[key], value, f"{prefix}{key}.")


def _check_composed(schema: Any, message: str) -> None:
    """Raise ValueError in place of a message of Hydra's about an unknown key, or about a file that names no package."""
    if set_key := re.match(r"Could not override '([\w.]+)'\.\s+To append to your config", message):
        key = set_key[1]
        _check_keys(schema, _nest(key), "")
        raise ValueError(
            f"{key}: unknown key; --cfg job shows those there are, and +{key}=VALUE adds one, as a source to a mix"
        )
    in_file = re.match(r"In '((\w+)/\S+)':.*full_key: ([\w.]+)", message, re.DOTALL)
    if in_file and in_file[3] == in_file[2]:
        raise ValueError(f"{in_file[1]}.yaml: its first line must be: # @package _global_")
    if in_file:
        _check_not_renamed(in_file[3])
        _check_keys(schema, _nest(in_file[3]), f"{in_file[1]}.yaml: ")


def _nest(key: str) -> Any:
    """Return a configuration that sets one dotted key."""
    first, _, rest = key.partition(".")
    return {first: _nest(rest) if rest else None}


def _check_not_renamed(key: str) -> None:
    """Raise ValueError with the present name of a key that has been renamed."""
    if key in RENAMED:
        raise ValueError(f"{key} is now called {RENAMED[key]}: use that name")


def hydra_options(group: str) -> list[str]:
    """Return the names of the options of a group."""
    from hydra.core.global_hydra import GlobalHydra

    return GlobalHydra.instance().config_loader().get_group_options(group)
