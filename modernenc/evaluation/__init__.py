"""Validation on held-out text and tasks, and the comparison of checkpoints."""
