"""Hash of files: xxh3, which is fast enough to check every shard and checkpoint."""

from pathlib import Path

import xxhash


def hash_file(path: Path) -> str:
    """Return the xxh3_64 hash of a file's bytes in hex."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
