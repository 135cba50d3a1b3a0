"""2D weights as the start of 3D networks, inside nnU-Net."""
