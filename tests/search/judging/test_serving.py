"""The judge's page as a browser or another program sees it: real requests to a real server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergesearch.evaluators.base import Exhibit, Output
from mergesearch.merging import InputError
from mergesearch.search.judging.bench import Bench
from mergesearch.search.judging.record import JudgingRecord
from mergesearch.search.judging.serving import served
from tests.search.judging.judged import get, post

HOSTILE = "<script>alert('& more')</script>"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(JudgingRecord(tmp_path), 0)
    for recipe in ("base", "other"):
        outputs = (
            Output("one", "text", f"{HOSTILE} {recipe}".encode()),
            Output("two", "png", b"\x89PNG\r\n\x1a\n" + recipe.encode()),
        )
        bench.register(
            "preference", "search", recipe, Exhibit("Which?", 2, outputs), base=recipe == "base"
        )
    return bench


@pytest.fixture
def rings() -> list[None]:
    return []


@pytest.fixture
def url(bench: Bench, rings: list[None]) -> Iterator[str]:
    with served(bench, 0, lambda: rings.append(None), "driver.judge_port") as url:
        yield url


def status(url: str, data: bytes | None = None, kind: str = "application/json") -> int:
    try:
        request = urllib.request.Request(url, data, {"Content-Type": kind} if data else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_pairs_are_shown_and_choices_are_taken(url: str, rings: list[None]) -> None:
    view = get(url, "view")
    assert (view["state"], view["done"], view["total"], view["undo"]) == ("open", 0, 2, False)
    assert {view["left"]["text"], view["right"]["text"]} == {
        f"{HOSTILE} {n}" for n in ("base", "other")
    }
    after = post(url, "choice", {"pair": view["pair"], "choice": "left"})
    assert (after["done"], after["undo"], len(rings)) == (1, True, 1)
    # Said twice, as by two windows, it counts once.
    assert post(url, "choice", {"pair": view["pair"], "choice": "right"})["done"] == 1
    back = post(url, "undo", {})
    assert {**back, "version": 0} == {**view, "version": 0}
    for _ in range(2):
        view = post(url, "choice", {"pair": back["pair"], "choice": "tie"})
        back = view
    assert view["state"] == "waiting"


def test_pictures_are_served_as_what_they_are(url: str) -> None:
    view = post(url, "choice", {"pair": get(url, "view")["pair"], "choice": "tie"})
    with urllib.request.urlopen(f"{url}picture/{view['left']['text']}", timeout=60) as answer:
        assert answer.headers.get_content_type() == "image/png"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.read().startswith(b"\x89PNG")


def test_the_page_asks_nothing_of_others_and_holds_no_foreign_text(url: str) -> None:
    for path, kind in (
        ("", "text/html"),
        ("judge.js", "text/javascript"),
        ("judge.css", "text/css"),
    ):
        with urllib.request.urlopen(url + path, timeout=60) as answer:
            assert answer.headers.get_content_type() == kind
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            text = answer.read().decode()
        assert "alert" not in text.replace('role="alert"', "")
        assert "://" not in text
        assert "innerHTML" not in text


@pytest.mark.parametrize("path", ["view", "", "choice", "picture/..%2Fjudging.jsonl"])
def test_nothing_is_found_without_the_token(url: str, path: str) -> None:
    root, _, token = url.rstrip("/").rpartition("/")
    for wrong in ("", "x" * len(token), token[:-1], "%ff"):
        assert status(f"{root}/{wrong}/{path}") == 404
        assert status(f"{root}/{wrong}/{path}", b"{}") == 404
    assert status(f"{root}/") == 404


def test_other_requests_are_refused(url: str, rings: list[None]) -> None:
    body = json.dumps({"pair": get(url, "view")["pair"], "choice": "left"}).encode()
    assert status(f"{url}choice", body, "text/plain") == 400  # as another site's page could send it
    assert status(f"{url}choice", b"[]") == 400
    assert status(f"{url}choice", b"{") == 400
    assert status(f"{url}choice", b'{"pair": "' + b"x" * 5000 + b'"}') == 400
    assert status(f"{url}delete", body) == 400
    assert status(f"{url}picture/../../judging.jsonl") == 404
    assert status(f"{url}nothing") == 404
    odd: list[Any] = [{"pair": [], "choice": "left"}, {"choice": {}}, {}]
    assert [post(url, "choice", each)["done"] for each in odd] == [0, 0, 0]


def test_a_choice_that_cannot_be_recorded_is_not_taken(
    url: str, tmp_path: Path, rings: list[None]
) -> None:
    view = get(url, "view")
    (tmp_path / "judging.jsonl").rename(tmp_path / "kept")
    (tmp_path / "judging.jsonl").mkdir()
    body = json.dumps({"pair": view["pair"], "choice": "left"}).encode()
    assert status(f"{url}choice", body) == 507
    assert rings == []
    (tmp_path / "judging.jsonl").rmdir()
    (tmp_path / "kept").rename(tmp_path / "judging.jsonl")
    assert get(url, "view") == view
    assert post(url, "choice", json.loads(body))["done"] == 1


def test_a_port_that_is_taken_is_refused(url: str, bench: Bench) -> None:
    port = int(url.split(":")[2].split("/")[0])
    with (
        pytest.raises(InputError, match=r"driver\.judge_port: expected a free port"),
        served(bench, port, lambda: None, "driver.judge_port"),
    ):
        pass
