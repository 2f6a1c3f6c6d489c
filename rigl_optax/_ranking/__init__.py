"""Turns scores into masks: exact selection of the k best of each ranking, without an optimizer."""
