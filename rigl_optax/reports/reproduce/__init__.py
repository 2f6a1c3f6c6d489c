"""Reproduces the claims of the RigL paper in miniature: each is a table of arms that is trained.

`claims` declares them, `trials` trains and reads their runs, `page` and `picture` show them.
"""
