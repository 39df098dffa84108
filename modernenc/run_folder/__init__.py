"""What a run keeps on disk: configuration, checkpoints, tables of metrics, lineage, and the lock that guards them."""
