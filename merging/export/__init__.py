"""Merged models as folders that transformers loads, each with a model card."""
