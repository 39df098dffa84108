"""Pretrain encoders under a staged curriculum.

corpus --data_prep--> shards --data/blocks--> documents --data/packing--> rows --data/masking--> micro-batches
  --backbones--> hidden states --objectives--> loss --curriculum, training--> checkpoints --export--> Hugging Face model
"""

__version__ = "0.1.0"
