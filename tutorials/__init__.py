"""Tutorials: plain scripts to review and run, and the notebooks that are made from them."""
