"""What every fuzzer demands of a reader or a verb: one kind of error, short, printable, in time."""

from __future__ import annotations

import contextlib
import io
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import FrameType
from typing import Any

from mergesearch.merging import InputError, MergesearchError
from mergesearch.merging.foreign.shown import MESSAGE_LIMIT, printable

#: Seconds after which a call hangs; real ones take milliseconds.
PATIENCE = 30
#: The most characters of a line of an error, beside the paths in it.
LINE_LIMIT = MESSAGE_LIMIT
#: The most lines of an error.
MOST_LINES = 25


class Finding(AssertionError):
    """A promise that did not hold."""


def demand(holds: bool, what: str) -> None:
    """Raise a finding unless a promise holds."""
    if not holds:
        raise Finding(what)


@contextlib.contextmanager
def in_time(seconds: int = PATIENCE) -> Iterator[None]:
    """Raise a finding where the block takes longer; for the main thread of a process."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Finding(f"expected an answer within {seconds} s, received none")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_message(text: str, paths: int = 400) -> None:
    """Demand lines that are short and printable.

    Args:
        text: An error as it is printed.
        paths: Characters that the paths in a line may have in addition.
    """
    lines = text.split("\n")
    demand(bool(text.strip()), "expected a message, received none")
    demand(len(lines) <= MOST_LINES, f"expected at most {MOST_LINES} lines, received {len(lines)}")
    for line in lines:
        size = len(line)
        most = LINE_LIMIT + paths
        demand(size <= most, f"expected lines of {most} characters, received {size}: {line!r:.200}")
        demand(printable(line) == line, f"expected printable text, received {line[:200]!r}")


def read_or_refuse(read: Callable[[], Any], error: type[Exception] = MergesearchError) -> Any:
    """What a reader returns, or None where it refuses with an error of the product.

    Raises:
        Finding: If it raises anything else, hangs, or its message is long or not printable.
    """
    try:
        with in_time():
            return read()
    except error as refused:
        check_message(str(refused))
        return None
    except Finding:
        raise
    except BaseException as surprise:
        raise Finding(_told(surprise)) from surprise


def run_verb(arguments: Sequence[str], *, codes: Sequence[int] = (0, 2)) -> tuple[int, str]:
    """Run a verb of the command line in this process.

    Args:
        arguments: As they are typed after ``mergesearch``.
        codes: Exit codes that are allowed: 0 done, 1 the study failed, 2 the input is wrong.

    Returns:
        The exit code, and what was printed: the result, or the error.

    Raises:
        Finding: If it raises anything but the product's errors, hangs, ends with another code, or
            prints what is not printable.
    """
    out = io.StringIO()
    try:
        with in_time(), contextlib.redirect_stdout(out):
            code, message = _called(arguments)
    except Finding:
        raise
    except BaseException as surprise:
        raise Finding(_told(surprise)) from surprise
    demand(code in codes, f"expected exit code {list(codes)}, received {code}: {message[:300]}")
    if code:
        check_message(message)
    shown = out.getvalue()
    where = printable(shown, keep="\n")
    demand(where == shown, f"expected printable output, received {shown[:300]!r}")
    return code, message or shown


def _called(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and error of a verb, as the entry point gives them."""
    import click

    try:
        # Without `standalone_mode` the code of `typer.Exit` is what the call returns.
        code = _command().main(list(arguments), "mergesearch", standalone_mode=False)
        return (code if isinstance(code, int) else 0), ""
    except InputError as error:
        return 2, str(error)
    except MergesearchError as error:
        return 1, str(error)
    except click.ClickException as error:
        return error.exit_code, error.format_message()


@cache
def _command() -> Any:
    """The command line, built once: typer takes longer for that than most verbs for their work."""
    import typer

    from mergesearch.search.cli.main import app

    return typer.main.get_command(app)


def _told(surprise: BaseException) -> str:
    """The kind of an exception and the last places that it came through, in one line."""
    frames = traceback.extract_tb(surprise.__traceback__)
    ours = [f for f in frames if "site-packages" not in f.filename and "fuzz" not in f.filename]
    places = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in (*ours[-3:], frames[-1])]
    text = printable(str(surprise))[:150]
    return f"{type(surprise).__name__}: {text} ({' > '.join(dict.fromkeys(places))})"
