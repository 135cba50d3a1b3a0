"""Cases in nnU-Net's way: found, preprocessed, resampled, written."""
