"""Counts of tokens as an encoder makes them, and shorter texts where a count is over a limit."""
