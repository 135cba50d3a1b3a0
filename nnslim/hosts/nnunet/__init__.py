"""nnU-Net v2: its model folders, its predictor, its trainer."""
