"""Merges that depend on their input, in memory and on disk."""
