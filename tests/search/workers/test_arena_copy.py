"""What travels when a node copies an arena that another one has prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergesearch.merging.resident.arena import arena_key, open_arenas
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.workers.backends import arena_copy
from mergesearch.search.workers.backends.arena_copy import ArenaServer, copy_arenas
from tests.search.conftest import model_study
from tests.search.studies import spec_of


class Called:
    """A method as an actor's: ``remote`` calls it, here at once."""

    def __init__(self, method: Any) -> None:
        self.remote = method


class Server:
    """The server of another node, without a process of its own."""

    def __init__(self, folder: Path) -> None:
        server = ArenaServer(str(folder))
        self.files = Called(server.files)
        self.read = Called(server.read)


class Here:
    """Ray, as far as copying uses it."""

    @staticmethod
    def get(result: Any) -> Any:
        return result


class Heard:
    """Keeps the last progress that it was told."""

    def __init__(self) -> None:
        self.last = (0, 0, 0)

    def __call__(self, done: int, total: int, size: int) -> None:
        self.last = (done, total, size)


def files_of(folder: Path) -> dict[str, int]:
    """Files of arenas: name and time of change."""
    return {
        file.name: file.stat().st_mtime_ns
        for file in folder.iterdir()
        if file.suffix in (".arena", ".json")
    }


def test_approximate_rows_travel_without_the_exact_ones_and_the_other_way_round(
    pico_models: Path, pico_items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have one basis, and keys of which one begins with the other."""
    monkeypatch.setattr(arena_copy, "CHUNK", 4096)
    template = plan_study(spec_of(model_study(pico_models, pico_items), tmp_path)).template
    there = tmp_path / "there"
    for rows in ("auto", "int8"):
        open_arenas(template, there, rows=rows)
    exact = arena_key(template, "auto")
    approximate = arena_key(template, "int8")
    assert approximate == f"{exact}-int8"
    for rows, key, other in (("int8", approximate, exact), ("auto", exact, approximate)):
        here = tmp_path / rows
        heard = Heard()
        copy_arenas(Here, Server(there), key, here, heard)
        copied = files_of(here)
        wanted = {name: at for name, at in files_of(there).items() if name.startswith(f"{key}.")}
        assert copied == wanted
        assert f"{key}.json" in copied
        assert not any(name.startswith(f"{other}.") for name in copied)
        done, total, size = heard.last
        assert (done, total) == (-(-size // 4096), done)
        assert done > 1
        assert all((here / name).read_bytes() == (there / name).read_bytes() for name in wanted)
        open_arenas(template, here, rows=rows)
        assert files_of(here) == wanted, "it was opened, not prepared again"
