"""Times side by side: alternated rounds, what they are measured on, tables and pictures."""
