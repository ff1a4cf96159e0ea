"""Model cards: what the hub reads of them, parents, licences, results, how to reproduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from mergesearch.merging import Field, Recipe, Source
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.about import About, Result
from mergesearch.merging.export.model_card import render_card
from mergesearch.merging.export.parents import hub_parents, licence_conflict
from mergesearch.merging.family.preflight import layout_of


def recipe_of(base: Path, experts: Any) -> Recipe:
    layout = layout_of(open_checkpoint(str(base)))
    sources = tuple(Source(folder.name, str(folder)) for folder in experts)
    return Recipe(
        Source("base", str(base)),
        sources,
        "task_arithmetic",
        Field.constant(layout.size, [0.3] * len(sources)),
        layout=layout.digest,
    )


def card_of(recipe: Recipe, about: About, **options: Any) -> str:
    base, *experts = [open_checkpoint(s.path, s.name) for s in (recipe.base, *recipe.experts)]
    return render_card(recipe, layout_of(base), base, experts, {}, about=about, **options)


def front(folder: Path, data: Mapping[str, Any]) -> Path:
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(dict(data))}---\n# A model\n")
    return folder


RESULTS = (
    Result("accuracy", 0.91, 0.004, "items of study digits"),
    Result("kept, english", 0.5, None, "items of study digits"),
)


def test_held_out_results_are_a_model_index_with_their_errors(pico: Any) -> None:
    family = pico("vit")
    about = About(RESULTS, "image-classification", "base: x\n", ("mergesearch export RUN",))
    card = ModelCard(card_of(recipe_of(family.base, family.experts), about))
    results = card.data.eval_results
    assert results is not None
    assert [(each.metric_type, each.metric_value) for each in results] == [
        ("accuracy", 0.91),
        ("accuracy_stderr", 0.004),
        ("kept,_english", 0.5),
    ]
    assert {each.dataset_name for each in results} == {"items of study digits"}
    assert {each.dataset_split for each in results} == {"test"}
    assert card.data.pipeline_tag == "image-classification"
    assert "```yaml\nbase: x\n```" in card.text
    assert "mergesearch merge recipe.yaml --out merged-model\nmergesearch export RUN" in card.text
    assert "mergekit" not in card.text


def test_mergekit_is_a_tag_only_where_its_file_is_there(pico: Any) -> None:
    family = pico("vit")
    card = ModelCard(card_of(recipe_of(family.base, family.experts), About(), mergekit=True))
    assert card.data.tags == ["merge", "mergesearch", "mergekit"]
    assert "mergekit-yaml mergekit_config.yml merged-model" in card.text
    assert card.data.eval_results is None


def test_commands_name_another_dtype(pico: Any) -> None:
    family = pico("vit")
    about = About(commands=("# or:", "mergesearch export RUN --out merged-model"), dtype="float16")
    card = card_of(recipe_of(family.base, family.experts), about)
    assert "merge recipe.yaml --out merged-model --dtype float16\n# or:\nmergesearch" in card
    assert "export RUN --out merged-model --dtype float16\n" in card


def test_long_recipes_are_left_to_their_file(pico: Any) -> None:
    family = pico("vit")
    long = "a: 1\n" * 61
    card = card_of(recipe_of(family.base, family.experts), About(recipe=long))
    assert "## Recipe" not in card


def test_the_hub_cache_and_cards_of_experts_name_parents(
    pico: Any, copy_of: Callable[..., Path], tmp_path: Path
) -> None:
    family = pico("vit")
    cached = tmp_path / "models--org--tiny" / "snapshots" / "0123"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(family.experts[0])
    local = front(copy_of(family.experts[1]), {"base_model": "google/vit-base"})
    recipe = recipe_of(family.base, (cached, local))
    base, *experts = [open_checkpoint(s.path, s.name) for s in (recipe.base, *recipe.experts)]
    assert hub_parents(recipe, base, experts) == ["google/vit-base", "org/tiny"]
    front(local, {"base_model": ["a/b", "c/d"]})  # a merge: its parents are not one base
    assert hub_parents(recipe, base, experts) == ["org/tiny"]
    front(local, {"base_model": "upright"})
    assert hub_parents(recipe, base, experts) == ["org/tiny"]


def test_licence_conflicts_name_their_parents(pico: Any, copy_of: Callable[..., Path]) -> None:
    family = pico("vit")
    base = front(copy_of(family.base), {"license": "mit"})
    one = front(copy_of(family.experts[0]), {"license": "cc-by-nc-4.0"})
    text = card_of(recipe_of(base, (one, family.experts[1])), About())
    assert (
        f"The parents declare different licences: mit (`base`); cc-by-nc-4.0 (`{one.name}`). No "
        "licence is declared by `two`. Settle the licence of the merge before you publish it."
    ) in text
    assert ModelCard(text).data.license is None


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        ([("a", "mit"), ("b", None)], "No licence is declared by `b`."),
        ([("a", "mit"), ("b", "gpl")], "different licences: mit (`a`); gpl (`b`)."),
    ],
)
def test_what_is_said_of_licences(licences: Any, said: str) -> None:
    assert said in licence_conflict(licences)
