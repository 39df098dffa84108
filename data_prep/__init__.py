"""corpus -> read, bucket -> dedup, split, shuffle -> tokenize -> block shards -> manifest -> verify.

Reads any corpus that datatrove can read; writes the folder that `modernenc.data.blocks` describes.
"""

from loguru import logger

# datatrove logs every task at INFO to stderr, from each worker process; importing this package is what workers do first.
logger.disable("datatrove")
