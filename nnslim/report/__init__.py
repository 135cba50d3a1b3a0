"""The HTML page about a slim model."""
