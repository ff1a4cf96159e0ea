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
    trials: Annotated[
        Path | None,
        typer.Option(
            "--trials",
            metavar="FILE.parquet",
            help="Write the table of trials instead, or with --out too; FILE.csv is possible.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run again, with its pictures and numbers.

    A run that ended is read from its folder alone: base, experts, data and storage may be gone.
    """
    from mergesearch.search.report.trials_table import table_format
    from mergesearch.search.runs.reading import read_run

    if trials is not None:
        table_format(trials)
    data = read_run(folder)
    written = {}
    if trials is None or out is not None:
        written["report"] = str(_write_report(folder, data, out))
    if trials is not None:
        _write_trials(data, trials)
        written["trials"] = str(trials)
    emit(written, as_json, lambda: [f"{what}: {where}" for what, where in written.items()])


def _write_report(folder: Path, data: ReportData, out: Path | None) -> Path:
    """Write the report of a run into its folder, or into another one, and give its page.

    Raises:
        RunFolderError: If it would go into the folder of a run that goes on.
    """
    from mergesearch.merging import RunFolderError
    from mergesearch.search.record.run_folder import RunFolder
    from mergesearch.search.report.writing import write_report

    driver = RunFolder(folder).driver()
    if out is None and driver is not None:
        raise RunFolderError(
            f"{folder}: expected a run that has ended, found {driver} at work; name another folder "
            "with --out"
        )
    target = out or folder
    write_report(data, target)
    return target / "report.html"


def _write_trials(data: ReportData, path: Path) -> None:
    from mergesearch.search.report.trials_table import table_format

    _write_file("--trials", path, table_format(path)(data))


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
    from mergesearch.search.report.page.runs_page import runs_page

    _write_file("--out", out, runs_page(runs).encode())


def _write_file(option: str, path: Path, content: bytes) -> None:
    """Write a file that an option names.

    Raises:
        InputError: If it cannot be written.
    """
    from mergesearch.merging import InputError
    from mergesearch.merging.checkpoints.atomic import write_atomically

    try:
        write_atomically(path, content)
    except OSError as error:
        raise InputError(
            f"{option} {path}: expected a file that can be written, received: "
            f"{error.strerror or error}"
        ) from None


def recipe(
    folder: RunArgument,
    trial: Annotated[
        int | None, typer.Option(metavar="N", help="Number of the trial; default: the winner.")
    ] = None,
    expected: Annotated[
        list[str] | None,
        typer.Option(
            "--expected",
            metavar="NAME=WEIGHT",
            help="The merge that is expected to suit objectives of these weights best, between "
            "measured trials.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a trial's merge as one would write it: coefficients by group, tensor and expert.

    `mergesearch merge` reads what is printed, changed by hand or not, and `--json` gives the exact
    form with offsets, which is all there is where coefficients vary inside a tensor.
    """
    from mergesearch.merging import InputError
    from mergesearch.search.runs.opened import open_run
    from mergesearch.search.runs.publishing import expected_recipe, recipe_as_text

    if trial is not None and expected:
        raise InputError("expected one of --trial and --expected, received both")
    opened = open_run(folder)
    notes: list[str] = []
    if expected:
        exact, notes = expected_recipe(opened.report_data(), opened.plan, expected)
    else:
        exact = opened.trial(trial).recipe
    text = recipe_as_text(exact, opened.plan.layout_of(exact))
    emit(exact.to_dict(), as_json, lambda: [*notes, text.rstrip()])


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
