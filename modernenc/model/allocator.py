"""How the process allocates memory."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: returning them and faulting them in again took a fifth of a CPU step."""
    if platform.libc_ver()[0] == "glibc":
        mmap_max, trim_threshold = -4, -1  # parameters of mallopt(3)
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
