"""The code that an exported model carries: a module and all that it imports from this package, side by side in one folder.

transformers loads such code with `trust_remote_code=True`, and copies it along when the model is saved again. It follows only
relative imports within one folder, so imports from this package are rewritten; nothing else changes.
"""

import importlib.util
import re
from pathlib import Path

_IMPORT = re.compile(r"^from (modernenc(?:\.\w+)*)\.(\w+) import", re.MULTILINE)


def write(folder: Path, module: str) -> None:
    """Write a module of this package, and the modules that it imports from it, as files that run without the package."""
    todo, done = [module], set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).read_text(encoding="utf-8")
        todo += [".".join(imported.groups()) for imported in _IMPORT.finditer(source)]
        (folder / f"{name.rpartition('.')[2]}.py").write_text(relative(source), encoding="utf-8")


def relative(source: str) -> str:
    """Turn imports from this package into imports from the same folder."""
    return _IMPORT.sub(r"from .\2 import", source)
