"""Heads of a study whose experts keep their own: which are used, and what they take."""

from __future__ import annotations

from collections.abc import Mapping

from mergesearch.evaluators import Evaluator
from mergesearch.evaluators.spec.loadable import check_loadable
from mergesearch.evaluators.spec.model_kinds import check_model_kind
from mergesearch.merging.family.heads import Head, Heads
from mergesearch.search.spec.sections import StudySpec


def head_classes(heads: Heads | None, evaluator: Evaluator) -> Mapping[str, str]:
    """The heads that a study's evaluators use -> the auto class of their models."""
    return {} if heads is None else evaluator.use_heads([*heads.of])


def used_heads(heads: Heads | None, evaluator: Evaluator) -> dict[str, Head]:
    """The heads that a study's evaluators use, by name, after their check."""
    names = sorted(head_classes(heads, evaluator))
    return {} if heads is None else {name: heads.of[name] for name in names}


def check_heads(spec: StudySpec, heads: Heads | None, evaluator: Evaluator) -> None:
    """Refuse evaluators that do not know which head scores their items.

    Raises:
        InputError: In one line.
    """
    used = evaluator.use_heads([] if heads is None else [*heads.of])
    if heads is not None:
        for name, kind in used.items():
            source = heads.of[name].source
            check_model_kind(kind, source.config, spec.evaluators, f"expert {name}'s")
            check_loadable(kind, source, spec.evaluators, f"expert {name}")


def head_bytes(heads: Heads | None, evaluator: Evaluator, itemsize: int) -> int:
    """Bytes that the heads of a study take in each worker, beside the merged weights."""
    return sum(head.size for head in used_heads(heads, evaluator).values()) * itemsize
