"""The verbs that keep several experts in little space, and bring them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergesearch.search.cli.options import JsonOption, OutOption, OverwriteOption, emit

if TYPE_CHECKING:
    from mergesearch.merging.export.packing import Packed


def pack(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The common base.")],
    experts: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]EXPERT...", help="Experts of it, at least one."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the pack.")],
    rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="R", help="Keep task vectors of matrices as R terms each."),
    ] = None,
    directions: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="P",
            help="With --rank: share P directions among experts (reversible model merging).",
        ),
    ] = None,
    masks: Annotated[
        bool,
        typer.Option(
            "--masks", help="Keep one summed task vector, and a bit for each weight and expert."
        ),
    ] = False,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]L",
            help="With --masks: how much of a weight's change must be the expert's own "
            "(default 0.4); repeatable.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pack experts of one base together, so that each of them comes back.

    The pack holds what the experts differ by, and names the base, which it needs. PACK/NAME is an
    expert wherever a model may stand: in studies, recipes, and `restore`.
    """
    from mergesearch.merging import InputError
    from mergesearch.merging.export.packing import PackSettings, pack_experts

    paths = _named(experts)
    if masks == (rank is not None):
        raise InputError("pack: expected --rank R or --masks, received both or neither")
    if (masks and directions) or (threshold and not masks):
        raise InputError("pack: expected --directions with --rank, and --threshold with --masks")
    settings = PackSettings(rank or 0, directions or 0, _thresholds(threshold or (), paths))
    packed = pack_experts(base, paths, out, settings, overwrite=overwrite)
    result = {
        "out": str(out),
        "bytes": packed.size,
        "weight_bytes": packed.weights,
        "base_bytes": packed.base,
        "expert_bytes": dict(packed.experts),
        "share": packed.share,
        "errors": dict(packed.errors),
        "forms": dict(packed.forms),
    }
    emit(result, as_json, lambda: _lines(packed))


def restore(
    folder: Annotated[Path, typer.Argument(metavar="PACK", help="A folder that `pack` wrote.")],
    out: OutOption,
    expert: Annotated[str | None, typer.Option(metavar="NAME", help="Write this expert.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="Write this merge of its experts, named as there."),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an expert of a pack, or a merge of its experts, as a model folder."""
    from mergesearch.merging import InputError

    if (expert is None) == (recipe is None):
        raise InputError("restore: expected --expert NAME or --recipe RECIPE, one of them")
    if expert is not None:
        _restore_expert(folder, expert, out, overwrite, as_json)
    elif recipe is not None:
        _restore_merge(folder, recipe, out, overwrite, as_json)


def _restore_expert(folder: Path, name: str, out: Path, overwrite: bool, as_json: bool) -> None:
    from mergesearch.merging.export.restoring import restore_expert

    restored = restore_expert(folder, name, out, overwrite=overwrite)
    lost = restored.expert.error
    result = {
        "out": str(out),
        "expert": name,
        "bytes": restored.size,
        "error": lost,
        "exact": restored.exact,
    }
    missing = "bit for bit" if restored.exact else f"off by {lost:.1%} of its task vector's length"
    emit(
        result,
        as_json,
        lambda: [f"restored {name}, {restored.size / 1e6:.1f} MB, to {out}; {missing}"],
    )


def _restore_merge(folder: Path, recipe: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    from mergesearch.merging.export.folder import export_model
    from mergesearch.merging.export.restoring import recipe_from_pack
    from mergesearch.merging.recipe_file import load_recipe
    from mergesearch.spaces.groups import groups_by_name

    known = load_recipe(recipe, groups_by_name)
    merge = recipe_from_pack(known, folder)
    export_model(merge, out, overwrite=overwrite)
    result = {"out": str(out), "recipe": merge.digest}
    emit(result, as_json, lambda: [f"merged from {folder} into {out}"])


def _named(experts: Sequence[str]) -> dict[str, str]:
    """Name -> path; a path without a name goes by its folder."""
    from mergesearch.merging import InputError
    from mergesearch.merging.checkpoints.locations import short_name
    from mergesearch.merging.foreign.shown import shown

    paths: dict[str, str] = {}
    for text in experts:
        name, equals, path = text.partition("=")
        named = (name, path) if equals and "/" not in name else (short_name(text), text)
        if named[0] in paths:
            raise InputError(
                f"pack: expected different names, received {shown(named[0])} twice; write NAME=PATH"
            )
        paths[named[0]] = named[1]
    return paths


def _thresholds(texts: Sequence[str], paths: Mapping[str, str]) -> dict[str, float]:
    """λ of each expert that has one of its own."""
    from mergesearch.merging import InputError
    from mergesearch.merging.foreign.shown import shown

    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise InputError(
                f"--threshold: expected a number of at least 0, or NAME=NUMBER, received "
                f"{shown(text)}"
            )
        found |= {name: value} if name else dict.fromkeys(paths, value)
    return found


def _lines(packed: Packed) -> list[str]:
    forms = ", ".join(f"{count} {form}" for form, count in packed.forms.items())
    total = sum(packed.experts.values())
    sizes = f"{packed.size:,} bytes for {total:,} ({packed.share:.1%})"
    return [
        f"packed {len(packed.experts)} experts, {sizes}, to {packed.folder}",
        f"tensors   {forms}",
        f"base      {packed.base:,} bytes, not in the pack, needed to restore",
        *(
            f"expert    {name}: off by {error:.1%} of its task vector's length"
            for name, error in packed.errors.items()
        ),
    ]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command(
        epilog="Example: mergesearch pack zoo/digits/base zoo/digits/rotated zoo/digits/mirrored "
        "--rank 8 --out packs/digits"
    )(pack)
    app.command(
        epilog="Example: mergesearch restore packs/digits --expert rotated --out models/rotated; "
        "mergesearch restore packs/digits --recipe best.yaml --out models/best"
    )(restore)
