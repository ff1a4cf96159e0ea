"""Experts brought to where the base has its units."""
