"""Evaluators of merges that depend on their input."""
