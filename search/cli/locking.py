"""The verb that locks a model against merging."""

from __future__ import annotations

from typing import Annotated

import typer

from mergesearch.search.cli.options import JsonOption, OutOption, OverwriteOption, emit


def lock(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, org/name@revision or MODEL+ADAPTER.")
    ],
    out: OutOption,
    seed: Annotated[int, typer.Option(min=0, help="Of the maps; keep it to undo them.")] = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model that answers the same and whose merges with its relatives fail.

    Queries and keys, values and outputs of every head are multiplied by random matrices that cancel
    (MergeLock). The model is run before and after on drawn inputs where that is possible.
    """
    from mergesearch.merging.export.locking import lock_model

    locked = lock_model(model, out, seed=seed, overwrite=overwrite)
    result = {
        "out": str(out),
        "attentions": locked.attentions,
        "pairs": locked.pairs,
        "rotary_pairs": locked.rotary,
        "difference": locked.difference,
        "not_compared": locked.reason,
    }
    rotary = f", {locked.rotary} of them within rotary couples" if locked.rotary else ""
    checked = (
        f"answers differ by {locked.difference:.1e} of the greatest"
        if locked.difference is not None
        else f"answers were not compared: {locked.reason}"
    )
    done = f"locked {locked.pairs} pairs of sides in {locked.attentions} attentions{rotary}"
    emit(result, as_json, lambda: [f"{done}; {checked}; wrote {out}"])


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(epilog="Example: mergesearch lock models/bert-legal --out models/locked --seed 7")(
        lock
    )
