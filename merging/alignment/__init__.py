"""Alignment: experts that were trained from another start, in the coordinates of the base."""
