"""Base and experts brought into one shape: vocabularies, ties, missing and special tensors."""
