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
    push_to: storing_options.PushOption = None,
    public: storing_options.PublicOption = False,
    dry_run: storing_options.DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make one merge by a recipe, without a search."""
    from mergesearch.merging.export.folder import export_model
    from mergesearch.merging.recipe_file import load_recipe
    from mergesearch.merging.tensors.parallel import usable_cores
    from mergesearch.search.plan.lineage import recipe_warnings
    from mergesearch.search.runs.card_facts import about_recipe
    from mergesearch.spaces.groups import groups_by_name

    publishing = storing_options.Publishing(push_to, public, dry_run)
    shard_bytes = storing_options.parse_size(shard_size)
    loaded = load_recipe(recipe, groups_by_name)
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
