"""The numbered blocks of a model, found from the nesting of its tensor names.

A *list* is the modules that differ in the first number of their names (``encoder.layers.0``,
``encoder.layers.1``). Lists of blocks that run one after the other make an axis: the stages of a
hierarchical model with the blocks inside them (``stages.0.layers.1``), and lists side by side that
stand for the beginning, the middle and the end of one network (``down_blocks``, ``mid_block``,
``up_blocks``). Every other list of blocks has an axis of its own.

Lists that stand side by side (experts, heads, embeddings) and entries of a Sequential are none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Path = tuple[str, ...]

#: Last words of lists that need no second entry to be blocks.
_BLOCKS = re.compile(r"(?:^|_)(?:layers?|blocks?|resblocks?|stages?|h)$|groups$")
#: Words of lists whose entries run side by side.
_PARALLEL = re.compile(
    r"expert|head|mlp|norm|emb|proj|predict|classif|merger|token|lora|codebook|quantiz|convs$|linears?$"
)
#: Words with a number at their end that stand for the entries of a list: ``layer1``.
_NUMBERED_WORD = re.compile(r"(\w*(?:layer|block|stage)s?)_?(\d+)")
#: Words of a name that are values of one module.
_VALUES = re.compile(r"weight(?:_[gv])?|bias|running_\w+|num_batches_tracked")
#: What comes first, in the middle, and last of lists with one noun under one parent.
_PHASES: Mapping[str, int] = {
    **dict.fromkeys(("input", "down", "double", "transformer", "joint"), 0),
    **dict.fromkeys(("mid", "middle", "bottleneck"), 1),
    **dict.fromkeys(("output", "up", "single", "single_transformer"), 2),
}
_MIDDLE = re.compile(r"mid(?:dle)?_block")
#: Share of a smaller entry's names that it has in common with its neighbour in a list of blocks.
_ALIKE = 0.5


@dataclass(frozen=True)
class BlockPlace:
    """Where a tensor lies among the blocks.

    Attributes:
        axis: The axis: words before its list, and a word of the list where these do not suffice.
        number: Of the block; rises along the axis.
        written: How the name counts it, such as ``0.1`` for the second block of the first stage;
            empty where that is ``number``.
        words: Words of the lists that it is in, from that of the axis on.
        canonical: List, number and rest of the name, as if the list stood alone.
    """

    axis: Path
    number: int
    written: str
    words: Path
    canonical: str


@dataclass
class _List:
    """A list of numbered modules; ``entries`` is number -> full name -> rest of the name."""

    path: Path
    entries: dict[int, dict[str, Path]] = field(default_factory=dict)

    @property
    def word(self) -> str:
        return self.path[-1]

    @property
    def phase(self) -> str:
        """What stands before the noun of its word: ``down`` in ``down_blocks``."""
        return self.word.rpartition("_")[0]

    @property
    def noun(self) -> str:
        return self.word.rpartition("_")[2].rstrip("s")

    @property
    def axis(self) -> Path:
        """Its parent, with the word before its noun if that is no phase of one axis."""
        parent = self.path[:-1]
        return (*parent, self.phase) if self.phase and self.phase not in _PHASES else parent


def block_places(names: Iterable[str]) -> dict[str, BlockPlace]:
    """Name -> its place, for the tensors that lie in blocks."""
    lists = _block_lists(_lists(_paths(names)))
    axes: dict[tuple[Path, str], list[_List]] = {}
    for each in lists:
        axes.setdefault((each.axis, each.noun), []).append(each)
    places: dict[str, BlockPlace] = {}
    taken: set[Path] = set()
    for (axis, noun), members in axes.items():
        key = (*axis, noun) if axis in taken else axis
        taken.add(key)
        places |= _along(key, sorted(members, key=lambda one: _PHASES.get(one.phase, 0)))
    return places


def _paths(names: Iterable[str]) -> dict[str, Path]:
    """Name -> its words, with numbers at the end of words split off where they count blocks."""
    paths = {name: tuple(name.split(".")) for name in names}
    numbers: dict[Path, set[str]] = {}
    for path in paths.values():
        for index, word in enumerate(path[:-1]):
            match = _NUMBERED_WORD.fullmatch(word)
            if match:
                numbers.setdefault((*path[:index], match[1]), set()).add(match[2])
            if match or word.isdigit():
                break
    return {name: _split_words(path, numbers) for name, path in paths.items()}


def _split_words(path: Path, numbers: Mapping[Path, set[str]]) -> Path:
    for index, word in enumerate(path[:-1]):
        if word.isdigit():
            return path
        if _MIDDLE.fullmatch(word) and index < len(path) - 2:
            return (*path[: index + 1], "0", *path[index + 1 :])
        match = _NUMBERED_WORD.fullmatch(word)
        if match and len(numbers.get((*path[:index], match[1]), ())) > 1:
            return (*path[:index], match[1], match[2], *path[index + 1 :])
    return path


def _lists(paths: Mapping[str, Path]) -> list[_List]:
    """The outermost lists, in the order of their first tensor."""
    found: dict[Path, _List] = {}
    for name, path in paths.items():
        index = next((i for i, word in enumerate(path) if i and word.isdigit()), None)
        if index is not None and index < len(path) - 1:
            each = found.setdefault(path[:index], _List(path[:index]))
            each.entries.setdefault(int(path[index]), {})[name] = path[index + 1 :]
    return list(found.values())


def _block_lists(lists: Sequence[_List]) -> list[_List]:
    """Those of blocks; lists of single layers only where there is nothing else."""
    candidates = [each for each in lists if not _PARALLEL.search(each.word.lower())]
    deep = [each for each in candidates if _is_deep(each)]
    return deep or [each for each in candidates if _BLOCKS.search(each.word)]


def _is_deep(each: _List) -> bool:
    """Whether the entries are made of several modules, and there are several of a kind."""
    entries = [set(entry.values()) for entry in each.entries.values()]
    if not any(_modules(entry) > 1 for entry in entries):
        return False
    return _BLOCKS.search(each.word) is not None or (len(entries) > 1 and _alike(entries))


def _modules(entry: Iterable[Path]) -> int:
    """Number of modules with weights in an entry."""
    return len({path[:-1] if _VALUES.fullmatch(path[-1]) else path for path in entry})


def _alike(entries: Sequence[set[Path]]) -> bool:
    """Whether neighbours share most names, but for what few of them have."""
    return all(len(a & b) >= _ALIKE * min(len(a), len(b)) for a, b in pairwise(entries))


def _along(axis: Path, members: Sequence[_List]) -> dict[str, BlockPlace]:
    """Places on one axis, the lists one after the other."""
    inner = [_inner_words(each) for each in members]
    if len(members) == 1 and not inner[0]:
        return {
            name: _place(axis, number, "", members[0].path, path)
            for number, entry in members[0].entries.items()
            for name, path in entry.items()
        }
    places: dict[str, BlockPlace] = {}
    for each, words in zip(members, inner, strict=True):
        first = 1 + max((place.number for place in places.values()), default=-1)
        phase = f"{each.phase} " if len(members) > 1 and each.phase else ""
        steps = _steps(each, words)
        order = {step: first + i for i, step in enumerate(sorted(set(steps.values())))}
        for number, entry in each.entries.items():
            for name, path in entry.items():
                stage, block = steps[name]
                written = f"{phase}{number}.{block}" if words else f"{phase}{number}"
                places[name] = _place(axis, order[stage, block], written, each.path, path)
    return places


def _place(axis: Path, number: int, written: str, list_path: Path, path: Path) -> BlockPlace:
    inner = next((i for i, part in enumerate(path[:2]) if part.isdigit()), None)
    words = list_path[-1:]
    if written and inner is not None:
        words = (*words, *path[:inner])
        path = path[inner + 1 :]
    return BlockPlace(axis, number, written, words, ".".join((words[-1], str(number), *path)))


def _steps(each: _List, words: frozenset[str]) -> dict[str, tuple[int, int]]:
    """Name -> stage, and block inside it."""
    steps: dict[str, tuple[int, int]] = {}
    at_the_end = {path[0] for path in each.entries[max(each.entries)].values()}
    for stage, entry in each.entries.items():
        inside = {name: _inner(path, words) for name, path in entry.items()}
        blocks = [block for block in inside.values() if block is not None] or [0]
        for name, path in entry.items():
            block = inside[name]
            if block is None:
                block = min(blocks) if _comes_first(path[0], at_the_end) else max(blocks)
            steps[name] = (stage, block)
    return steps


def _inner(path: Path, words: frozenset[str]) -> int | None:
    """Number of the block inside its stage, None for what stands beside the blocks."""
    if "" in words and path[0].isdigit():
        return int(path[0])
    return int(path[1]) if path[0] in words and len(path) > 2 and path[1].isdigit() else None


def _comes_first(word: str, at_the_end: Collection[str]) -> bool:
    """Whether what stands beside the blocks of a stage comes before them.

    What the last stage lacks leads from a stage to the next; what it has leads into the stage, but
    for a norm.
    """
    return word in at_the_end and "norm" not in word


def _inner_words(each: _List) -> frozenset[str]:
    """Words of the lists inside the entries, if the entries are stages; the word may be empty."""
    found: dict[str, list[dict[int, set[Path]]]] = {}
    for entry in each.entries.values():
        inner: dict[str, dict[int, set[Path]]] = {}
        for path in entry.values():
            depth = next((i for i, word in enumerate(path[:2]) if word.isdigit()), None)
            if depth is not None and depth < len(path) - 1:
                word = path[0] if depth else ""
                numbers = inner.setdefault(word, {})
                numbers.setdefault(int(path[depth]), set()).add(path[depth + 1 :])
        for word, numbers in inner.items():
            found.setdefault(word, []).append(numbers)
    return _stage_words(found, sum(len(entry) for entry in each.entries.values()))


def _stage_words(
    found: Mapping[str, Sequence[Mapping[int, set[Path]]]], names: int
) -> frozenset[str]:
    """Those inner lists whose entries are blocks, if they hold most of the entries."""
    kept = {
        word: lists
        for word, lists in found.items()
        if not _PARALLEL.search(word.lower())
        and all(_alike([entries[n] for n in sorted(entries)]) for entries in lists)
        and any(_modules(entry) > 1 for entries in lists for entry in entries.values())
    }
    held = sum(len(e) for lists in kept.values() for entries in lists for e in entries.values())
    if 2 * held < names:
        return frozenset()
    longest = {word: max(len(entries) for entries in lists) for word, lists in kept.items()}
    most = max(longest.values(), default=0)
    return frozenset(word for word, count in longest.items() if count > 1 or most == 1)
