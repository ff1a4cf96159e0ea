"""Heads of attention inside stored matrices, and maps of their features that cancel."""
