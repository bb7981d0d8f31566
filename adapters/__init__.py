"""Pruning frameworks, each behind one protocol: see base.py, and registry.py for the names."""

if __name__ != "dpm_core.adapters":  # from the top of a checkout: every class would exist twice
    raise ImportError(f"import dpm_core.adapters, not {__name__}", name=__name__)
