"""The verbs about runs that are there: reports, comparisons, recipes, leftovers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergesearch.search.cli.completing import complete_run
from mergesearch.search.cli.options import JsonOption, RunArgument, emit

if TYPE_CHECKING:
    from mergesearch.search.report.data import ReportData


def report(
    folder: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to; default: the run folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run again, with its pictures and numbers.

    A run that ended is read from its folder alone: base, experts, data and storage may be gone.
    """
    from mergesearch.merging import RunFolderError
    from mergesearch.search.record.run_folder import RunFolder
    from mergesearch.search.report.writing import write_report
    from mergesearch.search.runs.reading import read_run

    data = read_run(folder)
    driver = RunFolder(folder).driver()
    if out is None and driver is not None:
        raise RunFolderError(
            f"{folder}: expected a run that has ended, found {driver} at work; name another folder "
            "with --out"
        )
    target = out or folder
    write_report(data, target)
    page = str(target / "report.html")
    emit({"report": page}, as_json, lambda: [f"report: {page}"])


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN ...",
            help="Folders of runs, the first one as the reference.",
            autocompletion=complete_run,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PAGE.html", help="Also write a page with all fronts."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the winners of runs on the test items, and say what the studies differ in.

    Runs that ended are read from their folders alone. Where two runs score the same items in the
    same way, intervals are paired item by item.
    """
    from mergesearch.search.report.runs_compared import compare_runs
    from mergesearch.search.runs.reading import read_run

    runs = [read_run(folder) for folder in folders]
    compared = compare_runs(runs)
    if out is not None:
        _write_page(out, runs)
    emit(compared.to_dict(), as_json, compared.lines)


def _write_page(out: Path, runs: Sequence[ReportData]) -> None:
    from mergesearch.merging import InputError
    from mergesearch.merging.checkpoints.atomic import write_atomically
    from mergesearch.search.report.page.runs_page import runs_page

    try:
        write_atomically(out, runs_page(runs).encode())
    except OSError as error:
        raise InputError(
            f"--out {out}: expected a file that can be written, received: {error.strerror or error}"
        ) from None


def recipe(
    folder: RunArgument,
    trial: Annotated[
        int | None, typer.Option(metavar="N", help="Number of the trial; default: the winner.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a trial's merge as one would write it: coefficients by group, tensor and expert.

    `mergesearch merge` reads what is printed, changed by hand or not, and `--json` gives the exact
    form with offsets, which is all there is where coefficients vary inside a tensor.
    """
    from mergesearch.merging.recipe_file import recipe_text, shorthand_of
    from mergesearch.search.runs.opened import open_run
    from mergesearch.spaces.groups import groupings_by_name

    opened = open_run(folder)
    exact = opened.trial(trial).recipe
    layout = opened.plan.layout
    written = None if layout is None else shorthand_of(exact, layout, groupings_by_name(layout))
    emit(exact.to_dict(), as_json, lambda: [recipe_text(written or exact.to_dict()).rstrip()])


def clean(
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of runs.")] = Path(
        "runs"
    ),
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove them; without it they are only listed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List prepared weights beside the runs that belong to none of them, and remove them.

    Weights belong to the runs that went on when they were last used. Those of runs that are gone
    can be prepared again; runs themselves are never touched.
    """
    from mergesearch.search.runs.cleaning import remove, unused_weights
    from mergesearch.search.runs.listed import size_text

    unused = unused_weights(runs)
    if yes:
        remove(unused)
    total = sum(each.bytes for each in unused)
    listed = {
        "removed": yes,
        "bytes": total,
        "unused": [{"name": each.name, "bytes": each.bytes} for each in unused],
    }
    verb = "removed" if yes else "unused, removed with --yes"
    lines = [f"{size_text(each.bytes):>10}  {each.name}" for each in unused]
    emit(listed, as_json, lambda: [*lines, f"{size_text(total):>10}  {verb}"])


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command(epilog="Example: mergesearch clean --runs runs, then with --yes")(clean)
    app.command(epilog="Example: mergesearch recipe runs/digits > recipe.yaml")(recipe)
    app.command(epilog="Example: mergesearch report runs/digits --out digits-report")(report)
    app.command(
        epilog="Example: mergesearch compare runs/digits-cma runs/digits-map --out compare.html",
    )(compare)
