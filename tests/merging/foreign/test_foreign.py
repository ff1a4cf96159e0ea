"""Readers of foreign files: whatever the bytes are, a value or one kind of error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mergesearch.merging.errors import (
    CheckpointError,
    InputError,
    MergesearchError,
    did_you_mean,
)
from mergesearch.merging.foreign.json_text import parse_json, read_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.paths import exists, resolved
from mergesearch.merging.foreign.reading import decode, read_bytes, read_text
from mergesearch.merging.foreign.shown import cut, message_cut, name_shown, printable, shown
from mergesearch.merging.foreign.yaml_text import parse_yaml

STUDY = Path(__file__).parents[3] / "experiments/0001-digits/study.yaml"


def test_control_and_bidirectional_characters_are_escaped() -> None:
    text = "a\x1b[31m\x00\u202eb\u2066\ud800é中"
    assert printable(text) == r"a\x1b[31m\x00\u202eb\u2066\ud800é中"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert shown("\x1b]0;x\x07") == r"'\x1b]0;x\x07'"


@given(st.text())
def test_what_is_printable_can_be_written_and_has_one_line(text: str) -> None:
    clean = printable(text)
    clean.encode("utf-8")
    assert len(clean.splitlines()) <= 1
    assert printable(clean) == clean


def test_long_values_are_cut_and_containers_are_not_written_out() -> None:
    assert len(cut("x" * 10_000)) == 300
    assert cut("short") == "short"
    assert len(shown("y" * 10_000)) <= 90
    assert len(name_shown("\x1b" * 10_000)) <= 80
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    assert shown(deep) == "a list of 1"
    assert shown(1 << 100_000) == "a number of 100001 bits"
    assert shown({"a": 1}) == "a mapping of 1"


def test_paths_do_not_cost_the_rest_of_a_message() -> None:
    path = "/folder" * 40
    text = f"{path}: expected weights trained from the base, received others; choose {path} again"
    assert message_cut(text) == text
    assert len(message_cut("/x" * 5_000)) == 700


@pytest.mark.parametrize("kind", [MergesearchError, InputError, CheckpointError])
def test_errors_are_short_and_printable_whatever_text_is_in_them(
    kind: type[MergesearchError],
) -> None:
    told = str(kind("a \u200b name \x1b[31m\nand " + "{" * 10_000 + " its end"))
    assert printable(told, keep="\n") == told
    assert [len(line) for line in told.split("\n")] == [22, 700]
    assert told.endswith(" its end")


def test_pipes_folders_and_missing_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="expected a file, received a pipe"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(InputError, match="received a folder"):
        read_bytes(tmp_path)
    with pytest.raises(CheckpointError, match="received nothing at this path"):
        read_bytes(tmp_path / "none", error=CheckpointError)
    with pytest.raises(InputError, match="expected"):
        read_bytes(Path("a\0b"))
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(InputError, match="at most 10 bytes, received 11"):
        read_bytes(tmp_path / "large", limit=10)


def test_text_is_utf_8_and_a_mistake_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes("\ufeffé".encode())
    assert read_text(tmp_path / "f") == "é"
    with pytest.raises(InputError, match="f: line 2: expected UTF-8 text, received the byte 0xff"):
        decode(b"a\n\xff", "f")


def test_json_has_limits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="64 levels"):
        parse_json("[" * 65 + "1" + "]" * 65, "f")
    with pytest.raises(InputError, match="64 levels"):
        parse_json("[" * 100_000, "f")
    assert parse_json("[" * 64 + "]" * 64, "f")
    with pytest.raises(InputError, match="line 1, column 2"):
        parse_json("{", "f")
    with pytest.raises(InputError, match="'a' twice"):
        parse_json('{"b": {"a": 1, "a": 2}}', "f", unique=True)
    with pytest.raises(InputError, match="received NaN"):
        parse_json("[NaN]", "f", finite=True)
    with pytest.raises(InputError, match="surrogate"):
        parse_json(r'{"a\ud800": 1}', "f")
    with pytest.raises(InputError, match="expected JSON"):
        parse_json("1" * 5000, "f")
    (tmp_path / "f.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "f.json") == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [", "in line 2"),
        ("a: 1\na: 2", "stands twice"),
        ("a: !!python/object:os.system x", "line 1"),
        ("[" * 5000, "levels of nesting"),
        ("&a [*a]", "levels of nesting"),
        ("d: 2001-99-99", "cannot be read"),
        ("[1]: 2\n? {a: 1}\n: 3", "expected YAML"),
        ("a: \x00", "expected YAML"),
        ('a: "\\ud800"', "surrogate"),
        ("a: &a [" + "x," * 1001 + "]\nb: [" + "*a," * 1001 + "]", "1000000 values"),
    ],
)
def test_yaml_has_limits(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_yaml(text, "f")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_yaml_keeps_merge_keys_and_plain_repeats() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: *a"
    assert parse_yaml(text, "f")["b"] == {"x": 3, "y": 2}


def _value_or_error(ask: Callable[[], Any]) -> tuple[Any, str]:
    """What ``ask`` gives and no message, or the message of its error; others are raised."""
    try:
        return ask(), ""
    except InputError as error:
        message = str(error)
    assert printable(message) == message
    return None, message


def _parsed(parse: Callable[[str, str], Any], content: bytes) -> Any:
    return parse(decode(content, "f"), "f")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_mutated_settings_give_a_value_or_an_error(data: st.DataObject) -> None:
    content = bytearray(STUDY.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\x00", b"[", b"{", b"&a", b"*a"]))
        )
    for parse in (parse_yaml, parse_json):
        _value_or_error(partial(_parsed, parse, bytes(content)))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(_JSON)
@example({"a": float("nan")})
@example({"a": 10**400})
@example({1: 2})
def test_a_node_gives_what_was_asked_for_or_an_error(value: Any) -> None:
    node = Node(value, "f", CheckpointError)
    for ask, kind in (
        (node.text, str),
        (node.integer, int),
        (node.number, float),
        (node.boolean, bool),
        (node.mapping, dict),
        (node.elements, list),
        (lambda: node.at("a").text(), str),
        (lambda: list(node.members()), list),
    ):
        value_asked, message = _value_or_error(ask)
        assert message.startswith("f") if message else isinstance(value_asked, kind)


def test_a_node_names_the_place() -> None:
    node = Node(json.loads('{"a": {"shape": [1, 2.5]}}'), "w.safetensors", CheckpointError)
    with pytest.raises(CheckpointError) as caught:
        [each.integer() for each in node.at("a").at("shape").elements()]
    assert str(caught.value) == (
        "w.safetensors: a: shape: 1: expected a whole number, received 2.5"
    )


def test_paths_through_links_in_a_circle_are_asked_about(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "x", Path("a\0b")):
        assert resolved(path).name == path.name
        assert not exists(path)


def test_known_names_in_a_message_are_short() -> None:
    names = ["a" * 10_000, *(f"name {number}" for number in range(1000))]
    told = did_you_mean("aaa", names)
    assert told.startswith("did you mean 'aaa")
    assert len(told) < 700
