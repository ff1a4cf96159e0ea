"""Seeded mutations of files: bytes and a generator in, bytes out.

Every mutation is a pure function of the data and of the state of the generator, so that one seed
names one damaged file. ``mutated`` picks among those that suit any file; the tables below give
those that suit texts, lines and JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from random import Random

from tests.fuzz.nasty import NASTY_TOKENS
from tests.fuzz.values import mutated_value, nasty

Mutation = Callable[[bytes, Random], bytes]


def _span(data: bytes, draw: Random, longest: int = 200) -> tuple[int, int]:
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.randrange(longest + 1))


def flip_bits(data: bytes, draw: Random) -> bytes:
    """Flip one bit in up to eight bytes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8) if data else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def random_bytes(data: bytes, draw: Random) -> bytes:
    """Overwrite a stretch with random bytes."""
    start, stop = _span(data, draw, 40)
    return data[:start] + draw.randbytes(stop - start) + data[stop:]


def truncate(data: bytes, draw: Random) -> bytes:
    """Keep the beginning alone, as a full disk or a kill does."""
    return data[: draw.randrange(len(data) + 1)]


def behead(data: bytes, draw: Random) -> bytes:
    """Lose the beginning."""
    return data[draw.randrange(len(data) + 1) :]


def delete_chunk(data: bytes, draw: Random) -> bytes:
    """Lose a stretch."""
    start, stop = _span(data, draw)
    return data[:start] + data[stop:]


def duplicate_chunk(data: bytes, draw: Random) -> bytes:
    """Write a stretch twice."""
    start, stop = _span(data, draw)
    return data[:stop] + data[start:stop] + data[stop:]


def move_chunk(data: bytes, draw: Random) -> bytes:
    """Insert a stretch at another place."""
    start, stop = _span(data, draw)
    at = draw.randrange(len(data) + 1)
    return data[:at] + data[start:stop] + data[at:]


def zero_chunk(data: bytes, draw: Random) -> bytes:
    """Overwrite a stretch with NUL bytes, as a file system does after a lost block."""
    start, stop = _span(data, draw, 4096)
    return data[:start] + bytes(stop - start) + data[stop:]


def insert_token(data: bytes, draw: Random) -> bytes:
    """Insert a nasty token."""
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice(NASTY_TOKENS) + data[at:]


def empty(data: bytes, draw: Random) -> bytes:
    """Nothing, blanks, or one token alone."""
    return draw.choice((b"", b" ", b"\n", b"\n\n\n", draw.choice(NASTY_TOKENS)))


#: Mutations of any file.
ANY: dict[str, Mutation] = {
    each.__name__: each
    for each in (
        flip_bits,
        random_bytes,
        truncate,
        behead,
        delete_chunk,
        duplicate_chunk,
        move_chunk,
        zero_chunk,
        insert_token,
        empty,
    )
}

_WORD = re.compile(rb"[A-Za-z_][\w.\-/]*|-?\d[\d.eE+\-]*")


def swap_token(data: bytes, draw: Random) -> bytes:
    """Put a nasty token in the place of a word or number."""
    words = [found.span() for found in _WORD.finditer(data)]
    if not words:
        return insert_token(data, draw)
    start, stop = draw.choice(words)
    return data[:start] + draw.choice(NASTY_TOKENS) + data[stop:]


def swap_words(data: bytes, draw: Random) -> bytes:
    """Put a word or number of the file in the place of another."""
    words = [found.span() for found in _WORD.finditer(data)]
    if not words:
        return insert_token(data, draw)
    start, stop = draw.choice(words)
    other = slice(*draw.choice(words))
    return data[:start] + data[other] + data[stop:]


def delete_character(data: bytes, draw: Random) -> bytes:
    """Lose one mark such as a colon, a quote or a bracket."""
    marks = [found.start() for found in re.finditer(rb"[\[\]{}:,\"'\n#-]", data)]
    if not marks:
        return delete_chunk(data, draw)
    at = draw.choice(marks)
    return data[:at] + data[at + 1 :]


def other_encoding(data: bytes, draw: Random) -> bytes:
    """Save the text in another encoding, or behind a byte order mark."""
    text = data.decode("utf-8", "replace")
    kind = draw.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1", "utf-16-be", "cp037"))
    return ("\u00e4" + text if draw.random() < 0.5 else text).encode(kind, "replace")


def swap_number(data: bytes, draw: Random) -> bytes:
    """Write another number in the place of one: huge, tiny, or in a notation of its own."""
    numbers = [found.span() for found in re.finditer(rb"-?\d[\d.eE+]*", data)]
    if not numbers:
        return insert_token(data, draw)
    start, stop = draw.choice(numbers)
    held = data[start:stop]
    ten = b"1" + b"0" * draw.choice((9, 17, 18, 19, 38, 308, 309, 4_299, 4_300))
    others = (b"-" + held, held + b"e99", held + b"e-400", held + b"_0", b"0" + held, b"1:30")
    new = draw.choice((ten, ten, b"-" + ten, held * 30, "\u0663".encode(), *others))
    return data[:start] + new + data[stop:]


def cut_character(data: bytes, draw: Random) -> bytes:
    """Write a character of several bytes inside a word, and lose one of these bytes."""
    words = [found.start() for found in _WORD.finditer(data)] or [0]
    at = draw.choice(words) + 1
    character = bytearray(draw.choice(("\u00e9", "\u4e2d", "\u202e", "\U0001f600")).encode())
    if draw.random() < 0.8:
        del character[draw.randrange(len(character))]
    return data[:at] + bytes(character) + data[at:]


#: Mutations of texts.
TEXT: dict[str, Mutation] = {
    each.__name__: each
    for each in (
        swap_token,
        swap_words,
        swap_number,
        delete_character,
        cut_character,
        other_encoding,
    )
}


def _on_lines(data: bytes, change: Callable[[list[bytes]], None]) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    change(lines)
    return b"".join(lines)


def delete_line(data: bytes, draw: Random) -> bytes:
    """Lose a line."""
    return _on_lines(data, lambda lines: lines.__delitem__(draw.randrange(len(lines))))


def duplicate_line(data: bytes, draw: Random) -> bytes:
    """Write a line again, at any place."""

    def change(lines: list[bytes]) -> None:
        lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))

    return _on_lines(data, change)


def swap_lines(data: bytes, draw: Random) -> bytes:
    """Exchange two lines."""

    def change(lines: list[bytes]) -> None:
        one = draw.randrange(len(lines))
        other = draw.randrange(len(lines))
        lines[one], lines[other] = lines[other], lines[one]

    return _on_lines(data, change)


def damage_line(data: bytes, draw: Random) -> bytes:
    """Apply a mutation of any file to one line alone."""

    def change(lines: list[bytes]) -> None:
        at = draw.randrange(len(lines))
        ending = b"\n" if lines[at].endswith(b"\n") else b""
        damaged = draw.choice([*ANY.values(), *TEXT.values()])(lines[at].rstrip(b"\n"), draw)
        lines[at] = damaged + ending

    return _on_lines(data, change)


def join_lines(data: bytes, draw: Random) -> bytes:
    """Lose the end of a line, as two writers at once leave it."""

    def change(lines: list[bytes]) -> None:
        at = draw.randrange(len(lines))
        lines[at] = lines[at].rstrip(b"\n")

    return _on_lines(data, change)


def break_lines(data: bytes, draw: Random) -> bytes:
    """End one or all lines in the way of another system, or as Unicode ends them."""
    ending = draw.choice((b"\r\n", b"\r", b"\x0b", b"\x0c", b"\x1c", b"\xc2\x85", b"\xe2\x80\xa8"))
    ends = [found.start() for found in re.finditer(rb"\n", data)]
    if not ends or draw.random() < 0.5:
        return data.replace(b"\n", ending)
    at = draw.choice(ends)
    return data[:at] + ending + data[at + 1 :]


def repeat_lines(data: bytes, draw: Random) -> bytes:
    """Write a stretch of lines again, some of them in another order."""

    def change(lines: list[bytes]) -> None:
        first = draw.randrange(len(lines))
        again = lines[first : first + draw.randint(1, 8)]
        if draw.random() < 0.3:
            draw.shuffle(again)
        at = draw.choice((len(lines), first, draw.randrange(len(lines) + 1)))
        lines[at:at] = again

    return _on_lines(data, change)


#: Mutations of files whose lines are records.
LINES: dict[str, Mutation] = {
    each.__name__: each
    for each in (
        delete_line,
        duplicate_line,
        swap_lines,
        damage_line,
        join_lines,
        break_lines,
        repeat_lines,
    )
}


def mutate_json(data: bytes, draw: Random) -> bytes:
    """Change one value of a JSON document, which stays one; other data loses a chunk."""
    try:
        value = mutated_value(json.loads(data), draw)
        text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # an earlier mutation has damaged it
        return delete_chunk(data, draw)


def mutate_json_line(data: bytes, draw: Random) -> bytes:
    """Change one value in one line of a file of JSON lines."""

    def change(lines: list[bytes]) -> None:
        at = draw.randrange(len(lines))
        lines[at] = mutate_json(lines[at], draw) + b"\n"

    return _on_lines(data, change)


def duplicate_key(data: bytes, draw: Random) -> bytes:
    """Write a member of the outermost JSON object twice."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return duplicate_chunk(data, draw)
    if not isinstance(value, dict) or not value:
        return duplicate_chunk(data, draw)
    key = draw.choice(list(value))
    again = f"{json.dumps(key)}: {json.dumps(draw.choice([value[key], nasty(draw)]))}, "
    return b"{" + again.encode() + json.dumps(value).encode()[1:]


def nest_deeply(data: bytes, draw: Random) -> bytes:
    """Put the whole document, or one value of it, below very many brackets."""
    levels = draw.choice((60, 70, 500, 5_000, 100_000))
    words = [found.span() for found in _WORD.finditer(data)] or [(0, len(data))]
    start, stop = draw.choice([*words, (0, len(data))])
    opening = draw.choice((b"[", b'{"a":'))
    closing = b"]" if opening == b"[" else b"}"
    inner = opening * levels + data[start:stop] + closing * levels
    return data[:start] + inner + data[stop:]


#: Mutations of JSON documents.
JSON: dict[str, Mutation] = {
    each.__name__: each for each in (mutate_json, duplicate_key, nest_deeply)
}
#: Mutations of files of JSON lines.
JSON_LINES: dict[str, Mutation] = {
    "mutate_json_line": mutate_json_line,
    "nest_deeply": nest_deeply,
}


def mutated(data: bytes, draw: Random, *tables: Mapping[str, Mutation]) -> bytes:
    """Apply one mutation of the tables, in half of the cases two to five in a row.

    Args:
        data: A real file.
        draw: The seeded generator.
        tables: Where to choose from, each with equal weight: ``ANY``, ``TEXT``, ``LINES``,
            ``JSON``, ``JSON_LINES``; ``ANY`` alone where none is given.
    """
    for _ in range(draw.choice((1, 1, 1, 1, 1, 2, 2, 2, 3, 5))):
        table = draw.choice(tables or (ANY,))
        data = table[draw.choice(sorted(table))](data, draw)
    return data
