"""Prepare a corpus: read -> bucket -> deduplicate, split and shuffle -> tokenize -> block shards -> manifest -> verify.

It reads any corpus that datatrove can read, and writes the folder that `modernenc.data.blocks` describes.
"""

from loguru import logger

# datatrove logs every task at INFO to stderr from each worker process. A worker imports this package before anything else.
logger.disable("datatrove")
