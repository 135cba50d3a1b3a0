"""Slim models made: calibration images, plans, and the folder that stock nnU-Net loads."""
