"""Transformers models around weights: loading, calibration items, and experts that run on them."""
