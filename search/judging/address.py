"""Where the judge's page is: a file of the run folder, while a driver serves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Its name.
FILE = "judging.url"


@contextmanager
def written_address(folder: Path, url: str) -> Iterator[None]:
    """Keep the address in a file that only its owner can read: whoever knows it may judge."""
    path = folder / FILE
    with suppress(OSError):
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text(f"{url}\n", encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def read_address(folder: Path) -> str | None:
    """The address; None where there is none."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if text.startswith("http://127.0.0.1:") and text.isascii() else None
