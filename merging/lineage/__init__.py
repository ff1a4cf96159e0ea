"""Lineage: whether experts come from their base, told from samples before weights are read."""
