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
HEAD = """# Configuration keys

Every key that a command line or a YAML file may set. `python -m modernenc.train +recipe=NAME --cfg job` prints the values of a
run. A key without a default here gets its value in `conf/` or in the recipe.

<!-- Written by docs/reference.py from the docstrings of the schemas: change those, then run `make docs`. -->
"""


def main() -> None:
    """Write the page, or compare it."""
    text = page()
    if "--check" in sys.argv[1:]:
        sys.exit(f"{PAGE.name} is not what the schemas say: run python docs/reference.py" if PAGE.read_text() != text else 0)
    PAGE.write_text(text)


def page() -> str:
    """The whole page in Markdown."""
    parts = [HEAD]
    for heading, file, outermost, about in SCHEMAS:
        classes = classes_of(ROOT / file)
        parts.append(f"## {heading}\n\n{about}\n\n{''.join(section(classes, outermost, ''))}")
    parts.append("## Parts\n\nWhat a group takes, and the values of the shipped options: `backbone=NAME`, `optim=NAME`.\n")
    parts += [part(group, target, options) for group in GROUPS for target, options in by_target(group).items()]
    return "\n".join(parts)


def by_target(group: str) -> dict[str, dict[str, dict[str, str]]]:
    """The options of a group, each as its keys and values, by what they configure."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        values = dict(re.findall(r"^(\w+): *(.*?)(?: +#.*)?$", path.read_text(), re.M))
        found.setdefault(values.pop("_target_"), {})[path.stem] = values
    return found


def part(group: str, target: str, options: dict[str, dict[str, str]]) -> str:
    """A table of the keys of one target, a column for the default and one for each option."""
    file, _, name = target.rpartition(".")
    known = {key: (default, meaning) for key, _, default, meaning in arguments(ROOT / f"{file.replace('.', '/')}.py", name)}
    keys = list(dict.fromkeys(key for values in options.values() for key in values))
    keys += [key for key, (default, _) in known.items() if default and key not in keys]
    rows = ["| key | default |" + "".join(f" `{option}` |" for option in options), "|---" * (2 + len(options)) + "|"]
    for key in keys:
        default, values = known.get(key, ("", ""))[0], [values.get(key, "") for values in options.values()]
        rows.append(f"| `{group}.{key}` | {default} |" + "".join(f" {value} |" for value in values))
    explained = [f"- `{group}.{key}`: {known[key][1]}" for key in keys if key in known and known[key][1]]
    return "\n".join([f"### {name}", "", f"`_target_: {target}`", "", *rows, "", *explained, ""])


def arguments(path: Path, name: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of what a class or function takes; a dataclass of settings counts by its fields."""
    classes = classes_of(path)
    (called,) = (node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == name)
    if isinstance(called, ast.ClassDef):
        made = [node for node in called.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        if not made:
            yield from fields(called)
            return
        called = made[0]
    assert isinstance(called, ast.FunctionDef)
    taken = [*called.args.args, *called.args.kwonlyargs]
    defaults = [*[None] * (len(called.args.args) - len(called.args.defaults)), *called.args.defaults, *called.args.kw_defaults]
    for argument, default in zip(taken, defaults, strict=True):
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        if kind in classes:
            yield from fields(classes[kind])
        else:
            yield argument.arg, kind, ast.unparse(default) if default else "", ""


def classes_of(path: Path) -> dict[str, ast.ClassDef]:
    """The classes of a file by name."""
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}


def section(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> Iterator[str]:
    """The keys of one class as a list, then those of the classes that it contains, each under its own heading."""
    nested = []
    for key, kind, default, meaning in fields(classes[name]):
        inner = next((word for word in kind.replace("[", " ").replace("]", " ").split() if word in classes), "")
        if inner:
            nested.append((inner, f"{prefix}{key}.{'NAME.' if kind.startswith('dict') else ''}"))
        default = "" if not default or inner else f", default `{default}`"
        yield f"- `{prefix}{key}` ({readable(kind)}{default}){': ' * bool(meaning)}{meaning}\n"
    for inner, within in nested:
        summary = " ".join((ast.get_docstring(classes[inner]) or "").split())
        yield f"\n### {within.rstrip('.')}\n\n{summary}\n\n"
        yield from section(classes, inner, within)


def fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and docstring of each field of a dataclass; no default where a value must be set."""
    following = [*node.body[1:], None]
    for statement, after in zip(node.body, following, strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = ast.unparse(statement.value) if statement.value else ""
            default = "" if value == "MISSING" or value.startswith("field(") else value.replace("'", '"')
            meaning = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                meaning = " ".join(str(after.value.value).split())
            yield statement.target.id, ast.unparse(statement.annotation), default, meaning


def readable(kind: str) -> str:
    """A type in words."""
    words = {"str": "text", "float": "number", "int": "whole number", "bool": "true or false", "Any": "part"}
    outer, _, _ = kind.partition("[")
    return words.get(kind, {"dict": "mapping", "list": "list", "Literal": "one of several"}.get(outer, "group"))


if __name__ == "__main__":
    main()
