"""Pretrain encoders under a staged curriculum.

corpus --data_prep--> block shards --data/blocks--> documents --data/packing--> rows --data/masking--> micro-batches
  --backbones--> hidden --objectives--> loss --curriculum, trainer--> checkpoints --export--> Hugging Face model
"""

__version__ = "0.1.0"
