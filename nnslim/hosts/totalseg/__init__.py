"""TotalSegmentator: its tasks on directories of images, its weights, and untrained stand-ins for timing and tests."""
