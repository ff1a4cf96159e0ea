"""Whole trials of this package beside those of others, each in an environment of its own."""
