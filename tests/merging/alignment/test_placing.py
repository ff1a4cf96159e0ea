"""Experts in the base's coordinates, as merges, recipes and studies see them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging import merge
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import RecipeError
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.family.family import ModelFamily, align_family, open_family
from mergesearch.merging.family.placing.widths import ChosenWidths
from mergesearch.merging.lineage.refusal import check_lineages
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.policies import parse_policies
from mergesearch.merging.recipe_file import load_recipe
from mergesearch.merging.tensors.memo import Memo
from mergesearch.search.plan.lineage import family_lineages
from mergesearch.search.spec.study_file import validate
from tests.merging.alignment.models import saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    for kind in ("vit", "resnet"):
        for seed, name in enumerate("ab"):
            saved(kind, folder / kind / name, seed)
    return folder


def family(folder: Path, align: Any, **special: Any) -> ModelFamily:
    base, expert = (open_checkpoint(str(folder / name), name) for name in "ab")
    return align_family(base, [expert], parse_policies({"align": {"b": align}, **special}))


def images() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(7))


def logits(folder: Path) -> torch.Tensor:
    model = load_model(str(folder), "AutoModelForImageClassification")
    with torch.no_grad():
        found: torch.Tensor = model(pixel_values=images()).logits
    return found


def logits_of(source: Checkpoint) -> torch.Tensor:
    """What a source answers, by a model of its configuration."""
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.for_model(**source.config)
    model = AutoModelForImageClassification.from_config(config).eval()
    state = {name: source.read(name) for name in source.tensors}
    loaded = type(model).from_pretrained(None, config=config, state_dict=state).eval()
    with torch.no_grad():
        found: torch.Tensor = loaded(pixel_values=images()).logits
    return found


def shorthand(
    folder: Path,
    out: Path,
    coefficient: float,
    align: str = "weight_matching",
    batch_norm: str = "refuse",
) -> Path:
    path = out / "recipe.yaml"
    path.write_text(
        f"base: {folder / 'a'}\nexperts:\n  b: {{path: {folder / 'b'}, align: {align}}}\n"
        f"operator: task_arithmetic\ncoefficients: {coefficient}\n"
        f"special: {{batch_norm: {batch_norm}}}\n"
    )
    return path


class TestExports:
    @pytest.mark.parametrize("align", ["weight_matching", "procrustes", "invertible", "pleas"])
    def test_the_aligned_expert_answers_as_itself(
        self, folder: Path, tmp_path: Path, align: str
    ) -> None:
        recipe = load_recipe(shorthand(folder / "vit", tmp_path, 1.0, align))
        export_model(recipe, tmp_path / "out")
        found = logits(tmp_path / "out")
        torch.testing.assert_close(found, logits(folder / "vit" / "b"), atol=1e-5, rtol=0)

    def test_a_widened_base_answers_as_itself(self, folder: Path, tmp_path: Path) -> None:
        recipe = load_recipe(shorthand(folder / "vit", tmp_path, 0.0, "pleas"))
        export_model(recipe, tmp_path / "out")
        assert open_checkpoint(str(tmp_path / "out")).config["intermediate_size"] == 30
        found = logits(tmp_path / "out")
        torch.testing.assert_close(found, logits(folder / "vit" / "a"), atol=1e-5, rtol=0)


class TestPleas:
    def test_the_average_is_the_paper_s(self, folder: Path) -> None:
        pleas = {"method": "pleas", "fraction": 0.5}
        wide = family(folder / "vit", pleas)
        plain = family(folder / "vit", "weight_matching")
        name = "vit.encoder.layer.0.intermediate.dense.weight"
        ours, theirs = (source.read(name) for source in wide.sources)
        base, expert = (source.read(name) for source in plain.sources)
        apart = (ours[:24] == theirs[:24]).all(1)
        assert apart.sum() == 12
        assert torch.equal(ours[:24], base)
        assert torch.equal(ours[24:], expert[apart])
        assert torch.equal(theirs[:24][~apart], expert[~apart])
        out = "vit.encoder.layer.0.output.dense.weight"
        ours, theirs = (source.read(out) for source in wide.sources)
        assert (ours[:, 24:] == 0).all()
        assert (theirs[:, :24][:, apart] == 0).all()

    @pytest.mark.parametrize("fraction", [0.25, 1.0])
    def test_all_of_a_resnet_gets_wider(self, folder: Path, fraction: float) -> None:
        wide = family(
            folder / "resnet", {"method": "pleas", "fraction": fraction}, batch_norm="merge"
        )
        for source, name in zip(wide.sources, "ab", strict=True):
            found = logits_of(source)
            expected = logits(folder / "resnet" / name)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    def test_three_models_share_layers(self, folder: Path, tmp_path: Path) -> None:
        paths = [folder / "resnet" / "a", folder / "resnet" / "b", tmp_path / "c"]
        saved("resnet", tmp_path / "c", 2)
        sources = [open_checkpoint(str(p), name) for p, name in zip(paths, "abc", strict=True)]
        spec = {"method": "pleas", "fraction": {"hidden_sizes.1": 0.5}, "sweeps": 1}
        policies = parse_policies({"align": {"b": spec, "c": spec}, "batch_norm": "merge"})
        wide = align_family(sources[0], sources[1:], policies)
        assert wide.base.config["hidden_sizes"] == [8, 24]
        for source, path in zip(wide.sources, paths, strict=True):
            torch.testing.assert_close(logits_of(source), logits(path), atol=1e-5, rtol=0)

    def test_other_widths_have_the_layout_of_their_family(
        self, folder: Path, tmp_path: Path
    ) -> None:
        recipe = load_recipe(shorthand(folder / "resnet", tmp_path, 0.5, "pleas", "merge"))
        memo = Memo(tmp_path / "memo")
        chosen = ChosenWidths(recipe, open_family(recipe, memo).layout, memo)
        assert chosen.fractions == {"hidden_sizes.0": 0.25, "hidden_sizes.1": 0.25}
        assert chosen.at(chosen.fractions)[0] is recipe
        for shares in ({"hidden_sizes.0": 0.5, "hidden_sizes.1": 0.0}, {"hidden_sizes.1": 1.0}):
            full = {"hidden_sizes.0": 0.0} | shares
            other, layout = chosen.at(full)
            assert open_family(other, memo).layout.digest == layout.digest == other.layout
            assert chosen.at(full)[0].basis_key == other.basis_key != recipe.basis_key

    def test_settings_must_be_the_same_for_all(self, folder: Path) -> None:
        sources = [open_checkpoint(str(folder / "vit" / "b"), name) for name in "abc"]
        with pytest.raises(RecipeError, match=r"same settings for all experts.* 'c'"):
            align_family(sources[0], sources[1:], parse_policies({"align": {"b": "pleas"}}))

    def test_widths_go_by_their_names(self, folder: Path) -> None:
        with pytest.raises(RecipeError, match="names of widths, received 'hidden_size'"):
            family(folder / "vit", {"method": "pleas", "fraction": {"hidden_size": 0.5}})


class TestPolicies:
    @pytest.mark.parametrize(
        ("special", "message"),
        [
            ({"align": {"c": "weight_matching"}}, "names of experts, received 'c'"),
            ({"align": {"b": "activation_matching"}}, "expected calibration"),
            ({"align": {"b": "weight_matching"}, "heads": "own"}, "set heads to base or average"),
            ({"align": {"b": "magic"}}, "align.b.method"),
        ],
    )
    def test_what_cannot_be_is_refused(
        self, folder: Path, special: Mapping[str, Any], message: str
    ) -> None:
        base, expert = (open_checkpoint(str(folder / "vit" / name), name) for name in "ab")
        with pytest.raises(RecipeError, match=message):
            align_family(base, [expert], parse_policies(special))

    def test_recipes_hold_the_alignment(self, folder: Path, tmp_path: Path) -> None:
        plain, turned = (
            load_recipe(shorthand(folder / "vit", tmp_path, 0.5, align))
            for align in ("weight_matching", "procrustes")
        )
        assert dict(plain.special)["align"] == {"b": {"method": "weight_matching"}}
        assert plain.basis_key != turned.basis_key

    def test_a_study_says_it_beside_the_path(self, folder: Path) -> None:
        align = {"method": "weight_matching", "sweeps": 5}
        spec = validate(
            {
                "name": "aligned",
                "base": str(folder / "vit" / "a"),
                "experts": {"b": {"path": str(folder / "vit" / "b"), "align": align}},
                "evaluators": [{"kind": "synthetic", "problem": "sphere"}],
                "budget": {"trials": 2},
            },
            "study",
        )
        assert spec.experts == {"b": str(folder / "vit" / "b")}
        assert dict(spec.special.choices)["align"] == {"b": align}

    def test_strangers_that_are_aligned_are_not_refused(self, folder: Path) -> None:
        (lineage,) = family_lineages(family(folder / "vit", "weight_matching"))
        assert lineage.aligned == "weight_matching"
        assert not lineage.refused
        assert check_lineages([lineage], None, "") == []


def test_items_that_change_make_another_arena(folder: Path, tmp_path: Path) -> None:
    import datasets

    from mergesearch.merging.alignment.spec import AlignSpec, item_versions

    def write(count: int) -> None:
        items = datasets.Dataset.from_dict({"pixels": [[0.5] * 8] * count})
        datasets.DatasetDict({"train": items}).save_to_disk(str(tmp_path / f"items{count}"))

    write(2)
    write(3)
    specs = [
        AlignSpec(
            method="activation_matching",
            calibration={
                "data": str(tmp_path / f"items{count}"),
                "model_class": "AutoModelForImageClassification",
                "inputs": {"pixel_values": "pixels"},
            },
        )
        for count in (2, 3)
    ]
    first, second = (item_versions(spec) for spec in specs)
    assert first
    assert first != second
    assert item_versions(AlignSpec(method="weight_matching")) == []


def test_state_dicts_are_not_aligned() -> None:
    state = {"weight": torch.eye(2)}
    with pytest.raises(RecipeError, match=r"special\.align: expected none for state dicts"):
        merge(state, {"b": state}, special={"align": {"b": "weight_matching"}})
