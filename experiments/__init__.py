"""Runs, comparisons, tables and plots. Start at ``python -m experiments --help``."""
