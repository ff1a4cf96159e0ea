"""Merges as mergekit's configurations: the way there and back, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.coefficients import rows_by_tensor
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.family.family import open_family
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.mergekit_format.exporting import FILE, NotExpressible, mergekit_config
from mergesearch.merging.mergekit_format.importing import import_mergekit
from mergesearch.merging.mergekit_format.settings import Place, value_at
from mergesearch.merging.mergekit_format.writing_settings import setting_of
from mergesearch.merging.recipe import Recipe, Source
from mergesearch.merging.recipe_file import load_recipe, recipe_text
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout
from mergesearch.spaces.groups import groupings_by_name, groups_by_name

TENSORWISE = {"scope": "tensor"}
LIVE = {"mode": "live", "merge": "weighted_mean"}


def by_tensor(layout: Layout, experts: int, *, least: float = 0.1) -> Field:
    """Different coefficients at every tensor."""
    starts = [*layout.segment_starts(), layout.size]
    values = np.random.default_rng(1).uniform(least, 0.9, (experts, len(starts) - 1))
    return Field(np.array(starts), values)


def by_block(layout: Layout, experts: int) -> Field:
    """Other coefficients in the second block, and outside the blocks those of the first."""
    starts = [*layout.segment_starts(), layout.size]
    second = np.array([".1." in name for name in layout.names])
    rows = [np.where(second, 0.3 + 0.1 * k, 0.5) for k in range(experts)]
    return Field(np.array(starts), np.array(rows))


def recipe_of(family: Any, operator: str, field: Any, experts: int = 2, **options: Any) -> Recipe:
    layout = layout_of(open_checkpoint(str(family.base)))
    return Recipe(
        base=Source("base", str(family.base)),
        experts=tuple(Source(folder.name, str(folder)) for folder in family.experts[:experts]),
        operator=operator,
        field=field(layout, experts) if callable(field) else Field.constant(layout.size, field),
        hyperparameters=tuple(sorted(options.items())),
        layout=layout.digest,
    )


def text_of(recipe: Recipe, dtypes: frozenset[str] = frozenset({"float32"})) -> str:
    return mergekit_config(recipe, open_family(recipe), dtypes)


#: Operator, coefficients, number of experts, hyperparameters.
EXPRESSIBLE: list[tuple[str, Any, int, dict[str, Any]]] = [
    ("average", by_tensor, 2, {}),
    ("task_arithmetic", (0.3, 0.7), 2, {}),
    ("task_arithmetic", by_block, 2, {}),
    ("task_arithmetic", by_tensor, 2, {}),
    ("ties", by_tensor, 2, {"density": 0.37, **TENSORWISE, **LIVE}),
    ("ties", (0.4, 0.4), 2, {"density": 0.3, **TENSORWISE}),
    ("ties", by_tensor, 2, {"density": 0.07, **TENSORWISE, "mode": "live", "merge": "sum"}),
    ("dare", by_block, 2, {"drop": 0.0}),
    ("dare_ties", (0.3, 0.2), 2, {"drop": 0.0, **LIVE}),
    ("della", (0.3, 0.2), 2, {"density": 1.0, "epsilon": 0.0, **LIVE}),
    ("della_linear", by_block, 2, {"density": 1.0, "epsilon": 0.0}),
    ("breadcrumbs", by_tensor, 2, {"density": 0.33, "gamma": 0.1, **TENSORWISE, "vectors": "trim"}),
    ("slerp", by_tensor, 1, {}),
    ("sce", (1.0, 1.0), 2, {"topk": 1.0}),
]

#: The same, of merges that come back as those of other operators, or not at all.
OTHERWISE: list[tuple[str, Any, int, dict[str, Any]]] = [
    ("lines", by_block, 2, {"alpha": 0.2, "beta": 0.7}),
    ("lines", (0.9, 0.8), 2, {}),
    ("layer_swap", (1.0,), 2, {"bottom": 1, "top": 0}),
    ("layer_swap", (0.6,), 2, {"bottom": 0, "top": 1, "outside": "base"}),
    ("layer_swap", (1.0,), 2, {"bottom": 0, "top": 0, "transition": 1, "outside": "second"}),
    ("sce", (1.0, 1.0), 2, {"topk": 0.3, "select_applies_to": "deltas"}),
]


@pytest.mark.parametrize(
    "case", EXPRESSIBLE, ids=lambda case: f"{case[0]} {getattr(case[1], '__name__', case[1])}"
)
def test_the_way_back_gives_the_same_merge(case: Any, pico: Any, tmp_path: Path) -> None:
    operator, field, experts, options = case
    recipe = recipe_of(pico("llama"), operator, field, experts, **options)
    path = tmp_path / FILE
    path.write_text(text_of(recipe))
    imported = import_mergekit(path, groupings_by_name)
    assert imported.problems == ()
    assert imported.dtype == "float32"
    (tmp_path / "recipe.yaml").write_text(recipe_text(imported.recipe))
    back = load_recipe(tmp_path / "recipe.yaml", groups_by_name)
    layout = layout_of(open_checkpoint(recipe.base.path))
    assert rows_by_tensor(back.field, layout) == rows_by_tensor(recipe.field, layout)
    assert [source.path for source in (back.base, *back.experts)] == [
        source.path for source in (recipe.base, *recipe.experts)
    ]
    assert back.operator == operator
    same = {"epsilon", "rescale", "seed", "vectors"}  # without meaning where nothing is dropped
    given = {name: value for name, value in options.items() if name not in same}
    assert given.items() <= back.options.items()


@pytest.mark.parametrize("case", OTHERWISE[:4], ids=lambda case: f"{case[0]} {case[3]}")
def test_scales_and_swaps_come_back_as_coefficients(case: Any, pico: Any, tmp_path: Path) -> None:
    from tests.merging.conftest import stored

    operator, field, experts, options = case
    recipe = recipe_of(pico("llama"), operator, field, experts, **options)
    path = tmp_path / FILE
    path.write_text(text_of(recipe))
    imported = import_mergekit(path, groupings_by_name)
    assert imported.problems == ()
    (tmp_path / "recipe.yaml").write_text(recipe_text(imported.recipe))
    back = load_recipe(tmp_path / "recipe.yaml", groups_by_name)
    assert back.operator == {"lines": "task_arithmetic", "layer_swap": "average"}[operator]
    ours = stored(export_model(recipe, tmp_path / "ours").folder)
    theirs = stored(export_model(back, tmp_path / "theirs").folder)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=2e-7)


def test_sce_is_not_written_where_mergekit_weighs_alike(pico: Any, copy_of: Any) -> None:
    from tests.merging.conftest import stored

    recipe = recipe_of(pico("llama"), "sce", (1.0, 1.0), topk=1.0)
    origin = stored(pico("llama").base)
    small = [
        Source(
            str(k),
            str(
                copy_of(
                    folder,
                    lambda tensors: {
                        name: origin[name] + 1e-3 * (tensor - origin[name])
                        for name, tensor in tensors.items()
                    },
                )
            ),
        )
        for k, folder in enumerate(pico("llama").experts[:2])
    ]
    with pytest.raises(NotExpressible, match="weighs experts alike where their changes are small"):
        text_of(replace(recipe, experts=tuple(small)))


def test_model_stock_is_written_where_experts_agree(pico: Any, copy_of: Any) -> None:
    from tests.merging.conftest import stored

    recipe = recipe_of(pico("llama"), "model_stock", (1.0, 1.0))
    first = stored(pico("llama").experts[0])
    near = copy_of(
        pico("llama").experts[1],
        lambda tensors: {name: 0.8 * first[name] + 0.2 * each for name, each in tensors.items()},
    )
    text = text_of(replace(recipe, experts=(recipe.experts[0], Source("two", str(near)))))
    assert yaml.safe_load(text)["parameters"] == {"filter_wise": False}


def test_blocks_are_written_as_blocks(pico: Any) -> None:
    data = yaml.safe_load(text_of(recipe_of(pico("llama"), "task_arithmetic", by_block)))
    assert data["models"][2]["parameters"]["weight"] == [
        {"filter": "model.layers.1.", "value": 0.4},
        {"value": 0.5},
    ]
    assert data["models"][0] == {"model": str(pico("llama").base)}


@pytest.mark.parametrize("density", [0.07, 0.5, 0.37, 1.0])
def test_densities_keep_as_many_elements_as_here(density: float, pico: Any) -> None:
    options = {"density": density, **TENSORWISE, "mode": "live", "merge": "sum"}
    recipe = recipe_of(pico("llama"), "ties", (0.3, 0.2), **options)
    setting = yaml.safe_load(text_of(recipe))["parameters"]["density"]
    for spec in layout_of(open_checkpoint(recipe.base.path)).tensors:
        value = value_at(setting, Place(spec.name))
        assert value is not None
        # mergekit keeps int(density * n) of them
        assert int(value * spec.size) == math.ceil(Fraction(str(density)) * spec.size)


def test_filters_of_names_that_are_parts_of_each_other() -> None:
    names = ["a.weight", "b.a.weight", "layers.1.w", "layers.11.w"]
    setting = setting_of(names, [1.0, 2.0, 3.0, 4.0])
    assert [value_at(setting, Place(name)) for name in names] == [1.0, 2.0, 3.0, 4.0]


def opposed(recipe: Recipe, copy_of: Callable[..., Path], base: Path) -> Recipe:
    """The second expert changed against the first."""
    from tests.merging.conftest import stored

    origin = stored(base)
    path = copy_of(
        Path(recipe.experts[0].path),
        lambda tensors: {name: 2 * origin[name] - tensor for name, tensor in tensors.items()},
    )
    return replace(recipe, experts=(recipe.experts[0], Source("two", str(path))))


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("consensus", (0.3, 0.3), {}, "operator consensus has no counterpart"),
    ("sce", (1.0, 1.0), {}, "merges selected positions alone"),
    ("sce", (1.0, 0.9), {"topk": 1.0}, "has no coefficients"),
    ("ties", (0.3, 0.3), {"density": 0.2}, "trims every tensor by itself"),
    ("ties", (0.3, 0.2), {"density": 0.2, **TENSORWISE}, "elects signs after weights"),
    ("ties", (0.3, 0.3), {"density": 1.0, "merge": "max"}, "elects signs after weights"),
    ("dare", (0.3, 0.3), {"drop": 0.5}, "masks are random"),
    ("breadcrumbs", (0.3, 0.3), {}, "thins every tensor by itself"),
    ("model_stock", (1.0, 0.9), {}, "has no coefficients"),
]


@pytest.mark.parametrize(("operator", "field", "options", "reason"), REFUSED)
def test_what_mergekit_does_otherwise(
    operator: str, field: Any, options: Mapping[str, Any], reason: str, pico: Any
) -> None:
    with pytest.raises(NotExpressible, match=reason):
        text_of(recipe_of(pico("llama"), operator, field, **options))


def test_what_other_reasons_there_are(pico: Any, copy_of: Any) -> None:
    family = pico("llama")
    recipe = recipe_of(family, "task_arithmetic", (0.3, 0.3))
    inside = Field(np.array([0, 5, recipe.field.size]), np.array([[0.1, 0.2], [0.1, 0.2]]))
    with pytest.raises(NotExpressible, match="vary inside tensors"):
        text_of(replace(recipe, field=inside))
    with pytest.raises(NotExpressible, match="special tensors: scalars"):
        text_of(replace(recipe, special=(("scalars", "base"),)))
    same = replace(recipe, special=(("vocabulary", "base"),))  # and all vocabularies are the same
    assert mergekit_config(same, open_family(recipe), {"float32"}) == text_of(recipe)
    with pytest.raises(NotExpressible, match="ViTForImageClassification is none that it"):
        text_of(recipe_of(pico("vit"), "task_arithmetic", (0.3, 0.3)))
    with pytest.raises(NotExpressible, match="stored in bfloat16 and float32"):
        text_of(recipe, frozenset({"bfloat16", "float32"}))
    stock = recipe_of(family, "model_stock", (1.0, 1.0))
    with pytest.raises(NotExpressible, match="extrapolates where experts oppose"):
        text_of(opposed(stock, copy_of, family.base))


def test_an_export_has_the_file_or_says_why_not(pico: Any, tmp_path: Path) -> None:
    family = pico("llama")
    out = export_model(recipe_of(family, "task_arithmetic", (0.3, 0.3)), tmp_path / "sum").folder
    assert yaml.safe_load((out / FILE).read_text())["merge_method"] == "task_arithmetic"
    assert "- mergekit\n" in (out / "README.md").read_text().split("---\n")[1]
    out = export_model(
        recipe_of(family, "task_arithmetic", (0.3, 0.3)), tmp_path / "half", dtype="bfloat16"
    ).folder
    data = yaml.safe_load((out / FILE).read_text())
    assert (data["dtype"], data["out_dtype"]) == ("float32", "bfloat16")
    out = export_model(recipe_of(family, "sce", (1.0, 1.0)), tmp_path / "sce").folder
    card = (out / "README.md").read_text()
    assert not (out / FILE).exists()
    assert "| mergekit | cannot make this merge: it merges selected positions alone" in card
    assert "- mergekit\n" not in card.split("---\n")[1]
