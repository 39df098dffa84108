"""The page and the plots that show a run, and the comparison of checkpoints."""
