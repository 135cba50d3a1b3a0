"""Networks of models as files that run without torch."""
