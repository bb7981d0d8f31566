"""Pruning frameworks, each behind one protocol: see base.py, and registry.py for the names."""
