"""Files as bounded bytes and as text of a stated encoding."""

from __future__ import annotations

import stat
from pathlib import Path

from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.shown import name_shown

MIB = 1 << 20
#: The largest settings file that is read: studies, recipes, configurations, indices.
SETTINGS_LIMIT = 64 * MIB


def read_bytes(
    file: Path,
    limit: int = SETTINGS_LIMIT,
    error: type[InputError] = InputError,
    *,
    what: str = "a file",
) -> bytes:
    """Read a whole regular file of at most ``limit`` bytes; ``what`` it is, errors say.

    Raises:
        InputError: Of the class ``error``, if there is no such file, it is no regular file (a pipe
            would wait for ever), cannot be read, or is larger.
    """
    where = name_shown(str(file), 200)
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):
            kind = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe, socket or device"
            raise error(f"{where}: expected {what}, received {kind}")
        with file.open("rb") as stream:
            data = stream.read(limit + 1)
    except FileNotFoundError:
        raise error(
            f"{where}: expected {what}, received nothing at this path (No such file or directory)"
        ) from None
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the path
        reason = getattr(cause, "strerror", None) or str(cause)
        readable = what if "readable" in what else what.replace("a ", "a readable ", 1)
        raise error(f"{where}: expected {readable}, received: {reason}") from None
    if len(data) > limit:
        raise error(
            f"{where}: expected at most {limit} bytes, received {about.st_size}; this is no "
            "file of its kind"
        )
    return data


def read_text(
    file: Path,
    limit: int = SETTINGS_LIMIT,
    error: type[InputError] = InputError,
    *,
    what: str = "a file",
) -> str:
    """Read a file of UTF-8 text; a byte order mark is skipped.

    Raises:
        InputError: As ``read_bytes``, or if the bytes are no UTF-8, with the place.
    """
    return decode(read_bytes(file, limit, error, what=what), name_shown(str(file), 200), error)


def decode(data: bytes, where: str, error: type[InputError] = InputError) -> str:
    """Decode UTF-8; a byte order mark is skipped.

    Args:
        data: Bytes of a file.
        where: The file, as errors name it.
        error: The class of errors.

    Raises:
        InputError: If the bytes are no UTF-8; with line and byte.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        raise error(
            f"{where}: line {line}: expected UTF-8 text, received the byte "
            f"0x{data[cause.start]:02x}; save the file as UTF-8"
        ) from None
