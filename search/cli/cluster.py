"""The verbs for clusters: submit, status, logs, stop and doctor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mergesearch.merging.foreign.shown import printable
from mergesearch.search.cli.options import JsonOption, SetOption, StudyArgument, emit

JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="Id that `submit` printed; `status` lists them.")
]
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="URL of the cluster's job server; default: $RAY_API_SERVER_ADDRESS, else "
        "http://127.0.0.1:8265.",
    ),
]


def submit(
    study: StudyArgument,
    address: ServerOption = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--run", metavar="DIR", help="Run folder on the cluster; default: runs/NAME, as here."
        ),
    ] = None,
    include: Annotated[
        list[Path] | None,
        typer.Option(
            "--include",
            metavar="PATH",
            help="File or folder of code that the study needs; repeatable.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the study's log until it ends.")
    ] = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a study on a Ray cluster.

    The same command resumes it. Code and study are sent, weights are not.
    """
    from mergesearch.search.cli import jobs
    from mergesearch.search.plan.loading import load_study

    spec = load_study(study, set_ or ())
    run = (
        folder
        if folder is not None and folder.is_absolute()
        else (folder or Path("runs") / spec.name).absolute()
    )
    server = address or jobs.default_address()
    job_id = jobs.submit(spec, server, run, include or ())
    lines = [
        (
            f"submitted {job_id}; `mergesearch logs {job_id} --follow` shows its progress, and the "
            "same command resumes it"
        )
    ]
    emit({"job": job_id, "address": server, "run": str(run)}, as_json, lambda: lines)
    if follow:
        _print_log(server, job_id, True)


def status(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="Id that `submit` printed; default: all.")
    ] = None,
    address: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the studies of a Ray cluster."""
    from mergesearch.search.cli import jobs

    server = address or jobs.default_address()
    known = jobs.jobs(server) if job is None else [jobs.job(server, job)]
    emit(
        [vars(each) for each in known],
        as_json,
        lambda: [line for each in known for line in each.lines()] or ["none"],
    )


def logs(
    job: JobArgument,
    address: ServerOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Continue until the study ends.")
    ] = False,
) -> None:
    """Print the log of a study on a cluster.

    The log has a line of JSON for every event.
    """
    from mergesearch.search.cli import jobs

    _print_log(address or jobs.default_address(), job, follow)


def stop(job: JobArgument, address: ServerOption = None, as_json: JsonOption = False) -> None:
    """Stop a study on a cluster.

    It resumes when it is submitted again.
    """
    from mergesearch.search.cli import jobs

    stopped = jobs.stop(address or jobs.default_address(), job)
    emit(vars(stopped), as_json, stopped.lines)


def doctor(
    study: Annotated[
        Path | None,
        typer.Argument(metavar="[STUDY.yaml]", help="Study that the machine is checked for."),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Database to check; default: the study's.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster to check; default: the study's."),
    ] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a study can run here.

    Checks versions, devices, disk, memory, storage and cluster; the exit code is 1 if one fails.
    """
    from mergesearch.search.cli.doctor import examine

    checks = examine(study, set_ or (), storage, address)
    emit([vars(check) for check in checks], as_json, lambda: [check.line() for check in checks])
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


def _print_log(address: str, job_id: str, follow: bool) -> None:
    from mergesearch.search.cli import jobs

    for text in jobs.logs(address, job_id, follow):
        sys.stdout.write(printable(text, keep="\n\t"))
        sys.stdout.flush()


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    examples: dict[Callable[..., None], str] = {
        submit: "mergesearch submit study.yaml --address http://head:8265 --include scorer.py",
        status: "mergesearch status --address http://head:8265 --json",
        logs: "mergesearch logs digits-1a2b3c4d --follow",
        stop: "mergesearch stop digits-1a2b3c4d",
        doctor: "mergesearch doctor study.yaml --storage postgresql://me@db/merges",
    }
    for verb, example in examples.items():
        app.command(epilog=f"Example: {example}")(verb)
