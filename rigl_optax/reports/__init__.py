"""Compares runs, and shows them as tables, figures and an HTML page. Needs the `train` extra."""
