"""Measurements that are no runs: what a step costs, and which networks can be pruned."""
