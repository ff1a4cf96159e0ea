"""Heads of a study whose experts keep their own: which are used, and what they take."""

from __future__ import annotations

from collections.abc import Mapping

from mergesearch.evaluators import Evaluator
from mergesearch.merging import InputError, Recipe
from mergesearch.merging.family.family import open_family
from mergesearch.merging.family.heads import Heads
from mergesearch.merging.policies import parse_policies
from mergesearch.search.spec.sections import StudySpec


def heads_of(template: Recipe) -> Heads | None:
    """What the sources of a recipe keep for themselves; None where they share all tensors."""
    if not parse_policies(template.special).keeps_own:
        return None
    return open_family(template).heads


def head_classes(template: Recipe, evaluator: Evaluator) -> Mapping[str, str]:
    """The heads that a study's evaluators use -> the auto class of their models."""
    heads = heads_of(template)
    return {} if heads is None else evaluator.use_heads([*heads.of])


def used_heads(template: Recipe, evaluator: Evaluator) -> tuple[Heads, list[str]] | None:
    """The heads of a study and the names of those that its evaluators use, after their check."""
    heads = heads_of(template)
    return None if heads is None else (heads, sorted(evaluator.use_heads([*heads.of])))


def check_heads(spec: StudySpec, template: Recipe, evaluator: Evaluator) -> None:
    """Refuse evaluators that do not know which head scores their items.

    Raises:
        InputError: In one line.
    """
    heads = heads_of(template)
    used = evaluator.use_heads([] if heads is None else [*heads.of])
    if used and spec.workers.gpus > 1:
        raise InputError(
            "workers.gpus: expected at most 1 where experts keep heads of their own (special: "
            f"{{heads: own}}), received {spec.workers.gpus:g}; lower it"
        )


def head_bytes(template: Recipe, evaluator: Evaluator, itemsize: int) -> int:
    """Bytes that the heads of a study take in each worker, beside the merged weights."""
    used = used_heads(template, evaluator)
    if used is None:
        return 0
    heads, names = used
    return sum(heads.of[name].size for name in names) * itemsize
