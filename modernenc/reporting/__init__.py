"""The page and the plots that show a run."""
