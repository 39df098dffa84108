"""Validation on held-out text and on the held-out items of tasks."""
