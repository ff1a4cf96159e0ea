"""The command line.

A verb imports what it needs inside its function: help must answer at once.
Exit codes: 0 done, 1 the study failed, 2 the input is wrong, 130 interrupted (resumable).
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from mergesearch.search.cli import (
    comparing,
    converting,
    exporting,
    helping,
    importing,
    initiating,
    judging,
    locking,
    packing,
    repairing,
    replaying,
    reports,
)
from mergesearch.search.cli.cluster import register
from mergesearch.search.cli.completing import complete_run, teach_bash
from mergesearch.search.cli.models import distilling
from mergesearch.search.cli.options import (
    JsonOption,
    PreferOption,
    RunArgument,
    SetOption,
    StudyArgument,
    emit,
    say,
)

#: Lines of one error.
MOST_LINES = 30
#: Objects that are made before garbage collection looks at them; some MB.
YOUNG_OBJECTS = 20_000

app = typer.Typer(
    name="mergesearch",
    help="Finds good coefficients for merging fine-tuned models, by search rather than by hand.",
    epilog="Start with: mergesearch init BASE EXPERT EXPERT --data FILE",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
    spaces = "spaces"
    runs = "runs"


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"mergesearch {version('mergesearch')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Finds good coefficients for merging fine-tuned models, by search rather than by hand."""


@app.command(epilog="Example: mergesearch check study.yaml --set space.granularity=block_module")
def check(
    study: StudyArgument,
    set_: SetOption = None,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|GB",
            help="Plan for a card that need not be here, such as h200-141, or of so many GB.",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of cards of the node.")
    ] = None,
    cost: Annotated[
        bool,
        typer.Option(
            "--cost",
            help="Load the models, time a trial for about two seconds, and say what the study "
            "takes: trials per hour, time, and the bill where workers.price_per_hour is set.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Validate a study and print its plan.

    Reads the headers of the checkpoints, and samples of their weights to see that the experts come
    from the base; only `granularity: chunk` and `--cost` read all weights.
    """
    from mergesearch.search.cli.check import describe_plan, plan_dict, planned_cards
    from mergesearch.search.plan.card_check import check_cards_there
    from mergesearch.search.plan.checks import check_objectives
    from mergesearch.search.plan.lineage import study_lineages
    from mergesearch.search.plan.loading import load_study
    from mergesearch.search.plan.planning import plan_study
    from mergesearch.search.plan.preparing import preparing_of
    from mergesearch.search.runs.cost.told import timed_cost
    from mergesearch.search.runs.start.warm_start import started

    plan = plan_study(load_study(study, set_ or ()))
    plan = started(plan)
    check_objectives(plan)
    cards = planned_cards(plan, card, count)
    preparing = preparing_of(plan, None if cards is None else cards.card)
    described = (plan, cards, preparing, study_lineages(plan))
    timed = timed_cost(plan, card) if cost else None
    emit(
        plan_dict(*described, timed) if as_json else None,
        as_json,
        lambda: describe_plan(*described, timed),
    )
    if card is None:
        check_cards_there(plan)


@app.command(
    epilog="Example: mergesearch run study.yaml --set budget.trials=200 --set workers.backend=ray"
)
def run(
    study: StudyArgument,
    folder: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Run folder; default: runs/NAME.")
    ] = None,
    set_: SetOption = None,
    progress: Annotated[Style, typer.Option(help="How progress is shown.")] = Style.auto,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Address of a running Ray cluster, as workers.address; auto on one of its nodes.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT",
            help="Serve Prometheus metrics, on loopback unless a host is given.",
        ),
    ] = None,
    trust_log: Annotated[
        bool,
        typer.Option(
            "--trust-log",
            help="Resume from the recorded points even if the strategy asks for others now.",
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="Measure failed trials again, anchors too, before going on."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study, or resume it.

    The same command does both: a study resumes where it stopped. With another budget, such as
    --set budget.trials=500, it goes on where it ended.
    """
    from mergesearch.search.cli.resuming import resume_command
    from mergesearch.search.cli.showing import print_run
    from mergesearch.search.observers.progress import default_style
    from mergesearch.search.plan.loading import load_study
    from mergesearch.search.record.run_folder import RunFolder
    from mergesearch.search.runs.following import run_and_show

    if folder is not None:
        RunFolder(folder).check_plugins()
    spec = load_study(
        study, [*(set_ or ()), *([] if address is None else [f"workers.address={address}"])]
    )
    path = folder or Path("runs") / spec.name
    style = default_style() if progress is Style.auto else progress.value
    try:
        finished = run_and_show(
            spec,
            path,
            style,
            _say_draining,
            trust_log=trust_log,
            retry_failed=retry_failed,
            metrics=metrics,
        )
    except KeyboardInterrupt:
        again = resume_command(study, folder, set_ or (), address, trust_log=trust_log)
        print(file=sys.stderr)
        say(f"mergesearch: interrupted; `{again}` resumes from here")
        raise typer.Exit(130) from None
    print_run(finished.report_data(), as_json)


@app.command(
    epilog="Example: mergesearch show runs/digits --front; "
    "mergesearch show runs/digits --prefer accuracy=2"
)
def show(
    folder: RunArgument,
    front: Annotated[
        bool, typer.Option("--front", help="List the trials on the Pareto fronts.")
    ] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="List failed trials with their reasons.")
    ] = False,
    prefer: PreferOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the results of a run.

    Shows anchors and winner, or the trials of the fronts, or failures; the study may be running.
    Members of the front are chosen by values that are estimated from all trials; the members by
    their own scores follow.
    """
    from mergesearch.search.cli.showing import as_dict, print_front, print_run, trial_lines
    from mergesearch.search.record.trial_record import standing_failures
    from mergesearch.search.report.preference import preferred
    from mergesearch.search.runs.reading import read_run

    data = read_run(folder)
    if not (front or failed or prefer):
        print_run(data, as_json)
        return
    if prefer:
        chosen = [preferred(data, prefer)]
    elif front:
        print_front(data, as_json)
        return
    else:
        chosen = standing_failures(data.records)
    emit([as_dict(record) for record in chosen], as_json, lambda: trial_lines(chosen))


@app.command(epilog="Example: mergesearch dashboard runs/digits --port 8080")
def dashboard(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="Folder of a run; give this or --storage.",
            autocompletion=complete_run,
        ),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Database whose studies are all shown.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on the host; 0 picks a free one.")
    ] = 8080,
    host: Annotated[
        str, typer.Option(help="Address to bind; all but loopback need a token or a proxy.")
    ] = "127.0.0.1",
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with the token that every request must bring; created if it does not exist.",
        ),
    ] = None,
    proxy_header: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Header that a reverse proxy sets for users it knows."),
    ] = None,
    allow_writes: Annotated[
        bool, typer.Option("--allow-writes", help="Allow users to edit notes; needs a token.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Bind beyond loopback without a token or a proxy.")
    ] = False,
) -> None:
    """Serve runs in optuna-dashboard.

    Serves until Ctrl-C. Nothing can be changed by default; the report of a run is at /report.
    """
    from mergesearch.merging import InputError
    from mergesearch.search.dashboard.access import find_token
    from mergesearch.search.dashboard.serving import serve
    from mergesearch.search.record.run_folder import RunFolder
    from mergesearch.search.runs.wiring import storage_location

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
        artifacts=None if folder is None else RunFolder(folder).artifacts,
        ready=lambda url: print(
            f"serving {what} at {url}{end.format(url=url)}; Ctrl-C stops", flush=True
        ),
    )


@app.command(epilog="Example: mergesearch ls operators")
def ls(
    what: Annotated[Listing, typer.Argument(help="What to list.")], as_json: JsonOption = False
) -> None:
    """List strategies, operators, evaluators, kinds of space, runs.

    Those of installed plug-ins are listed too. Runs are those below ./runs.
    """
    from mergesearch.search.cli.listing import listing, listing_lines

    rows = listing(what.value)
    emit(rows, as_json, lambda: listing_lines(what.value, rows))


initiating.register(app)
helping.register(app)
reports.register(app)
comparing.register(app)
converting.register(app)
distilling.register(app)
locking.register(app)
packing.register(app)
importing.register(app)
exporting.register(app)
replaying.register(app)
repairing.register(app)
judging.register(app)
register(app)


def main() -> None:
    """Entry point: every problem is one line, and the exit code says what kind it is."""
    from mergesearch.merging import InputError, MergesearchError
    from mergesearch.merging.extensions.import_path import protected_children

    # Imports make objects that stay: the usual 700 would look at them over and over.
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    interrupts: list[int] = []

    def interrupt(signum: int, frame: object) -> NoReturn:
        interrupts.append(signum)
        raise KeyboardInterrupt

    # A run ends on SIGTERM as on Ctrl-C: cleanly, so that it can be resumed.
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    teach_bash()
    try:
        with protected_children():
            app()
    except InputError as error:
        _fail(str(error), 2)
    except MergesearchError as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        # The reader of a pipe is gone (`mergesearch ls operators | head -1`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError:
        _fail("expected enough memory, received none for what was asked; ask for less", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception:
        # A library whose own code a signal met may make another error of the interrupt.
        if not interrupts:
            raise
        _fail("interrupted", 130)
    finally:
        # `python -m` ends by SIGINT, whatever the exit code, if the last text that was executed,
        # here or in an import, was left by a KeyboardInterrupt; this text is left in peace.
        exec("")


def _say_draining(seconds: float) -> None:
    print(file=sys.stderr)
    say(
        f"mergesearch: stopping; running trials have {seconds:g} s to finish, and another "
        "interrupt abandons them"
    )


def _fail(message: str, code: int) -> NoReturn:
    for line in message.split("\n")[:MOST_LINES]:
        say(f"mergesearch: error: {line}")
    sys.exit(code)
