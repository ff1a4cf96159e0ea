"""Evaluators that run models on audio."""
