"""Where tensors are in mergekit's slices, which decides the parameters that they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergesearch.merging.mergekit_format.reading import MergekitFile
from mergesearch.merging.mergekit_format.settings import Place, gradients_of, varies
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.roles import block_axes, roles_of


def all_settings(file: MergekitFile) -> Iterator[tuple[str, Any]]:
    """Every parameter of a file with its setting."""
    groups: list[Mapping[str, Any]] = [file.parameters]
    for each in file.slices:
        groups += [each.parameters, *(one.parameters for one in each.inputs)]
    for group in groups:
        yield from group.items()


def needs_tensors(file: MergekitFile) -> bool:
    """Whether parameters differ between tensors."""
    return len(file.slices) > 1 or any(varies(setting) for _, setting in all_settings(file))


def places_of(file: MergekitFile, layout: Layout, problems: list[str]) -> tuple[Place, ...]:
    """The place of every tensor of a layout; what does not fit is added to the problems.

    Blocks take the parameters of the slice that they lie in. What comes before the blocks takes
    those of the first slice, what comes after them those of the last one, both at depth 0.
    """
    roles = roles_of(layout.names)
    axes = block_axes(roles.values())
    axis = next(iter(axes.values()), ())
    ranges = _ranges(file, len(axis), problems)
    graded = sorted({name for name, each in all_settings(file) if any(gradients_of(each))})
    if len(axes) != 1 and (graded or len(ranges) > 1):
        what = f"parameters.{graded[0]}" if graded else "slices"
        problems.append(
            f"{what}: expected a model with one tower of numbered blocks, received "
            f"{len(axes)}; give values by filters"
        )
    places = []
    for spec in layout.tensors:
        role = roles[spec.name]
        last = 0 if role.part == "embedding" else len(ranges) - 1
        slice_, depth = last, 0.0
        if role.block is not None and len(axes) == 1:
            slice_, depth = _in_slice(axis.index(role.block), ranges)
        places.append(Place(spec.name, slice_, depth, spec.size))
    return tuple(places)


def _ranges(file: MergekitFile, blocks: int, problems: list[str]) -> list[tuple[int, int]]:
    """First block and one past the last of every slice, which must follow each other."""
    given = [(0, blocks) if one.layers is None else one.layers for one in file.slices]
    starts = [0, *(stop for _, stop in given)]
    if starts != [*(start for start, _ in given), blocks]:
        shown = ", ".join(f"{start}:{stop}" for start, stop in given)
        problems.append(
            f"slices: expected the {blocks} blocks of the base one after the other, received "
            f"{shown}; blocks cannot be left out, repeated or moved"
        )
    return given


def _in_slice(block: int, ranges: list[tuple[int, int]]) -> tuple[int, float]:
    """The slice of a block, and its depth there."""
    for number, (start, stop) in enumerate(ranges):
        if start <= block < stop:
            return number, (block - start) / (stop - start - 1) if stop - start > 1 else 1.0
    return len(ranges) - 1, 0.0
