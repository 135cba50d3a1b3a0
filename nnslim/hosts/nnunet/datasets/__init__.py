"""Public datasets as raw nnU-Net datasets."""
