"""A plug-in of mergesearch: one operator, strategy, evaluator and kind of space."""
