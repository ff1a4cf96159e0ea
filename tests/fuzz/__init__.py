"""Seeded mutations of real files, read by the real readers and verbs."""
