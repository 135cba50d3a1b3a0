"""Predict many cases: with what is left to do, on which engine, and what is kept about each case."""
