"""A trained network made slim: configuration, calibration, fit, search, recovery, and what is kept of it."""
