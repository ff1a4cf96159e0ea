"""The verbs that write models: of trials, and of recipes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mergesearch.search.cli import form_options, storing_options
from mergesearch.search.cli.options import (
    JsonOption,
    OutOption,
    OverwriteOption,
    PreferOption,
    RunArgument,
    emit,
)

HeadOption = Annotated[
    str | None,
    typer.Option(
        metavar="EXPERT",
        help="Where experts keep heads of their own: write the whole model with this one.",
    ),
]


def export(
    folder: RunArgument,
    out: form_options.FolderOption = None,
    adapter: form_options.AdapterOption = None,
    adapter_rank: form_options.AdapterRankOption = None,
    lossy: form_options.LossyOption = False,
    gguf: form_options.GgufOption = None,
    gguf_type: form_options.GgufTypeOption = None,
    trial: Annotated[
        int | None, typer.Option(metavar="N", help="Number of the trial; default: the winner.")
    ] = None,
    prefer: PreferOption = None,
    front: storing_options.FrontOption = False,
    head: HeadOption = None,
    overwrite: OverwriteOption = False,
    dtype: storing_options.DtypeOption = None,
    shard_size: storing_options.ShardSizeOption = storing_options.SHARD_SIZE,
    no_rescore: Annotated[
        bool,
        typer.Option("--no-rescore", help="Do not score the exported model against the record."),
    ] = False,
    push_to: storing_options.PushOption = None,
    public: storing_options.PublicOption = False,
    dry_run: storing_options.DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a trial's model as a folder, as an adapter, or as a GGUF file.

    transformers loads the folder. The model is scored again and compared with the record.
    """
    from mergesearch.merging import InputError
    from mergesearch.search.runs.export_forms import Forms, export_forms
    from mergesearch.search.runs.exporting import Exported, Storing, export_front, export_trial
    from mergesearch.search.runs.opened import open_run

    forms = Forms(adapter, adapter_rank, lossy, gguf, gguf_type)
    forms.check(out)
    publishing = storing_options.Publishing(push_to, public, dry_run)
    if publishing.wanted and (out is None or front):
        raise InputError("--push-to: expected --out DIR of one model, received none or a front")
    storing = Storing(dtype, storing_options.parse_size(shard_size))
    opened = open_run(folder)
    if prefer and trial is not None:
        raise InputError("--prefer: expected --trial or --prefer, received both")
    if front:
        if out is None or forms != Forms() or prefer or trial is not None or head:
            raise InputError("--front: expected --out DIR and no other choice, received another")
        written = export_front(
            opened, out, overwrite=overwrite, rescored=not no_rescore, storing=storing
        )
        emit(written.result, as_json, lambda: written.lines)
        _check_agreement(written.result)
        return
    record = opened.preferred(prefer) if prefer else opened.trial(trial)

    def write_model(out: Path) -> Exported:
        return export_trial(
            opened,
            record,
            out,
            overwrite=overwrite,
            rescored=not no_rescore,
            head=head,
            storing=storing,
        )

    exported = export_forms(
        opened,
        record,
        forms,
        out,
        write_model,
        overwrite=overwrite,
        rescored=not no_rescore,
        head=head,
    )
    agrees = exported.result.get("agrees", True)
    more, lines = publishing.publish(out) if out is not None and agrees else ({}, [])
    emit({**exported.result, **more}, as_json, lambda: [*exported.lines, *lines])
    _check_agreement(exported.result)


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")],
    out: OutOption,
    head: HeadOption = None,
    overwrite: OverwriteOption = False,
    dtype: storing_options.DtypeOption = None,
    shard_size: storing_options.ShardSizeOption = storing_options.SHARD_SIZE,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tensors merged at once; more take more memory. Default: one for each core."
        ),
    ] = None,
    allow_unrelated: Annotated[
        str | None,
        typer.Option(
            metavar="REASON",
            help="Merge experts that do not come from the base; the model card says why.",
        ),
    ] = None,
    members: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For a mixture of experts made smaller: also write models that hold one member of "
            "each group, as experts for a study of the groups' weights.",
        ),
    ] = None,
    push_to: storing_options.PushOption = None,
    public: storing_options.PublicOption = False,
    dry_run: storing_options.DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make one merge by a recipe, without a search.

    A recipe without experts whose operator is one on mixtures gives a mixture fewer experts.
    """
    from mergesearch.merging.export.folder import export_model
    from mergesearch.merging.mixture.recipe import is_mixture_recipe
    from mergesearch.merging.recipe_file import load_recipe
    from mergesearch.merging.tensors.parallel import usable_cores
    from mergesearch.search.plan.checks import check_calibration
    from mergesearch.search.plan.lineage import recipe_warnings
    from mergesearch.search.runs.card_facts import about_recipe
    from mergesearch.spaces.groups import groups_by_name

    publishing = storing_options.Publishing(push_to, public, dry_run)
    shard_bytes = storing_options.parse_size(shard_size)
    if is_mixture_recipe(recipe):
        _refuse_given(head=head, dtype=dtype, threads=threads, allow_unrelated=allow_unrelated)
        told, said = _smaller_mixture(recipe, out, members, overwrite, shard_bytes)
        more, published = publishing.publish(out)
        emit({**told, **more}, as_json, lambda: [*said, *published])
        return
    _refuse_given(members=members)
    loaded = load_recipe(recipe, groups_by_name)
    check_calibration(loaded)
    warnings = recipe_warnings(loaded, allow_unrelated)
    started = time.perf_counter()
    exported = export_model(
        loaded,
        out,
        facts={"lineage": "; ".join(warnings)} if warnings else None,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        dtype=dtype,
        threads=threads or usable_cores(),
        head=head,
        about=about_recipe(loaded),
    )
    rounding = exported.rounding
    seconds = time.perf_counter() - started
    result = {
        "digest": loaded.digest,
        "out": str(out),
        "rounding": rounding.share,
        "seconds": seconds,
        "warnings": warnings,
        "untouched": exported.untouched.to_dict(),
    }
    lines = [f"merged into {out} in {seconds:.1f} s, {rounding.sentence()}"]
    lines += [exported.untouched.sentence] if exported.untouched.sentence else []
    lines += [f"warning: {line}" for line in warnings]
    more, published = publishing.publish(out)
    emit({**result, **more}, as_json, lambda: [*lines, *published])


def add(
    merged: Annotated[
        Path,
        typer.Argument(metavar="MERGE", help="Folder of a merge by OPCM, or of a first expert."),
    ],
    expert: Annotated[
        str, typer.Argument(metavar="EXPERT", help="The expert that joins: a folder or ORG/NAME.")
    ],
    out: OutOption,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base, where MERGE is an expert without a recipe."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the expert; default: the end of its path."),
    ] = None,
    overwrite: OverwriteOption = False,
    dtype: storing_options.DtypeOption = None,
    shard_size: storing_options.ShardSizeOption = storing_options.SHARD_SIZE,
    allow_unrelated: Annotated[
        str | None,
        typer.Option(
            metavar="REASON",
            help="Merge an expert that does not come from the base; the model card says why.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add one expert to a finished merge, without the experts that it was made of.

    The result is that of the operator opcm on all experts in this order, within the rounding of the
    stored merge; time and memory do not depend on how many there were.
    """
    from mergesearch.merging.export.adding import continued, export_next, next_recipe
    from mergesearch.merging.tensors.parallel import usable_cores
    from mergesearch.search.grammar import counted
    from mergesearch.search.plan.lineage import recipe_warnings
    from mergesearch.search.runs.card_facts import about_recipe

    shard_bytes = storing_options.parse_size(shard_size)
    known = continued(merged, base)
    recipe = next_recipe(known, merged, expert, name)
    warnings = recipe_warnings(recipe, allow_unrelated)
    exported = export_next(
        recipe,
        out,
        facts={"lineage": "; ".join(warnings)} if warnings else None,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        dtype=dtype,
        threads=usable_cores(),
        about=about_recipe(recipe),
    )
    result = {
        "digest": recipe.digest,
        "out": str(out),
        "experts": known.joined + 1,
        "rounding": exported.rounding.share,
        "warnings": warnings,
    }
    before = counted(known.joined, "expert")
    lines = [f"added {recipe.experts[1].name} to {before} in {out}, {exported.rounding.sentence()}"]
    lines += [f"warning: {line}" for line in warnings]
    emit(result, as_json, lambda: lines)


def _refuse_given(**options: object) -> None:
    """Refuse options that say nothing about a recipe of this kind.

    Raises:
        InputError: With the first that was given.
    """
    from mergesearch.merging import InputError

    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        raise InputError(
            f"--{given.replace('_', '-')}: expected none with a recipe of this kind, received one; "
            "leave it out"
        )


def _smaller_mixture(
    recipe: Path, out: Path, members: Path | None, overwrite: bool, shard_bytes: int
) -> tuple[dict[str, Any], list[str]]:
    """Give a mixture fewer experts; the result for programs and for people."""
    from mergesearch.merging.mixture.recipe import load_mixture_recipe
    from mergesearch.merging.mixture.writing import shrink_mixture

    started = time.perf_counter()
    made = shrink_mixture(
        load_mixture_recipe(recipe),
        out,
        members=members,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
    )
    seconds = time.perf_counter() - started
    blocks = made.plan.blocks
    result = {
        "out": str(out),
        "experts": made.plan.stored,
        "groups": {block.layer.block: [list(group) for group in block.groups] for block in blocks},
        "bytes": {"before": made.before, "after": made.after},
        "members": [str(folder) for folder in made.members],
        "notes": list(made.notes),
        "seconds": seconds,
    }
    sizes = f"{made.after / 1e6:.1f} MB, {made.before / 1e6:.1f} before"
    counts = f"{made.plan.stored} experts in each of {len(blocks)} blocks"
    before = blocks[0].layer.experts
    lines = [f"wrote {out} in {seconds:.1f} s: {counts}, {before} before; {sizes}"]
    if made.members:
        lines.append(f"wrote {len(made.members)} models of members to {members}")
    return result, [*lines, *(f"note: {note}" for note in made.notes)]


def _check_agreement(result: Mapping[str, Any]) -> None:
    """End as failed where an exported model does not score as recorded.

    Raises:
        MergesearchError: If it does not.
    """
    from mergesearch.merging import MergesearchError
    from mergesearch.search.runs.exporting import DISAGREES

    if not result.get("agrees", True):
        raise MergesearchError(DISAGREES)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command(
        epilog="Example: mergesearch export runs/digits --out best-model; "
        "mergesearch export runs/digits --out best --push-to org/name --dry-run"
    )(export)
    app.command(epilog="Example: mergesearch merge recipe.yaml --out merged-model")(merge)
    app.command(
        epilog="Example: mergesearch add maths code --base llama --out both --dtype float32; "
        "mergesearch add both poems --out three --dtype float32"
    )(add)
