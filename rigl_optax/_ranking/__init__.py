"""Scores in, masks out: exact selection of the k best of each ranking; knows no optimizer."""
