"""`mergesearch import`: recipes that merge at once, studies that begin there, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mergesearch.merging.coefficients import rows_by_tensor
from mergesearch.merging.recipe_file import load_recipe
from mergesearch.search.plan.loading import load_study
from mergesearch.search.plan.planning import plan_study
from mergesearch.spaces.groups import groups_by_name
from tests.search.cli.test_cli import mergesearch
from tests.search.conftest import model_study
from tests.search.init.journeys import make_reviewers, reviews, write_csv


def configuration(models: Path, left: Any, right: Any, **more: Any) -> dict[str, Any]:
    """Task arithmetic with these weights."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "base"),
        "models": [
            {"model": str(models / name), "parameters": {"weight": weight}}
            for name, weight in (("left", left), ("right", right))
        ],
        **more,
    }


def written(data: dict[str, Any], folder: Path) -> Path:
    path = folder / "my merge.yml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_recipe_that_merges_at_once(tmp_path: Path, pico_models: Path) -> None:
    source = written(configuration(pico_models, 0.4, 0.2, dtype="bfloat16"), tmp_path)
    recipe = tmp_path / "recipe.yaml"
    code, out, err = mergesearch("import", source, "--out", recipe)
    assert code == 0, err
    command = f"mergesearch merge {recipe} --out merged --dtype bfloat16"
    assert out == f"wrote {recipe}; `{command}` makes the merge\n"
    code, out, err = mergesearch(
        *("merge", recipe, "--out", tmp_path / "merged", "--dtype", "bfloat16"),
        *("--shard-size", "2KB", "--json"),
    )
    assert code == 0, err
    folder = tmp_path / "merged"
    assert len(list(folder.glob("*.safetensors"))) > 1
    card = (folder / "README.md").read_text()
    assert "coefficients: {left: 0.4, right: 0.2}" in card
    assert "mergesearch merge recipe.yaml --out merged-model --dtype bfloat16" in card
    assert "| mergekit | cannot make this merge: ViTForImageClassification is none" in card


def test_problems_are_listed_and_nothing_is_written(tmp_path: Path, pico_models: Path) -> None:
    data = configuration(pico_models, 0.4, 0.2, chat_template="auto", paramters={})
    source = written(data, tmp_path)
    recipe = tmp_path / "recipe.yaml"
    code, out, err = mergesearch("import", source, "--out", recipe)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert [line.split(": ")[3] for line in lines[:2]] == ["paramters", "chat_template"]
    assert lines[2].endswith("nothing was written; change these keys, or use --lenient")
    assert not recipe.exists()
    code, out, _ = mergesearch("import", source, "--out", recipe, "--lenient", "--json")
    assert code == 0
    assert len(json.loads(out)["problems"]) == 2
    assert load_recipe(recipe).operator == "task_arithmetic"


def test_links_are_not_replaced(tmp_path: Path, pico_models: Path) -> None:
    source = written(configuration(pico_models, 0.4, 0.2), tmp_path)
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "elsewhere")
    assert "expected a file to write" in mergesearch("import", source, "--out", link)[2]
    assert "received none" in mergesearch("import", source)[2]


STARTS: list[tuple[str, Any, Any, str, int]] = [
    ("one coefficient", 0.3, 0.3, "task", 2),
    ("one for each expert", 1.8, -0.1, "task", 2),
    ("a gradient", [0.1, 0.9], 0.3, "task", 10),
    ("a filter", [{"filter": "attention", "value": 0.1}, {"value": 0.5}], 0.3, "task", 4),
    (
        "both",
        [{"filter": "attention", "value": [0.1, 0.2]}, {"value": [0.5, 0.7]}],
        0.3,
        "block",
        14,
    ),
    (
        "a tensor",
        [{"filter": "layer.0.output.dense.bias", "value": 1}, {"value": 0}],
        0.3,
        "task",
        4,
    ),
]


@pytest.mark.parametrize(("left", "right", "granularity", "dimensions"), [s[1:] for s in STARTS])
def test_a_study_that_begins_at_the_merge(
    left: Any,
    right: Any,
    granularity: str,
    dimensions: int,
    tmp_path: Path,
    pico_models: Path,
    pico_items: Path,
) -> None:
    source = written(configuration(pico_models, left, right), tmp_path)
    code, _, err = mergesearch(
        "import", source, "--out", tmp_path / "recipe.yaml", "--study", tmp_path / "study.yaml"
    )
    assert code == 0, err
    data = yaml.safe_load((tmp_path / "study.yaml").read_text())
    assert data["name"] == "my-merge"
    assert data["space"]["granularity"] == granularity
    assert "evaluators" in mergesearch("check", tmp_path / "study.yaml")[2]
    data["evaluators"] = model_study(pico_models, pico_items)["evaluators"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data))
    plan = plan_study(load_study(tmp_path / "study.yaml"))
    assert plan.layout is not None
    space = plan.space
    assert len(space.start) == dimensions
    recipe = load_recipe(tmp_path / "recipe.yaml", groups_by_name)
    wanted = rows_by_tensor(recipe.field, plan.layout)
    found = rows_by_tensor(space.decode(space.start).field, plan.layout)
    assert wanted is not None
    assert found is not None
    for name, row in wanted.items():
        np.testing.assert_allclose(found[name], row, rtol=0, atol=1e-9)


def test_a_study_with_data_passes_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_reviewers(tmp_path / "models", steps=1)
    write_csv(tmp_path / "reviews.csv", reviews("books", 30, 7) + reviews("films", 30, 8))
    merge = {
        "merge_method": "task_arithmetic",
        "base_model": "models/base",
        "models": [
            {"model": f"models/{name}", "parameters": {"weight": 0.4}}
            for name in ("books", "films")
        ],
    }
    Path("merge.yml").write_text(yaml.safe_dump(merge))
    command = ("import", "merge.yml", "--study", "study.yaml", "--data", "reviews.csv")
    code, out, err = mergesearch(*command)
    assert code == 0, err
    assert "wrote study.yaml; `mergesearch check study.yaml`" in out
    code, out, err = mergesearch("check", "study.yaml")
    assert code == 0, err
    [section] = yaml.safe_load(Path("study.yaml").read_text())["evaluators"]
    assert section["kind"] == "text_classification"
    assert section["data"]["file"] == "reviews.csv"
    alone = ("import", "merge.yml", "--out", "recipe.yaml", "--data", "reviews.csv")
    assert "--data: expected --study" in mergesearch(*alone)[2]


def test_a_study_cannot_begin_at_an_absurd_merge(tmp_path: Path, pico_models: Path) -> None:
    source = written(configuration(pico_models, -1e19, 0.3), tmp_path)
    study = tmp_path / "study.yaml"
    code, _, err = mergesearch("import", source, "--study", study)
    assert code == 2
    assert "expected coefficients of at most 1,000,000,000" in err
    assert "received 1e+19" in err
    assert not study.exists()
