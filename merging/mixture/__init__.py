"""One mixture of experts made smaller: its own experts are grouped, merged or dropped.

What is called an expert here is a part of one checkpoint; elsewhere an expert is a checkpoint.
"""
