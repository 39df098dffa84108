"""Parts of one's own, as docs/extend.md describes them: a backbone, a phase, a recipe and an objective."""
