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
    sources: dict[str, str] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        sources[name] = Path(spec.origin).read_text(encoding="utf-8")
        todo += [imported for imported in imports_of(sources[name]) if imported not in sources]
    for name, source in sources.items():
        code = make_imports_relative(source)
        if name == module:  # transformers 4 copies only what this file itself imports
            indirect = sorted(sources.keys() - {module, *imports_of(source)})
            code += "".join(f"\nfrom .{other.rpartition('.')[2]} import __name__ as _  # noqa" for other in indirect) + "\n"
        (folder / f"{name.rpartition('.')[2]}.py").write_text(code, encoding="utf-8")


def imports_of(source: str) -> list[str]:
    """Return the modules of this package that a module imports at its top level."""
    return [".".join(found.groups()) for found in _IMPORT.finditer(source)]


def make_imports_relative(source: str) -> str:
    """Turn imports from this package into imports from the same folder."""
    return _IMPORT.sub(r"from .\2 import", source)
