"""What filters let through, as patterns of whole names that exclude each other."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from mergesearch.merging.coefficients import DEFAULT, Groups
from mergesearch.merging.mergekit_format.places import all_settings
from mergesearch.merging.mergekit_format.reading import MergekitFile
from mergesearch.merging.mergekit_format.settings import filters_of
from mergesearch.merging.mergekit_format.writing_settings import OUTSIDE, block_of


def filter_patterns(file: MergekitFile, names: Sequence[str]) -> dict[str, str]:
    """Filter -> pattern of what it is the first to let through, those that match nothing left out.

    The order of filters is that in which the parameters of a file first name them.
    """
    texts = _texts(file)
    patterns = {}
    for place, text in enumerate(texts):
        pattern = f"{_none_of(texts[:place])}.*{re.escape(text)}.*"
        if _matching(pattern, names):
            patterns[text.strip(".") or text] = pattern
    return patterns


def _texts(file: MergekitFile) -> list[str]:
    """All filters of a file, each once."""
    texts = [text for _, each in all_settings(file) for text in filters_of(each)]
    return list(dict.fromkeys(texts))


def block_patterns(patterns: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Every pattern once for each block and once for what lies outside, as far as it matches."""
    found = {}
    for label, pattern in patterns.items():
        for block in dict.fromkeys(block_of(name) for name in names):
            inside = f"(?={re.escape(block)})" if block else OUTSIDE
            if _matching(inside + pattern, names):
                where = f" {block.strip('.').rpartition('.')[2]}" if block else ""
                found[label + where] = inside + pattern
    return found


def pattern_groupings(file: MergekitFile, names: Sequence[str]) -> list[Groups]:
    """Ways to divide all tensors by filters: as they are, and block by block.

    What no pattern matches goes by the name ``default``.
    """
    filters = filter_patterns(file, names)
    if not filters:
        return []
    rest = f"{_none_of(_texts(file))}.*"
    by_block = block_patterns({**filters, "": rest}, names)
    by_block.pop("", None)  # the rest outside the blocks
    return [_groups(filters.values(), names), _groups(by_block.values(), names)]


def _groups(patterns: Collection[str], names: Sequence[str]) -> Groups:
    groups = {pattern: _matching(pattern, names) for pattern in patterns}
    matched = {name for group in groups.values() for name in group}
    rest = [name for name in names if name not in matched]
    return {**groups, DEFAULT: rest} if rest else groups


def _none_of(texts: Sequence[str]) -> str:
    """A condition at the beginning of a pattern: the name holds none of these."""
    return f"(?!.*(?:{'|'.join(map(re.escape, texts))}))" if texts else ""


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if re.fullmatch(pattern, name)]
