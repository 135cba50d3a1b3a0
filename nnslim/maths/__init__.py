"""Tensors only: low-rank forms, second moments, and the choice of options within a budget."""
