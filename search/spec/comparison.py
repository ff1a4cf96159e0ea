"""Compares studies: whether scores may be compared, and which keys differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergesearch.search.spec.code import used_plugins
from mergesearch.search.spec.contents import without_places
from mergesearch.search.spec.sections import EXECUTION_KEYS, StudySpec
from mergesearch.search.spec.shortening import shortened


def evaluation_digest(spec: StudySpec) -> str:
    """Hash of everything that scores depend on, except the merge itself.

    It covers evaluators, batch sizes, tasks and the versions of the libraries. Its first half goes
    by the places of data, as all of it did in earlier versions; the second by what lies there, so
    that moved data leave it as it is. :func:`scored_alike` compares two.
    """
    from importlib.metadata import version

    versions = {name: version(name) for name in ("lm-eval", "torch", "transformers")}
    versions |= {p.package: p.version for p in used_plugins(spec) if p.kind == "evaluators"}
    content = {"evaluators": spec.to_dict()["evaluators"], "versions": versions}
    if spec.selection.lend is not None:
        content["lend"] = spec.selection.lend
    moved = content | {"evaluators": without_places(content["evaluators"])}
    return f"{_hash(content)}-{_hash(moved)}"


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def scored_alike(one: str, other: str) -> bool:
    """Whether scores of one recipe under two evaluation digests may be compared.

    They may not where batches have another size, which may round differently. Digests of earlier
    versions know places alone.
    """
    ours = one.split("-")
    theirs = other.split("-")
    if len(ours) == len(theirs) == 2:
        return ours[1] == theirs[1]
    return ours[0] == theirs[0]


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Keys at which two resolved studies differ, as ``key: recorded -> given``.

    Execution keys are left out.
    """
    flat_ours = dict(_flatten(ours))
    flat_theirs = dict(_flatten(theirs))
    keys = sorted(set(flat_ours) | set(flat_theirs))
    return [
        f"{key}: {shortened(flat_ours.get(key))} -> {shortened(flat_theirs.get(key))}"
        for key in keys
        if flat_ours.get(key) != flat_theirs.get(key) and key.split(".")[0] not in EXECUTION_KEYS
    ]


def conflicts(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, mended: bool = False
) -> list[str]:
    """:func:`differences`, if two resolved studies differ in more than may change; else none.

    That is the budget and, where scorers were ``mended``, the code of their functions.
    """
    changed = differences(ours, theirs)
    code = code_changes(changed)
    other = [each for each in changed if not each.startswith("budget.") and each not in code]
    return changed if other or (code and not mended) else []


def code_changes(changed: Sequence[str]) -> list[str]:
    """Those of :func:`differences` that are in the code of functions."""
    return [change for change in changed if ".source." in change]


def searched_keys(spec: StudySpec) -> dict[str, Any]:
    """What a study is and where it is kept aside: its sections without the execution keys."""
    left_out = (*EXECUTION_KEYS, "storage")
    return {key: value for key, value in spec.to_dict().items() if key not in left_out}


def listed(changed: Sequence[str]) -> str:
    """The first few of :func:`differences`, and how many more there are."""
    more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
    return "; ".join(changed[:4]) + more


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a list that holds no sections is one value."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list) and node and isinstance(node[0], Mapping):
        for index, value in enumerate(node):
            yield from _flatten(value, f"{prefix}.{index}")
    else:
        yield prefix, node
