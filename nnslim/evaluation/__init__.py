"""Compare folders of segmentations with their references: Dice, surface Dice (NSD) and HD95, per case and class."""
