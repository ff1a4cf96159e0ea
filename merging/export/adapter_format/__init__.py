"""Merges as adapters of their base: what can be held, the files, and the card."""
