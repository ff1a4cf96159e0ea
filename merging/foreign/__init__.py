"""Readers of what we did not write: bounded, typed, and with one kind of error."""
