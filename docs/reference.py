"""Write `configuration.md`, the reference of every configuration key: `python docs/reference.py`.

The text is that of the docstrings under the fields of the schemas, so that each key is explained in one place. The files are
parsed and never imported, so nothing needs to be installed. With `--check` nothing is written, and status 1 says that the page
is not what the schemas say.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_name("configuration.md")
SCHEMAS = (
    ("modernenc", "modernenc/config.py", "Run", "A run: `python -m modernenc.train`, `plan` and `launch`."),
    ("data_prep", "data_prep/config.py", "CorpusConfig", "A corpus: `python -m data_prep`."),
    ("bench", "modernenc/bench/settings.py", "Bench", "Benchmarks: `python -m modernenc.bench`."),
)
"""Heading, file, class of the outermost keys, and what they configure."""
GROUPS = ("backbone", "optim")
"""Groups whose options are arguments of a class or function."""
KINDS = {"str": "text", "float": "number", "int": "whole number", "bool": "true or false", "Any": "part", "dict": "mapping"}
"""Types in words; a class of the file is a group."""
RANGES = {"ge": "{} or more", "gt": "more than {}", "le": "{} or less", "lt": "less than {}"}
"""Ranges that stand beside a type, `Annotated[int, Ge(1)]` or `Annotated[float, Interval(gt=0, le=1)]`, in words."""
HEAD = """# Configuration keys

Every key that a command line or a YAML file may set. `python -m modernenc.train +recipe=NAME --cfg job` prints the values of a
run. A key without a default here gets its value in `conf/` or in the recipe.

<!-- Written by docs/reference.py from the docstrings of the schemas: change those, then run `make docs`. -->
"""


class Field(NamedTuple):
    """A key of a configuration, or an argument of what a group configures."""

    name: str
    kind: ast.expr
    default: str
    """The default as Python; empty where a value must be set."""
    meaning: str


def main() -> None:
    """Write the page, or compare it."""
    text = page()
    if "--check" in sys.argv[1:]:
        sys.exit(f"{PAGE.name} is not what the schemas say: run python docs/reference.py" if PAGE.read_text() != text else 0)
    PAGE.write_text(text)


def page() -> str:
    """Return the whole page in Markdown."""
    parts = [HEAD]
    for heading, file, outermost, about in SCHEMAS:
        parts.append(f"## {heading}\n\n{about}\n\n{''.join(section(classes_of(ROOT / file), outermost, ''))}")
    parts.append("## Parts\n\nWhat a group takes, and the values of the shipped options: `backbone=NAME`, `optim=NAME`.\n")
    for group in GROUPS:
        targets: dict[str, dict[str, dict[str, str]]] = {}
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            values = dict(re.findall(r"^(\w+): *(.*?)(?: +#.*)?$", path.read_text(), re.M))
            if target := values.pop("_target_").strip('"'):  # empty where `init.source` says it
                targets.setdefault(target, {})[path.stem] = values
        parts += [table(group, target, options) for target, options in targets.items()]
    return "\n".join(parts)


def section(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> Iterator[str]:
    """Yield the keys of one class as a list, then those of the classes that it contains, each under its own heading."""
    nested = []
    for field in fields(classes[name]):
        inner = next((node.id for node in ast.walk(field.kind) if isinstance(node, ast.Name) and node.id in classes), "")
        key = f"{prefix}{field.name}"
        if inner:
            nested.append((inner, f"{key}.NAME" if ast.unparse(field.kind).startswith("dict") else key))
        default = f", default `{field.default}`" if field.default and not inner else ""
        yield f"- `{key}` ({describe_type(field.kind)}{default}){': ' * bool(field.meaning)}{field.meaning}\n"
    for inner, within in nested:
        yield f"\n### {within}\n\n{' '.join((ast.get_docstring(classes[inner]) or '').split())}\n\n"
        yield from section(classes, inner, f"{within}.")


def table(group: str, target: str, options: dict[str, dict[str, str]]) -> str:
    """Return a table of the arguments of one target, with a column for the default and one for each option, by its values."""
    file, _, name = target.rpartition(".")
    known = {field.name: field for field in arguments(ROOT / f"{file.replace('.', '/')}.py", name)}
    keys = list(dict.fromkeys(key for values in options.values() for key in values))
    keys += [key for key, field in known.items() if field.default and key not in keys]
    rows = ["| key | default |" + "".join(f" `{option}` |" for option in options), "|---" * (2 + len(options)) + "|"]
    for key in keys:
        default = known[key].default if key in known else ""
        rows.append(f"| `{group}.{key}` | {default} |" + "".join(f" {values.get(key, '')} |" for values in options.values()))
    explained = [f"- `{group}.{key}`: {known[key].meaning}" for key in keys if key in known and known[key].meaning]
    return "\n".join([f"### {name}", "", f"`_target_: {target}`", "", *rows, "", *explained, ""])


def arguments(path: Path, name: str) -> Iterator[Field]:
    """Yield what a class or function takes; a dataclass counts by its fields, as the target or as the type of an argument."""
    classes = classes_of(path)
    (target,) = (node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == name)
    if isinstance(target, ast.ClassDef):
        constructors = [node for node in target.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        if not constructors:
            yield from fields(target)
            return
        (target,) = constructors
    assert isinstance(target, ast.FunctionDef)
    taken, given = target.args, target.args.defaults
    defaults = [*[None] * (len(taken.args) - len(given)), *given, *taken.kw_defaults]
    for argument, default in zip([*taken.args, *taken.kwonlyargs], defaults, strict=True):
        kind = argument.annotation or ast.Name("Any")
        if isinstance(kind, ast.Name) and kind.id in classes:
            yield from fields(classes[kind.id])
        else:
            yield Field(argument.arg, kind, ast.unparse(default) if default else "", "")


def classes_of(path: Path) -> dict[str, ast.ClassDef]:
    """Return the classes of a file by name."""
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}


def fields(node: ast.ClassDef) -> Iterator[Field]:
    """Yield the fields of a dataclass, each with the docstring below it."""
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = ast.unparse(statement.value) if statement.value else ""
            default = "" if value == "MISSING" or value.startswith("field(") else value.replace("'", '"')
            meaning = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield Field(statement.target.id, statement.annotation, default, " ".join(str(meaning).split()))


def describe_type(kind: ast.expr) -> str:
    """Return a type in words, with its range."""
    if not isinstance(kind, ast.Subscript):
        return KINDS.get(ast.unparse(kind), "group")
    outer, within = ast.unparse(kind.value), kind.slice
    if outer == "Literal":
        return "one of several"
    if outer != "Annotated" or not isinstance(within, ast.Tuple):
        return KINDS.get(outer, outer)
    base, *constraints = within.elts
    return ", ".join([describe_type(base), *(words for constraint in constraints if (words := describe_range(constraint)))])


def describe_range(constraint: ast.expr) -> str:
    """Return a range in words; what else an annotation may say, such as a multiple, is left to the docstring of the field."""
    if isinstance(constraint, ast.Subscript):  # Literal["ddp", "fsdp"]
        words = constraint.slice.elts if isinstance(constraint.slice, ast.Tuple) else [constraint.slice]
        return "one of " + ", ".join(
            f"`{word}`" if (word := ast.literal_eval(element)) != "" else "nothing" for element in words
        )
    assert isinstance(constraint, ast.Call)
    bounds = [(ast.unparse(constraint.func).lower(), value) for value in constraint.args]
    bounds += [(str(keyword.arg), keyword.value) for keyword in constraint.keywords]
    return " and ".join(RANGES[name].format(ast.unparse(value)) for name, value in bounds if name in RANGES)


if __name__ == "__main__":
    main()
