"""Prediction inside nnU-Net's predictor, and of directories."""
