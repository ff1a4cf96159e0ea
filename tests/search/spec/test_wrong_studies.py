"""Study files, overrides and storage URLs that are wrong: one bounded line each, exit code 2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergesearch.merging import InputError
from mergesearch.merging.foreign.shown import MESSAGE_LIMIT, printable
from mergesearch.search.plan.loading import load_study
from mergesearch.search.spec.storage_url import split_url
from tests.fuzz.checking import read_or_refuse
from tests.search.cli.test_cli import mergesearch
from tests.search.studies import analytic, write_study


def refused(*arguments: object, lines: int = 1) -> str:
    """The error of a call that must be refused, in so many bounded, printable lines."""
    code, out, err = mergesearch(*arguments)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == lines, err
    for line in err.splitlines():
        paths = [word for word in line.split(" ") if "/" in word]
        assert len(line) - sum(map(len, paths)) <= MESSAGE_LIMIT
        assert printable(line) == line
    return err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: \xff\xfe", "expected UTF-8 text"),
        (b"name: a\x00b", "expected YAML"),
        (b"name: " + b"[" * 1500, "levels of nesting"),
        (b"a: &a [*a]", "levels of nesting"),
        (b"name: x\nname: y\n", "stands twice"),
        (b"1: x\n", "keys that are texts"),
        (b"- x\n", "mapping of keys"),
        (b"seed: 0x" + b"f" * 5000, "whole number of 20000 bits"),
        (b"name: !!binary aGk=\n", "expected YAML"),
        (b"name: x\n\xe2\x80\xae: 1\n", r"\\u202e: unknown key"),
    ],
)
def test_a_file_that_is_no_study(content: bytes, message: str, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_bytes(content)
    assert message.replace("\\\\", "\\") in refused(
        "check", study, lines=1 if "unknown" not in message else 3
    )


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "a pipe, socket or device" in refused("check", tmp_path / "pipe.yaml")
    assert "a folder" in refused("check", tmp_path)
    assert "a pipe, socket or device" in refused("check", "/dev/zero")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("workers.gpus=.inf", "workers.gpus: "),
        ("workers.gpus=.nan", "workers.gpus: "),
        ("space.dim=1000000000", "space.dim: expected at most 10000"),
        ("budget.trials=9999999999", "budget.trials: expected at most 1000000000"),
        ("budget.seconds=1e300", "budget.seconds: expected at most 1000000000"),
        ("seed=99999999999999999999999", "seed: expected at most 9223372036854775807"),
        ("strategy.population=1000000000", "strategy.population: expected at most 10000000"),
        ("strategy.sigma=.inf", "strategy.sigma: "),
        ("evaluators.0.items=1000000000", "evaluators.0.items: expected at most 1000000"),
        ("storage=postgresql://[::1", "storage: expected a URL"),
        ("storage=postgresql://host:port/x", "storage: expected a URL"),
        ("name=[", "expected YAML"),
        ("name=\x1b[2J", "expected YAML"),
        ("evaluators.²=1", "not a section"),
        ("evaluators." + "9" * 5000 + "=1", "not a section"),
        (".".join("a" * 100) + "=1", "levels of nesting"),
        ("strategy=" + "a" * 10_000, "expected a strategy"),
        ("strategy.\u202e=1", r"strategy.\u202e: unknown option"),
    ],
    ids=str,
)
def test_an_override_that_is_wrong(override: str, message: str, tmp_path: Path) -> None:
    study = write_study(analytic(), tmp_path)
    assert message in refused("check", study, "--set", override)


def test_a_hundred_problems_are_twenty_lines_and_their_count(tmp_path: Path) -> None:
    data = analytic() | {f"key{number}": 1 for number in range(100)}
    assert "80 more problems" in refused("check", write_study(data, tmp_path), lines=21)


def test_a_url_keeps_its_parts() -> None:
    assert split_url("postgresql://me:word@[::1]:5432/x", "storage").password == "word"
    with pytest.raises(InputError, match=r"storage: expected a URL, received a://\[ \(Invalid"):
        split_url("a://[", "storage")


_KEYS = st.sampled_from([*analytic(), "workers", "fidelity", "selection", "start", "storage"])
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["cma_es", "inline", ".", "/dev/null", "\x1b", "\u202e", "http://[::1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | _KEYS | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(key=_KEYS, value=_VALUES)
def test_any_value_of_any_key_is_accepted_or_refused_in_bounded_lines(
    key: str, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "study.yaml"
    try:
        path.write_text(yaml.safe_dump(analytic() | {key: value}))
    except (UnicodeEncodeError, yaml.YAMLError):
        return  # lone surrogates, which no file holds
    read_or_refuse(lambda: load_study(path))
