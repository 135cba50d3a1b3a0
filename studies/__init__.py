"""Experiments behind docs/: they import nnslim, and nothing imports them."""
