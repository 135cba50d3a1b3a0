"""Slim models beside dense ones: agreement, benchmark, report."""
