"""The model of a run: building it, its first weights, its optimizers, and loading it from a checkpoint."""
