"""Trainers that nnU-Net finds by name, where the variable nnUNet_extTrainer names this directory."""
