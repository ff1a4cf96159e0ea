"""Distillation: what models of other shapes know, in a model that can be merged.

Sources with another tokenizer and another architecture are read on texts, their predictions are
written in the tokens of a pivot, and a LoRA of the pivot is trained towards them. What comes out
has the pivot's shape (FuseLLM, Wan 2024, arXiv 2401.10491; FuseChat, Wan 2024, arXiv 2408.07990).
"""
