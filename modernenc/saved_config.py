"""Configurations as values: saved in a run folder, read back, changed, compared.

A run folder or a checkpoint may come from anybody. What is read from one is values only, and names no code but that of this
package, or of modules that the user trusts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from modernenc import ranges
from modernenc.atomic import write_text
from modernenc.config import CONF_DIR, Run
from modernenc.quoting import parse_assignments

CONFIG = "config.yaml"
"""Name of the file in a run folder that holds the resolved configuration."""
_trusted: set[str] = set()
"""Modules that the user names on the command line or in a recipe."""


@cache
def shipped(group: str) -> frozenset[str]:
    """Return the classes or functions among the options of a group in `conf`, which any saved configuration may name."""
    options = (yaml.safe_load(path.read_text()) for path in (CONF_DIR / group).glob("*.yaml"))
    return frozenset(filter(None, (option.get("_target_") for option in options)))


def register_parent(run: Run) -> None:
    """Make the configuration of a run known to Hydra as `branch`, for a branch that changes some of it and keeps the rest."""
    values = plain(run)
    for key in ("run_dir", "branch_from", "rollbacks", "smoke_test"):
        del values[key]
    values["logger"] |= {"run_id": "", "group": ""}
    values["data"]["from_corpus"] = []
    train = yaml.safe_load((CONF_DIR / "train.yaml").read_text())
    defaults = ["run_schema", "_self_", {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    node = {"defaults": defaults, "run_dir": train["run_dir"], "hydra": train["hydra"], **values}
    ConfigStore.instance().store(name="branch", node=OmegaConf.create(node))


def plain(run: Run) -> dict[str, Any]:
    """Return a run's configuration as plain values."""
    return asdict(run)


def trust(modules: Iterable[str]) -> None:
    """Let saved configurations name classes and functions of these modules."""
    _trusted.update(modules)


def own_modules(run: Run) -> list[str]:
    """Return the modules whose code a run names and that saved configurations may not name by themselves."""
    return sorted({target.rpartition(".")[0] for group, target in _targets(plain(run)) if target not in shipped(group)})


def _targets(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for group in ("backbone", "optim"):
        node = values.get(group)
        if isinstance(node, dict):
            yield group, str(node.get("_target_", ""))


def _check_inert(values: Any, key: str = "") -> None:
    """Raise ValueError for a saved value that would be more than a value: an interpolation, which reads the environment."""
    if isinstance(values, dict):
        for name, value in values.items():
            _check_inert(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            _check_inert(value, key)
    elif isinstance(values, str) and "${" in values:
        raise ValueError(f"{key}={values}: a saved configuration holds values only, and this one would be resolved again")


def from_plain(values: Any, run_dir: str = "") -> Run:
    """Return the run that saved values describe, in another folder if `run_dir` is given.

    Raises ValueError for values that would run code which is neither of this package nor trusted: a run folder or a checkpoint
    may come from anybody.
    """
    _check_inert(values)
    for group, target in _targets(values):
        module = target.rpartition(".")[0]
        if target not in shipped(group) and module not in _trusted:
            raise ValueError(
                f"{group}._target_={target}: {module} holds no code that a saved configuration may name; if you trust it, and "
                f"the folder that names it, add --allow-code {module}"
            )
    merged = OmegaConf.merge(OmegaConf.structured(Run), values, {"run_dir": run_dir} if run_dir else {})
    run = cast(Run, OmegaConf.to_object(merged))
    ranges.check("", Run, run)
    return run


def apply_overrides(run: Run, overrides: list[str]) -> Run:
    """Return the run with `KEY=VALUE` settings changed."""
    merged = OmegaConf.structured(run)
    for key, value in parse_assignments(overrides):
        if value == "???":
            raise ValueError(f"{key}=???: expected a value")
        try:
            change = OmegaConf.create()
            OmegaConf.update(change, key, value)
            merged = OmegaConf.merge(merged, change)
        except OmegaConfBaseException as error:
            raise ValueError(f"{key}={value}: {str(error).partition(chr(10))[0]}") from error
    return cast(Run, OmegaConf.to_object(merged))


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each key at which two plain configurations differ, with the old and the new value; None means absent."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def save(run: Run) -> None:
    """Write the resolved configuration into the run folder, whole or not at all."""
    write_text(Path(run.run_dir) / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(run)))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which YAML's own loader would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; ConstructorError for a key that occurs twice."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load(run_dir: Path) -> Run:
    """Return the configuration that a run was started with.

    Raises FileNotFoundError if the folder holds none; ValueError, naming the file, if it is damaged, names code that is not
    trusted, or was written by another version, with other keys.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        give = run_dir / "latest" if (run_dir / "latest" / CONFIG).is_file() else "a folder that modernenc.train made"
        raise FileNotFoundError(f"{run_dir} holds no run: {CONFIG} is missing; give {give}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
        if not isinstance(values, dict):
            raise ValueError("it holds no mapping of keys to values")
        run = from_plain(values)
        if lost := next((key for key, there, _ in differences(values, plain(run)) if there is None), ""):
            raise ValueError(f"{lost} is missing: a part of the file is lost, or another version of modernenc wrote it")
        return run
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        if not isinstance(error, ConfigKeyError):
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        raise ValueError(
            f"{path} was written by another version of modernenc: {error.key} is no key here; go on with the version that "
            "wrote it"
        ) from error
