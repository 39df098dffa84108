"""List the commands: `python -m modernenc`."""

import ast
from importlib.util import find_spec
from pathlib import Path

COMMANDS = (
    "data_prep", "data_prep.verify", "data_prep.inspect", "modernenc.plan", "modernenc.train", "modernenc.resume",
    "modernenc.eta", "modernenc.launch", "modernenc.report", "modernenc.compare", "modernenc.evaluate", "modernenc.export",
    "modernenc.push", "modernenc.adapt", "modernenc.bench", "modernenc.doctor",
)  # fmt: skip
"""In the order in which one needs them."""


def main() -> None:
    """Print each command and what it is for."""
    print("python -m COMMAND --help says more of each:\n")
    for name in COMMANDS:
        print(f"  {name:<20}{_purpose(name)}")


def _purpose(name: str) -> str:
    """Return what the docstring of a command begins with, without importing it, which may take seconds."""
    package, *rest = name.split(".")
    spec = find_spec(package)  # imports the package alone, which is empty
    assert spec is not None and spec.origin
    place = Path(spec.origin).parent.joinpath(*rest)
    path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    first_line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return first_line.partition(": `python")[0].rstrip(".:")


if __name__ == "__main__":
    main()
