"""Seeded mutations of YAML documents."""

from __future__ import annotations

from random import Random
from typing import Any

import yaml

from mergesearch.merging import InputError
from mergesearch.merging.foreign.yaml_text import parse_yaml
from tests.fuzz.mutations import Mutation, delete_chunk
from tests.fuzz.values import mutated_value, nasty, places, reached

#: What reading and writing raises where an earlier mutation has damaged a document.
_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, InputError)


def _read(data: bytes) -> Any:
    """A document without cycles, as values walk for ever in them."""
    return parse_yaml(data.decode(), "document")


def mutate_yaml(data: bytes, draw: Random) -> bytes:
    """Change one value of a YAML document, which stays one; other data loses a chunk."""
    try:
        value = mutated_value(_read(data), draw)
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=draw.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")
    except _UNREADABLE:
        return delete_chunk(data, draw)


def alias(data: bytes, draw: Random) -> bytes:
    """Let a value stand at another place too, or inside itself."""
    lines = data.splitlines(keepends=True)
    keyed = [at for at, line in enumerate(lines) if b": " in line]
    if not keyed:
        return data + draw.choice((b"&a [*a]\n", b"a: &a {b: *a}\n"))
    at = draw.choice(keyed)
    key, _, text = lines[at].partition(b": ")
    lines[at] = key + b": &a " + text
    other = draw.choice(keyed)
    if other == at:
        lines[at] = key + b": &a [*a, *a]\n"
    else:
        lines[other] = lines[other].partition(b": ")[0] + b": *a\n"
    return b"".join(lines)


def odd_key(data: bytes, draw: Random) -> bytes:
    """Put a key that is no text, is there already, or merges another mapping."""
    keys = (b"1", b"null", b"1.5", b"true", b"[1, 2]", b"{a: 1}", b"<<", b"? x\n", b"2001-01-01")
    lines = data.splitlines(keepends=True) or [b"\n"]
    at = draw.randrange(len(lines))
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    new = draw.choice((draw.choice(keys) + b": 1\n", lines[at].lstrip() or b"\n"))
    lines.insert(at, indent + new)
    return b"".join(lines)


def nest_value(data: bytes, draw: Random) -> bytes:
    """Put one value of a document below many brackets."""
    try:
        value = _read(data)
        path = draw.choice(places(value))
        held = reached(value, path)
        text = yaml.safe_dump(held if draw.random() < 0.5 else nasty(draw), default_flow_style=True)
    except _UNREADABLE:
        return delete_chunk(data, draw)
    levels = draw.choice((3, 60, 70, 900))
    inner = b"[" * levels + text.partition("\n")[0].encode("utf-8", "replace") + b"]" * levels
    key = str(path[0]).encode() if path else b"name"
    return data + key + b": " + inner + b"\n" if draw.random() < 0.3 else inner


#: Mutations of YAML documents.
YAML: dict[str, Mutation] = {
    each.__name__: each for each in (mutate_yaml, alias, odd_key, nest_value)
}
