"""Heads of a study whose experts keep their own: which are used, and what they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergesearch.evaluators import Evaluator
from mergesearch.evaluators.spec.loadable import check_loadable
from mergesearch.evaluators.spec.model_kinds import check_model_kind
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.family.head_names import label_count
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


def check_class_numbers(family: ModelFamily | None, evaluator: Evaluator) -> None:
    """Refuse class numbers that the heads which score them have no class for.

    Raises:
        InputError: In one line.
    """
    check = getattr(evaluator, "check_classes", None)
    if family is None or check is None:
        return
    heads = family.heads

    def count_of(head: str | None) -> int | None:
        if head is not None and heads is not None:
            return _stated(heads.of[head].source.config)
        return _stated(family.base.config) if heads is None else None

    check(count_of)


def _stated(config: Mapping[str, Any]) -> int | None:
    """Number of classes of a configuration; None where it may be stated in another way."""
    others = ("num_classes", "label_names", "num_labels")
    if isinstance(config.get("id2label"), Mapping) or not any(key in config for key in others):
        return label_count(config) if config else None
    number = config.get("num_labels")
    return number if isinstance(number, int) else None


def head_bytes(heads: Heads | None, evaluator: Evaluator, itemsize: int) -> int:
    """Bytes that the heads of a study take in each worker, beside the merged weights."""
    return sum(head.size for head in used_heads(heads, evaluator).values()) * itemsize
