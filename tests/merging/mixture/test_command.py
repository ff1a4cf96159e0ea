"""`mergesearch merge` with a recipe of one model: what it prints, what it refuses, what follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.mixture.operators import MIXTURE_OPERATORS
from mergesearch.merging.mixture.recipe import is_mixture_recipe
from tests.search.cli.test_cli import mergesearch, refused

Recipes = Callable[..., Any]


def test_it_says_what_became_of_the_experts(recipe_text: Recipes, tmp_path: Path) -> None:
    file = tmp_path / "smaller.yaml"
    file.write_text(yaml.safe_dump(recipe_text("mixtral", "mc_smoe", experts=[2, 3])))
    code, out, _ = mergesearch("merge", file, "--out", tmp_path / "small", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["experts"] == 3
    assert [len(groups) for groups in told["groups"].values()] == [2, 3]
    assert told["bytes"]["after"] < told["bytes"]["before"]
    text = mergesearch("merge", file, "--out", tmp_path / "small", "--overwrite")[1]
    assert ": 3 experts in each of 2 blocks, 5 before; " in text
    assert "note: Blocks have 2, 3 different experts, and each stores 3" in text


def test_options_of_other_recipes_are_refused(recipe_text: Recipes, tmp_path: Path) -> None:
    file = tmp_path / "smaller.yaml"
    file.write_text(yaml.safe_dump(recipe_text("mixtral", "mc_smoe", experts=2)))
    assert "--head: expected none" in refused("merge", file, "--out", tmp_path / "a", "--head", "x")
    file.write_text(yaml.safe_dump(recipe_text("mixtral", "sub_moe", experts=9)))
    assert "expected at most 5" in refused("merge", file, "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_members_are_experts_of_an_ordinary_merge(recipe_text: Recipes, tmp_path: Path) -> None:
    file = tmp_path / "smaller.yaml"
    file.write_text(yaml.safe_dump(recipe_text("mixtral", "mc_smoe", experts=4)))
    members = tmp_path / "members"
    code, out, _ = mergesearch(
        "merge", file, "--out", tmp_path / "small", "--members", members, "--json"
    )
    assert code == 0
    folders = json.loads(out)["members"]
    assert folders == [str(members / f"member-{number}") for number in range(2)]
    weights = {
        "base": str(tmp_path / "small"),
        "experts": {"first": folders[0], "second": folders[1]},
        "operator": "task_arithmetic",
        "coefficients": {"default": {"first": 0.0, "second": 1.0}},
    }
    ordinary = tmp_path / "ordinary.yaml"
    ordinary.write_text(yaml.safe_dump(weights))
    assert mergesearch("merge", ordinary, "--out", tmp_path / "second")[0] == 0
    found = open_checkpoint(str(tmp_path / "second"))
    wanted = open_checkpoint(folders[1])
    for name in wanted.names:
        torch.testing.assert_close(found.read(name), wanted.read(name), atol=1e-6, rtol=1e-5)
    assert "--members: expected none" in refused(
        "merge", ordinary, "--out", tmp_path / "third", "--members", members
    )


def test_operators_on_mixtures_are_listed() -> None:
    rows = {row["name"]: row for row in json.loads(mergesearch("ls", "operators", "--json")[1])}
    assert {*MIXTURE_OPERATORS} <= {*rows}
    assert all(rows[name]["when"] for name in MIXTURE_OPERATORS)


@pytest.mark.parametrize("operator", ["{name: ties}", "[mc_smoe]", "ties"])
def test_other_recipes_are_none_of_one_mixture(operator: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"base: b\noperator: {operator}\n")
    assert not is_mixture_recipe(file)
