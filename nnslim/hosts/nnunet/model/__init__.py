"""Trained nnU-Net models on disk: read, described, written in plans."""
