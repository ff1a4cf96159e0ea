"""The command line. Imports what a verb needs inside the verb: help must answer at once.

Exit codes: 0 done, 1 the study failed, 2 the input is wrong, 130 interrupted (resumable).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mergesearch.search.cli.cluster import register
from mergesearch.search.cli.options import (
    JsonOption,
    RunArgument,
    SetOption,
    StudyArgument,
    usable_cores,
)
from mergesearch.search.cli.options import emit as _emit

if TYPE_CHECKING:
    from mergesearch.search.runs.opened import Run

app = typer.Typer(
    name="mergesearch",
    help="Finds good coefficients for merging fine-tuned models, by search rather than by hand.",
    epilog="Start with: mergesearch check study.yaml && mergesearch run study.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")
]
PreferOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=WEIGHT",
        help="Choose from the front by importance of the objectives; repeatable.",
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder to write the model to.")
]


class Style(StrEnum):
    """How progress is shown."""

    auto = "auto"
    rich = "rich"
    plain = "plain"
    json = "json"
    quiet = "quiet"


class Listing(StrEnum):
    """What ``ls`` lists."""

    strategies = "strategies"
    operators = "operators"
    evaluators = "evaluators"
    runs = "runs"


@app.command(epilog="Example: mergesearch check study.yaml --set space.granularity=block_module")
def check(study: StudyArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Validate a study and print what it would search; reads headers, never weights."""
    from mergesearch.search.cli.check import describe_plan, plan_dict
    from mergesearch.search.plan.loading import load_study
    from mergesearch.search.plan.planning import plan_study
    from mergesearch.search.runs.warm_start import warm_start_point, with_warm_start

    plan = plan_study(load_study(study, set_ or ()))
    if plan.spec.start is not None:
        plan = with_warm_start(plan, warm_start_point(plan, plan.spec.start))
    _emit(plan_dict(plan), as_json, lambda: describe_plan(plan))


@app.command(
    epilog="Example: mergesearch run study.yaml --set budget.trials=200 --set workers.backend=ray"
)
def run(
    study: StudyArgument,
    folder: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Run folder; default runs/NAME.")
    ] = None,
    set_: SetOption = None,
    progress: Annotated[Style, typer.Option(help="How progress is shown.")] = Style.auto,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="A running Ray cluster, as workers.address; auto on its nodes."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT",
            help="Serve Prometheus metrics; on loopback unless a host is given.",
        ),
    ] = None,
    trust_log: Annotated[
        bool,
        typer.Option(
            "--trust-log", help="Resume from the recorded points even if replay gives others."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study, or resume it where it stopped: the same command does both."""
    from mergesearch.evaluators.spec.evaluators import build_evaluator
    from mergesearch.search.observers.progress import default_style, make_observer
    from mergesearch.search.plan.loading import load_study
    from mergesearch.search.runs.driver import run_study
    from mergesearch.search.study.graceful_stop import GracefulStop

    spec = load_study(
        study, [*(set_ or ()), *([] if address is None else [f"workers.address={address}"])]
    )
    path = folder or Path("runs") / spec.name
    style = default_style() if progress is Style.auto else progress.value
    objectives = [
        objective.name for objective in build_evaluator(spec.evaluators, Path()).objectives
    ]
    observe, close = make_observer(style, objectives)
    drain = GracefulStop()
    seconds = spec.driver.drain_seconds
    try:
        with drain.on_signals(seconds, lambda: _say_draining(seconds)):
            finished = run_study(
                spec, path, observe, trust_log=trust_log, drain=drain, metrics=metrics
            )
    except KeyboardInterrupt:
        close()
        print(
            f"\nmergesearch: interrupted; `mergesearch run {study}` goes on from here",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    finally:
        close()
    _show_run(finished, as_json)


@app.command(
    epilog="Example: mergesearch show runs/digits --front; mergesearch show runs/digits --prefer "
    "accuracy=2"
)
def show(
    folder: RunArgument,
    front: Annotated[
        bool, typer.Option("--front", help="List the trials on the Pareto front.")
    ] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="List failed trials with their reasons.")
    ] = False,
    prefer: PreferOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a run: anchors and winner, the front, or failures. Works beside a live driver."""
    from mergesearch.search.runs.opened import as_dict, open_run

    opened = open_run(folder)
    if not (front or failed or prefer):
        _show_run(opened, as_json)
        return
    if prefer:
        chosen = [opened.preferred(prefer)]
    elif front:
        chosen = opened.report_data().front
    else:
        chosen = [record for record in opened.log.records if record.state == "failed"]
    _emit([as_dict(record) for record in chosen], as_json, lambda: _trial_lines(opened, chosen))


@app.command(epilog="Example: mergesearch export runs/digits --out best-model")
def export(
    folder: RunArgument,
    out: OutOption,
    trial: Annotated[
        int | None, typer.Option(metavar="N", help="Trial to export; default the winner.")
    ] = None,
    prefer: PreferOption = None,
    overwrite: OverwriteOption = False,
    no_rescore: Annotated[
        bool,
        typer.Option("--no-rescore", help="Skip scoring the exported model against the record."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a trial's model as a folder that transformers loads, then score it again to the
    recorded figure.
    """
    from mergesearch.merging import InputError
    from mergesearch.merging.export.folder import export_model
    from mergesearch.search.runs.exported import export_bundle, rescore
    from mergesearch.search.runs.opened import open_run

    opened = open_run(folder)
    if opened.plan.layout is None:
        raise InputError(
            f"{folder}: expected a study of checkpoints, received an analytic problem: nothing to "
            "export"
        )
    if prefer and trial is not None:
        raise InputError("--prefer: expected --trial or --prefer, received both")
    record = opened.preferred(prefer) if prefer else opened.trial(trial)
    facts = _facts(opened, record.number)
    routing = dict(record.recipe.routing)
    result: dict[str, Any] = {
        "trial": record.number,
        "out": str(out),
        "routing": routing.get("method"),
    }
    if routing:
        export_bundle(opened, record, out, facts=facts, overwrite=overwrite, threads=usable_cores())
        what = f"not a single checkpoint: {routing['method']} merges for each {routing['per']}"
        lines = [
            f"trial {record.number} exported to {out}, {what}; README.md there says how to load it"
        ]
    else:
        exported = export_model(
            record.recipe, out, facts=facts, overwrite=overwrite, threads=usable_cores()
        )
        result["rounding"] = exported.rounding.share
        lines = [f"trial {record.number} exported to {out}, {exported.rounding.sentence()}"]
    if not no_rescore and record.state == "complete":
        split, measurement, same = rescore(opened, record, out)
        result |= {"split": split, "values": dict(measurement.values), "identical": same}
        figures = "  ".join(f"{name} {value:.6g}" for name, value in measurement.values.items())
        verb = "identical to the record" if same else "DIFFERENT from the record"
        how = "mergesearch" if routing else "transformers"
        lines.append(f"loaded with {how} and scored again on {split} items: {figures} ({verb})")
    _emit(result, as_json, lambda: lines)
    if not result.get("identical", True):
        _fail(
            "the exported model does not score as recorded; were device, threads or versions "
            "changed?",
            1,
        )


@app.command(epilog="Example: mergesearch merge recipe.yaml --out merged-model")
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")],
    out: OutOption,
    overwrite: OverwriteOption = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Store merged tensors in this dtype; default the base's own."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tensors merged at once; more take more memory. Default: one per core."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Merge by a recipe, without a search."""
    from mergesearch.merging.export.folder import export_model
    from mergesearch.merging.recipe_file import load_recipe

    loaded = load_recipe(recipe)
    started = time.perf_counter()
    rounding = export_model(
        loaded, out, overwrite=overwrite, dtype=dtype, threads=threads or usable_cores()
    ).rounding
    seconds = time.perf_counter() - started
    result = {
        "digest": loaded.digest,
        "out": str(out),
        "rounding": rounding.share,
        "seconds": seconds,
    }
    _emit(result, as_json, lambda: [f"merged into {out} in {seconds:.1f} s, {rounding.sentence()}"])


@app.command(epilog="Example: mergesearch dashboard runs/digits --port 8080")
def dashboard(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Folder of a run; or give --storage.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="A database, all studies of which are shown.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on the host; 0 picks a free one.")
    ] = 8080,
    host: Annotated[
        str, typer.Option(help="Address to bind; anything but loopback needs a token or a proxy.")
    ] = "127.0.0.1",
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Token that every request must bring; made if it is missing."
        ),
    ] = None,
    proxy_header: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Header that a reverse proxy sets for users it knows."),
    ] = None,
    allow_writes: Annotated[
        bool, typer.Option("--allow-writes", help="Let notes be edited; needs a token.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Bind beyond loopback without token and proxy.")
    ] = False,
) -> None:
    """Serve runs in optuna-dashboard, read-only, until Ctrl-C; the report is at /report."""
    from mergesearch.merging import InputError
    from mergesearch.search.dashboard.access import find_token
    from mergesearch.search.dashboard.serving import serve
    from mergesearch.search.record.run_folder import RunFolder
    from mergesearch.search.runs.opened import storage_location

    if (folder is None) == (storage is None):
        raise InputError(
            "dashboard: expected a run folder or --storage, received "
            f"{'both' if folder else 'neither'}"
        )
    location: str | Path = os.path.expandvars(storage or "")
    if folder is not None:
        run_folder = RunFolder(folder)
        location = storage_location(run_folder.load(), run_folder)
    report = None if folder is None else folder / "report.html"
    what = folder or "the studies of the database"
    end = " (report at {url}report)" if folder else ""
    serve(
        location,
        report,
        host=host,
        port=port,
        token=find_token(token_file),
        proxy_header=proxy_header,
        allow_writes=allow_writes,
        insecure=insecure,
        ready=lambda url: print(
            f"serving {what} at {url}{end.format(url=url)}; Ctrl-C stops", flush=True
        ),
    )


@app.command(epilog="Example: mergesearch ls operators")
def ls(
    what: Annotated[Listing, typer.Argument(help="What to list.")], as_json: JsonOption = False
) -> None:
    """List strategies, operators, evaluators, or the runs below ./runs."""
    from mergesearch.search.cli.check import listing, listing_lines

    rows = listing(what.value)
    _emit(rows, as_json, lambda: listing_lines(what.value, rows))


register(app)


def main() -> None:
    """Entry point: one-line errors with the right exit code."""
    from mergesearch.merging import InputError, MergesearchError

    signal.signal(signal.SIGTERM, _interrupt)
    # Scorers that a study names may lie where the command runs, as for `python -m`.
    sys.path.insert(0, os.getcwd())
    try:
        app()
    except InputError as error:
        _fail(str(error), 2)
    except MergesearchError as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        # The reader of a pipe left (`mergesearch ls operators | head -1`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _say_draining(seconds: float) -> None:
    text = (
        f"\nmergesearch: stopping; trials that run have {seconds:g} s to finish, interrupt "
        "again to leave them"
    )
    print(text, file=sys.stderr, flush=True)


def _interrupt(signum: int, frame: object) -> NoReturn:
    """SIGTERM ends a run as Ctrl-C does: cleanly, resumable."""
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    from mergesearch.search.redact import redact

    print(f"mergesearch: error: {redact(message)}", file=sys.stderr)
    sys.exit(code)


def _show_run(opened: Run, as_json: bool) -> None:
    from mergesearch.search.report.tables import sentences, text_lines
    from mergesearch.search.report.writing import as_json as report_dict

    data = opened.report_data()
    if not as_json and sys.stdout.isatty():
        from rich.console import Console

        from mergesearch.search.report.tables import rich_table

        Console().print(rich_table(data))
        lines: list[str] = []
    else:
        lines = [] if as_json else text_lines(data)
    states = [record.state for record in opened.log.records]
    counts = ", ".join(
        f"{states.count(s)} {s}"
        for s in ("complete", "partial", "failed", "running")
        if states.count(s)
    )
    closing = [
        "",
        *sentences(data),
        f"{len(states)} trials ({counts}); report: {opened.folder.path / 'report.html'}",
    ]
    _emit(report_dict(data) if as_json else None, as_json, lambda: [*lines, *closing])


def _trial_lines(opened: Run, records: list[Any]) -> list[str]:
    lines = []
    for record in records:
        name = f"trial {record.number}" + (f" ({record.name})" if record.name else "")
        values = "  ".join(f"{key} {value:.4g}" for key, value in record.values.items())
        reason = (
            "" if record.failure is None else f"{record.failure.kind}: {record.failure.message}"
        )
        lines.append(f"{name}  {values}{reason}")
    return lines or ["none"]


def _facts(opened: Run, number: int) -> dict[str, str]:
    """Scores for the model card, and what they were measured with."""
    from mergesearch.search.report.summary import TRANSDUCTIVE
    from mergesearch.search.spec.comparison import evaluation_digest

    verdict = opened.verdict
    facts = {"study": opened.plan.spec.name, "trial": str(number)}
    for split in ("search", "validation", "test"):
        if split == "search":
            record = opened.log.records[number]
            values = record.values
            errors = record.errors
        elif verdict is not None and number in verdict.scores.get(split, {}):
            score = verdict.scores[split][number]
            values = score.values
            errors = score.errors
        else:
            continue
        for name, value in values.items():
            spread = f" ± {errors[name]:.4g}" if name in errors else ""
            facts[f"{name}, {split} items"] = f"{value:.4g}{spread}"
    facts["evaluation settings"] = evaluation_digest(opened.plan.spec)
    if opened.plan.evaluator.transductive:
        facts["evaluation"] = TRANSDUCTIVE
    return facts
