"""Evaluators that run models on images."""
