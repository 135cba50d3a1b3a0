"""Embedded boards inside nnU-Net: plans of fewer stages and coarser spacing, a trainer, profiles, a table."""
