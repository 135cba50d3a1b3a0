"""From values on one grid to values on another: matrices along each axis, and labels without the full scores."""
