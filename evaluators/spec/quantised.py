"""Evaluators that score models with rounded weights."""

from __future__ import annotations

from importlib.util import find_spec

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.evaluator_base import EvaluatorBase
from mergesearch.merging import InputError


def score_quantised(evaluator: Evaluator, kind: str, where: str) -> None:
    """Let an evaluator score models with rounded weights.

    Raises:
        InputError: If it does not run the merged model itself, or a package is missing.
    """
    routed = bool(getattr(evaluator, "parameters", ()))
    if (
        not isinstance(evaluator, EvaluatorBase)
        or evaluator.model_class is None
        or evaluator.measures_weights
        or routed
    ):
        raise InputError(
            f"{where}.quantise: expected an evaluator that runs one merged model, received {kind} "
            "for one that does not; leave it out"
        )
    if kind == "q4_k" and find_spec("gguf") is None:
        raise InputError(
            f"{where}.quantise: expected the package gguf for q4_k, received none; install it with "
            "`pip install 'mergesearch[gguf]'`, or take int4"
        )
    evaluator.quantise = kind
