"""Verbs that make a model of other models, without a study."""
