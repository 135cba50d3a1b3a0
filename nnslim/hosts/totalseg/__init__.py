"""TotalSegmentator: where its weights live, how to fetch them safely, and untrained stand-ins for timing and tests.

Nothing is imported here: `weights` needs TotalSegmentator and requests, `standin` needs nnU-Net, both only when called.
"""
