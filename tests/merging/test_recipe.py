"""Recipes: exact round trips, digests that identify merges, and the hand-written shorthand."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergesearch.merging import CheckpointError, Field, Recipe, RecipeError, Source
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.recipe_file import load_recipe, save_recipe

RECIPE = Recipe(Source("b", "/b"), (Source("e", "/e"),), "average", Field.constant(4, [1.0]))

_NUMBERS = st.floats(allow_nan=False)
_OPTIONS = st.dictionaries(
    st.text("abc_", min_size=1),
    st.floats(-9, 9) | st.integers(-9, 9) | st.booleans() | st.text() | st.none(),
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    inner = sorted(draw(st.sets(st.integers(1, 99), max_size=5)))
    experts = draw(st.integers(1, 3))
    segments = len(inner) + 1
    values = draw(st.lists(_NUMBERS, min_size=experts * segments, max_size=experts * segments))
    return Recipe(
        base=Source("base", "/models/base", draw(st.sampled_from(["", "ab12"]))),
        experts=tuple(Source(f"expert {i}", f"org/expert-{i}@v1") for i in range(experts)),
        operator=draw(st.sampled_from(["task_arithmetic", "average"])),
        field=Field(np.array([0, *inner, 100]), np.array(values).reshape(experts, segments)),
        hyperparameters=tuple(sorted(draw(_OPTIONS).items())),
        layout=draw(st.text("0123456789abcdef", max_size=16)),
    )


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipes())
def test_survives_json(recipe):
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.digest == recipe.digest


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_files_give_the_same_recipe(suffix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(recipes())
    def check(recipe: Recipe) -> None:
        path = folder / f"recipe{suffix}"
        save_recipe(recipe, path)
        again = load_recipe(path)
        assert again == recipe
        assert again.digest == recipe.digest

    check()
    assert [path.name for path in folder.iterdir()] == [f"recipe{suffix}"]


@given(recipes())
def test_digest_ignores_cuts_but_no_coefficient(recipe):
    values = np.nan_to_num(recipe.field.values, posinf=1.0, neginf=-1.0).clip(-1e9, 1e9)
    one, other = (
        recipe.with_field(Field(recipe.field.boundaries, v))
        for v in (values, np.nextafter(values, np.inf))
    )
    assert one.with_field(one.field.refine([7, 50])).digest == one.digest
    assert one.digest != other.digest
    assert one.basis_key == other.basis_key == recipe.basis_key


def test_digest_follows_content_where_it_is_known():
    field = Field.constant(10, [0.5])
    here, there = (
        Recipe(Source("b", p, "f1"), (Source("e", p, "f2"),), "average", field)
        for p in ("/x", "/y")
    )
    assert here.digest == there.digest
    unknown = [
        Recipe(Source("b", p), (Source("e", p),), "average", field).digest for p in ("/x", "/y")
    ]
    assert unknown[0] != unknown[1]


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_coefficients_that_are_not_finite_survive_files(suffix, tmp_path):
    recipe = RECIPE.with_field(Field(np.array([0, 1, 2, 4]), np.array([[np.nan, np.inf, -np.inf]])))
    save_recipe(recipe, tmp_path / f"x{suffix}")
    assert load_recipe(tmp_path / f"x{suffix}") == recipe


# --- shorthand
# ----------------------------------------------------------------------------


@pytest.fixture
def shorthand(pico, tmp_path):
    """``shorthand(**changes)``: a recipe beside links to the pico ViT, written and read.

    None drops a key.
    """
    family = pico("vit")
    for name, folder in (
        ("base", family.base),
        ("one", family.experts[0]),
        ("two", family.experts[1]),
    ):
        (tmp_path / name).symlink_to(folder)
    standard = {
        "base": "base",
        "experts": ["one", "two"],
        "operator": "task_arithmetic",
        "coefficients": 0.3,
    }

    def read(suffix: str = ".yaml", **changes: Any) -> Recipe:
        data = {key: value for key, value in (standard | changes).items() if value is not None}
        path = tmp_path / f"merge{suffix}"
        path.write_text(
            yaml.safe_dump(data, sort_keys=False) if suffix == ".yaml" else json.dumps(data)
        )
        return load_recipe(path)

    read.layout = layout_of(open_checkpoint(str(family.base)))
    read.folder = tmp_path
    return read


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_one_number_for_all(shorthand, suffix):
    recipe = shorthand(suffix)
    assert recipe.base == Source("base", str(shorthand.folder / "base"))
    assert [expert.name for expert in recipe.experts] == ["one", "two"]
    assert recipe.experts[1].path == str(shorthand.folder / "two")
    assert recipe.field == Field.constant(shorthand.layout.size, [0.3, 0.3])
    assert recipe.layout == shorthand.layout.digest


def test_paths_start_at_the_recipe(shorthand, monkeypatch):
    monkeypatch.chdir("/")
    assert shorthand().digest == load_recipe(shorthand.folder / "merge.yaml").digest
    assert shorthand(base=str(shorthand.folder / "base")).base == shorthand().base


def test_named_experts_and_one_number_each(shorthand):
    recipe = shorthand(experts={"a": "two", "b": "one"}, coefficients=[0.5, 1])
    assert [(expert.name, Path(expert.path).name) for expert in recipe.experts] == [
        ("a", "two"),
        ("b", "one"),
    ]
    assert recipe.field == Field.constant(shorthand.layout.size, [0.5, 1.0])


def test_hub_names_stay_and_local_folders_win(shorthand):
    recipe = shorthand(experts=["org/one@main", "two"])
    assert recipe.experts[0] == Source("one", "org/one@main")
    (shorthand.folder / "org").mkdir()
    (shorthand.folder / "org" / "one@main").symlink_to(shorthand.folder / "one")
    assert shorthand(experts=["org/one@main", "two"]).experts[0].path == str(
        shorthand.folder / "org" / "one@main"
    )


def test_without_coefficients_the_operators_default_holds(shorthand):
    assert shorthand(coefficients=None).field == Field.constant(shorthand.layout.size, [0.3, 0.3])
    assert shorthand(coefficients=None, operator="average").field.values.tolist() == [[0.5], [0.5]]


def test_the_first_pattern_that_matches_the_whole_name_decides(shorthand):
    rules = {r".*\.layer\.0\..*": [0.1, 0.2], r".*bias": 0.7, "classifier": 9, "default": 0.3}
    with pytest.raises(
        RecipeError,
        match=r"coefficients\.classifier: matches no tensor; there are 'classifier.bias'",
    ):
        shorthand(coefficients=rules)
    del rules["classifier"]
    field = shorthand(coefficients=rules).field
    for spec in shorthand.layout.tensors:
        expected = (
            [0.1, 0.2]
            if ".layer.0." in spec.name
            else [0.7] * 2
            if spec.name.endswith("bias")
            else [0.3] * 2
        )
        assert field.at([spec.start, spec.stop - 1]).T.tolist() == [expected, expected], spec.name


def test_patterns_must_cover_every_tensor_or_have_a_default(shorthand):
    with pytest.raises(
        RecipeError, match=r"no pattern matches tensor 'classifier.bias'; add `default: NUMBER`"
    ):
        shorthand(coefficients={r"vit\..*": 0.3})
    assert shorthand(coefficients={".*": 0.4}).field == Field.constant(
        shorthand.layout.size, [0.4, 0.4]
    )


def test_yaml_numbers_that_yaml_takes_for_text(shorthand):
    assert shorthand(coefficients="1e-3").field.values.tolist() == [[1e-3], [1e-3]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"operater": "ties"}, ["unknown key 'operater'", "base, experts, operator"]),
        ({"operator": None}, ["missing key 'operator'", "base, experts, operator"]),
        ({"operator": "task_arithmetics"}, ["task_arithmetics", "task_arithmetic'"]),
        ({"operator": 3}, ["operator: expected text, received 3"]),
        ({"hyperparameters": {"density": 0.5}}, ["density"]),
        ({"hyperparameters": [1]}, ["hyperparameters: expected a mapping"]),
        ({"base": {}}, ["base: expected text"]),
        ({"experts": []}, ["experts: expected at least one"]),
        ({"experts": "one"}, ["experts: expected a list of paths or a mapping"]),
        ({"experts": ["one", "one"]}, ["'one' twice"]),
        ({"experts": ["one", None]}, ["experts[1]: expected text, received None"]),
        ({"coefficients": [0.1, 0.2, 0.3]}, ["list of 2, received a list of 3"]),
        ({"coefficients": "much"}, ["coefficients: expected a finite number, received 'much'"]),
        ({"coefficients": True}, ["expected a finite number, received True"]),
        ({"coefficients": [0.1, float("nan")]}, ["expected a finite number, received nan"]),
        (
            {"coefficients": {"default": float("inf")}},
            ["coefficients.default: expected a finite number"],
        ),
        ({"coefficients": {"(": 1}}, ["coefficients.(: expected a regular expression"]),
    ],
)
def test_refusals_name_the_file_the_key_and_what_is_allowed(shorthand, changes, words):
    with pytest.raises(RecipeError) as caught:
        shorthand(**changes)
    message = str(caught.value)
    assert message.startswith(f"{shorthand.folder / 'merge.yaml'}: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_missing_base_is_a_checkpoint_error(shorthand):
    with pytest.raises(CheckpointError, match="nowhere: expected a folder"):
        shorthand(base="nowhere")


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "3", "", "\0", "!!python/object/apply:os.system ['true']", "base: \xff"]
)
def test_files_that_are_no_recipe(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"x\.yaml: "):
        load_recipe(path)


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: expected a readable recipe file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": 2}, "format 1, received 2"),
        ({"more": 1}, "more"),
        ({"base": "x"}, "recipe"),
        ({"base": {"name": "x"}}, "path"),
        ({"experts": 3}, "recipe"),
        ({"field": {"boundaries": [0, 2], "values": []}}, "field"),
        ({"hyperparameters": [1]}, "recipe"),
    ],
)
def test_malformed_exact_form(change, word, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(RECIPE.to_dict() | change))
    with pytest.raises(RecipeError, match=word):
        load_recipe(tmp_path / "x.json")


# --- writing
# ----------------------------------------------------------------------------


def test_other_suffixes_and_unwritable_places(tmp_path):
    with pytest.raises(RecipeError, match=r"\.yaml, \.yml, \.json, received '\.toml'"):
        save_recipe(RECIPE, tmp_path / "x.toml")
    with pytest.raises(RecipeError, match="writable place"):
        save_recipe(RECIPE, tmp_path / "none" / "x.yaml")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.yaml"
    save_recipe(RECIPE, path)
    before = path.read_text()

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecipeError, match="No space left"):
        save_recipe(RECIPE.with_field(Field.constant(4, [0.5])), path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_are_ordinary(tmp_path):
    save_recipe(RECIPE, tmp_path / "x.yaml")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "x.yaml").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_local_paths_are_written_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "sub").mkdir()
    recipe = Recipe(
        Source("b", "b"), (Source("e", "org/e@v1"),), "average", Field.constant(4, [1.0])
    )
    save_recipe(recipe, tmp_path / "sub" / "x.yaml")
    again = load_recipe(tmp_path / "sub" / "x.yaml")
    assert again.base.path == str(tmp_path / "b")
    assert again.experts == recipe.experts
