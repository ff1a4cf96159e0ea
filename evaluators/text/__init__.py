"""Evaluators that run models on texts and token ids."""
