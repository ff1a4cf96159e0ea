"""The verb that leads to the page on which people judge."""

from __future__ import annotations

from typing import Annotated

import typer

from mergesearch.search.cli.options import JsonOption, RunArgument, emit


def judge(
    folder: RunArgument,
    browser: Annotated[
        bool, typer.Option("--browser", help="Also open the page in a browser.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the address of the page on which people judge the models of a running study.

    The study serves the page while it runs; the address is another one in every session.
    """
    from mergesearch.merging import RunFolderError
    from mergesearch.search.judging.address import read_address
    from mergesearch.search.record.run_folder import RunFolder

    url = read_address(folder)
    if url is None or RunFolder(folder).driver() is None:
        raise RunFolderError(
            f"{folder}: expected a running study with an evaluator of kind preference, found none; "
            "start it with `mergesearch run`, and see that it says where to judge"
        )
    emit({"url": url}, as_json, lambda: [url])
    if browser:
        import webbrowser

        webbrowser.open(url)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(epilog="Example: mergesearch judge runs/chat --browser")(judge)
