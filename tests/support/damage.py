"""Damage to files."""

import json
from pathlib import Path
from typing import Any

import xxhash

from modernenc.hashing import hash_file
from modernenc.run_folder import checkpoints


def truncate(path: Path) -> None:
    """Cut off the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def reseal(checkpoint: Path) -> None:
    """Give a changed checkpoint a manifest with its hash, as somebody who forges one does."""
    manifest = checkpoints.read_manifest(checkpoint)
    manifest |= {"bytes": checkpoint.stat().st_size, "xxh3_64": hash_file(checkpoint)}
    seal(checkpoints.manifest_of(checkpoint), manifest)


def seal(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the hash of its own content."""
    content = {key: value for key, value in manifest.items() if key != "sum"}
    digest = xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps({**content, "sum": digest}))


def edit(path: Path, *keys: str | int, value: object) -> None:
    """Set the value at a path of keys in a file of JSON."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))
