"""The verb that compares two checkpoints: does one come from the other?"""

from __future__ import annotations

from typing import Annotated

import typer

from mergesearch.search.cli.options import JsonOption, emit


def compare_weights(
    base: Annotated[
        str, typer.Argument(metavar="A", help="The base: a folder, a file or org/name@revision.")
    ],
    expert: Annotated[
        str, typer.Argument(metavar="B", help="What may come from it, or MODEL+ADAPTER.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Say from samples whether one checkpoint comes from another.

    Prints cosine and distance for each role, and the products of attention, which tell a permuted,
    locked or rescaled twin from another network. Reads some megabytes of each.
    """
    from mergesearch.merging import InputError
    from mergesearch.merging.checkpoints.opening import open_checkpoint
    from mergesearch.merging.family.base_names import with_base_names
    from mergesearch.merging.lineage.compare import compare_weights as compare
    from mergesearch.merging.lineage.description import lineage_dict, lineage_lines

    (first, second), _ = with_base_names([open_checkpoint(base, "base"), open_checkpoint(expert)])
    lineage = compare(first, second, seed)
    if not lineage.tensors:
        raise InputError(
            f"{expert}: expected tensors of the names and shapes of {base}, received none; compare "
            "checkpoints of one architecture"
        )
    emit(lineage_dict(lineage), as_json, lambda: lineage_lines(lineage))


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        "compare-weights",
        epilog="Example: mergesearch compare-weights zoo/digits/base zoo/digits/rotated; "
        "mergesearch compare-weights base.safetensors expert.safetensors --json",
    )(compare_weights)
