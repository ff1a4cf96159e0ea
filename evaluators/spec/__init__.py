"""The ``evaluators:`` section of a study file: its keys, and the evaluators built from them."""
