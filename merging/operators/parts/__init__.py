"""Pieces that several operators share: task vectors, selections, elections, factorings."""
