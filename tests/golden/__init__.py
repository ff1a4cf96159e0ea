"""Recorded results; a difference is a change of algorithm and belongs in CHANGELOG.md."""
