"""Holds the methods, one module per family; each is a few lines on the shared wrapper."""
