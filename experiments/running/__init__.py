"""Carrying runs out: one of them, many, training, and the pruned model that a run leaves."""
