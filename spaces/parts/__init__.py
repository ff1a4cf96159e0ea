"""Pieces that spaces are made of: curves, chunks, partitions, conditional boxes, columns."""
