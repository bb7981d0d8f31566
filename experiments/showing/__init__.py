"""Showing what runs left: tables, plots, the report and RESULTS.md, and keeping records."""
