"""Runs, comparisons, tables and plots. Start at ``python -m experiments --help``."""

if __name__ != "experiments":  # within dpm_core: every class would exist twice
    raise ImportError(f"import experiments, not {__name__}", name=__name__)
