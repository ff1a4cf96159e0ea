"""Libraries that read foreign files: whatever they raise becomes one kind of error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mergesearch.merging.errors import InputError, MergesearchError
from mergesearch.merging.foreign.shown import name_shown


@contextmanager
def library_errors(
    where: str, expected: str, error: type[InputError] = InputError
) -> Iterator[None]:
    """A context in which a library reads a foreign file.

    Libraries raise what they happen to stumble over: ``KeyError``, ``AttributeError``, bare
    ``Exception``. A lack of memory is not the file's fault and stays what it is.

    Args:
        where: The file or folder, as errors name it.
        expected: What should be there.
        error: The class of errors.

    Raises:
        InputError: Of the class ``error``; errors of the project pass as they are.
    """
    try:
        yield
    except MergesearchError:
        raise
    except BaseException as cause:
        plain = isinstance(cause, Exception) or is_panic(cause)
        if not plain or isinstance(cause, MemoryError) or "not enough memory" in str(cause):
            raise
        raise error(f"{where}: expected {expected}, received {reason(cause)}") from None


def is_panic(cause: BaseException) -> bool:
    """Whether an error is a panic of a library in Rust, which is no ``Exception``."""
    return type(cause).__name__ == "PanicException"


def reason(cause: BaseException) -> str:
    """Kind and text of an error in one short line."""
    text = name_shown(" ".join(str(cause).split()), 150)
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
