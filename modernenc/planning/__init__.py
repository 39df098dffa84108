"""Before training: checks, sizes that follow from the corpus, estimates, the plan as tables, the scaled-down smoke test."""
