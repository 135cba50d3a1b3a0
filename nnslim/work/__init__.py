"""The work that methods are put to: compressing, caching, comparing, reporting."""
