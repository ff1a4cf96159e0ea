"""Evaluators that run causal language models on texts and token ids."""
