"""Objectives: `(batch) -> loss sum and counts`. Each holds the backbone, which phases share, and its own head."""
