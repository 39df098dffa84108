"""A remote file system that fails as no other does, or never answers; in a module that any process can import."""

import threading
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem


class Odd(MemoryFileSystem):
    """A file system that raises an error of its own for every file, or is silent for ever for one named `silent`."""

    protocol = "odd"

    def get_file(self, rpath: Any, lpath: Any = None, callback: Any = None, outfile: Any = None, **kwargs: Any) -> None:
        """Fail, or wait without end."""
        if "silent" in rpath:
            threading.Event().wait()
        raise type("OddError", (Exception,), {})("out of tokens")
