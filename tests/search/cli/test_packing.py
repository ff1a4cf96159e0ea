"""`mergesearch pack` and `restore`: what they print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.merging.lineage import twins
from tests.search.cli.test_cli import mergesearch, refused


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    base = twins.build("llama", 1).state_dict()
    twins.save(folder / "base", "llama", base)
    for seed, name in enumerate(("one", "two")):
        twins.save(folder / name, "llama", twins.changed(base, twins.fine_tuned, seed))
    return folder


def test_experts_and_merges_come_back(zoo: Path, tmp_path: Path) -> None:
    experts = (zoo / "one", f"other={zoo / 'two'}")
    code, out, err = mergesearch(
        "pack", zoo / "base", *experts, "--rank", 8, "--out", tmp_path / "pack", "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert set(told["errors"]) == {"one", "other"}
    files = [path for path in (tmp_path / "pack").rglob("*") if path.is_file()]
    assert told["bytes"] == sum(path.stat().st_size for path in files)
    back = ("restore", tmp_path / "pack", "--out", tmp_path / "back")
    out = mergesearch(*back, "--expert", "other")[1]
    assert out.startswith("restored other, ")
    assert "off by " in out
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {zoo / 'base'}\nexperts: [{zoo / 'one'}]\noperator: task_arithmetic\n"
    )
    code, out, err = mergesearch(*back, "--recipe", recipe, "--overwrite")
    assert code == 0, err
    assert out.startswith("merged from ")


def test_wrong_input_is_refused_in_one_line(zoo: Path, tmp_path: Path) -> None:
    pack = ("pack", zoo / "base", zoo / "one", "--out", tmp_path / "pack")
    assert "expected --rank R or --masks" in refused(*pack)
    assert "expected --rank R or --masks" in refused(*pack, "--rank", 2, "--masks")
    assert "expected --directions with --rank" in refused(*pack, "--masks", "--directions", 1)
    assert "expected a number of at least 0" in refused(*pack, "--masks", "--threshold", "one=x")
    assert "expected names of experts" in refused(*pack, "--masks", "--threshold", "two=0.4")
    assert "write NAME=PATH" in refused(*pack[:3], zoo / "one", *pack[3:], "--masks")
    restore = ("restore", zoo, "--out", tmp_path / "out")
    assert "expected --expert NAME or --recipe" in refused(*restore)
    assert "pack.json" in refused(*restore, "--expert", "one")
    assert not (tmp_path / "pack").exists()
