"""The table of search strategies: one algorithm, one file.

A strategy is a class ``Strategy(problem, seed, *, options...)``; its keyword-only arguments, with
their annotations and defaults, are its options in the study file. There is no second table of
option names.
"""
