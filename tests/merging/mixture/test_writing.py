"""Smaller mixtures: what is written, what transformers loads, what stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError, InputError, RecipeError
from mergesearch.merging.mixture.layers import moe_layers, read_experts
from mergesearch.merging.mixture.operators import MIXTURE_OPERATORS
from mergesearch.merging.mixture.recipe import is_mixture_recipe, load_mixture_recipe
from mergesearch.merging.mixture.writing import shrink_mixture
from tests.merging.mixture.conftest import KINDS

Recipes = Callable[..., Any]


def loaded(folder: Path) -> Any:
    """The model, once transformers has found every tensor in its place."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def answers(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 27).reshape(3, 8)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("operator", MIXTURE_OPERATORS)
def test_as_many_groups_as_experts_change_nothing(
    operator: str, recipe: Recipes, tmp_path: Path
) -> None:
    made = recipe("mixtral", operator, experts=5)
    shrink_mixture(made, tmp_path / "out")
    before = open_checkpoint(made.base)
    after = open_checkpoint(str(tmp_path / "out"))
    assert after.fingerprint() == before.fingerprint()
    assert dict(after.config) == dict(before.config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", ["prune_experts", "mc_smoe"])
def test_transformers_loads_the_smaller_model(
    kind: str, operator: str, recipe: Recipes, tmp_path: Path
) -> None:
    made = shrink_mixture(recipe(kind, operator, experts=3), tmp_path / "out")
    model = loaded(made.folder)
    gate = model.get_submodule("model.layers.1.mlp.gate")
    assert gate.weight.shape[0] == 3
    assert torch.isfinite(answers(model)).all()
    assert made.after < made.before
    assert "3 experts" in (made.folder / "README.md").read_text()


def test_stacked_and_single_tensors_give_the_same_model(recipe: Recipes, tmp_path: Path) -> None:
    for kind in ("qwen3_moe", "stacked"):
        shrink_mixture(recipe(kind, "sub_moe", experts=2, rank=0.5), tmp_path / kind)
    first = answers(loaded(tmp_path / "qwen3_moe"))
    assert torch.equal(first, answers(loaded(tmp_path / "stacked")))


def test_merged_experts_are_those_of_a_plain_computation(recipe: Recipes, tmp_path: Path) -> None:
    made = shrink_mixture(recipe("mixtral", "mc_smoe", experts=2), tmp_path / "out")
    base = open_checkpoint(made.plan.checkpoint.path)
    written = open_checkpoint(str(made.folder))
    for block, new in zip(made.plan.blocks, moe_layers(written), strict=True):
        old = read_experts(base, block.layer)
        for place, group in enumerate(block.groups):
            leader = old[group[0]]
            total = float(sum(block.statistics.usage[list(group)]))
            expected = np.zeros(leader.gate.shape)
            for index in group:
                member = old[index]
                gains = (
                    leader.gate @ member.gate.T
                    + leader.up @ member.up.T
                    + leader.down.T @ member.down
                )
                order = linear_sum_assignment(-gains.double().numpy())[1]
                weight = block.statistics.usage[index] / total
                expected += weight * member.gate.double().numpy()[order]
            found = read_experts(written, new)[place].gate
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
        rows = [group[0] for group in block.groups]
        assert torch.equal(written.read(new.router), base.read(block.layer.router)[rows])


def test_the_same_recipe_writes_the_same_bytes(recipe: Recipes, tmp_path: Path) -> None:
    first = shrink_mixture(recipe("mixtral", "sub_moe", experts=3, rank=0.8), tmp_path / "a")
    again = load_mixture_recipe(first.folder / "recipe.yaml")
    second = shrink_mixture(again, tmp_path / "b")
    for name in ("model.safetensors", "config.json", "recipe.yaml", "README.md"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name


def test_sub_moe_without_truncation_is_the_mean_by_usage(recipe: Recipes, tmp_path: Path) -> None:
    made = shrink_mixture(recipe("mixtral", "sub_moe", experts=2), tmp_path / "out")
    base = open_checkpoint(made.plan.checkpoint.path)
    written = open_checkpoint(str(made.folder))
    for block, new in zip(made.plan.blocks, moe_layers(written), strict=True):
        old = read_experts(base, block.layer)
        for place, group in enumerate(block.groups):
            usage = block.statistics.usage[list(group)]
            mean = sum(u * old[i].down.double() for u, i in zip(usage, group, strict=True))
            found = read_experts(written, new)[place].down
            torch.testing.assert_close(found, (mean / usage.sum()).float(), atol=1e-7, rtol=1e-6)


def test_blocks_of_different_counts_are_padded_and_that_is_said(
    recipe: Recipes, tmp_path: Path
) -> None:
    made = shrink_mixture(recipe("qwen3_moe", "mc_smoe", experts=[2, 4]), tmp_path / "out")
    assert [len(block.groups) for block in made.plan.blocks] == [2, 4]
    assert made.plan.stored == 4
    assert any("2, 4 different experts" in note for note in made.notes)
    assert "2, 4 different experts" in (made.folder / "README.md").read_text()
    block = made.plan.blocks[0]
    stored = read_experts(open_checkpoint(str(made.folder)), replace(block.layer, experts=4))
    for slot, expert in zip(block.slots, stored, strict=True):
        twin = next(i for i, other in enumerate(block.slots) if other.group == slot.group)
        assert torch.equal(expert.gate, stored[twin].gate)
    assert torch.isfinite(answers(loaded(made.folder))).all()


def test_all_rows_of_the_router_keep_the_size_of_the_model(recipe: Recipes, tmp_path: Path) -> None:
    made = shrink_mixture(recipe("mixtral", "mc_smoe", experts=2, router="all"), tmp_path / "out")
    base = open_checkpoint(made.plan.checkpoint.path)
    written = open_checkpoint(str(made.folder))
    assert made.after == made.before
    for block in made.plan.blocks:
        assert torch.equal(written.read(block.layer.router), base.read(block.layer.router))
        distinct = {expert.gate.numpy().tobytes() for expert in read_experts(written, block.layer)}
        assert len(distinct) == 2


def test_a_single_expert_lowers_how_many_a_token_uses(recipe: Recipes, tmp_path: Path) -> None:
    made = shrink_mixture(recipe("mixtral", "average_experts", experts=1), tmp_path / "out")
    config = json.loads((made.folder / "config.json").read_text())
    assert config["num_experts_per_tok"] == config["num_local_experts"] == 1
    assert any("uses 1 experts, 2 before" in note for note in made.notes)
    assert torch.isfinite(answers(loaded(made.folder))).all()


def test_members_weighted_by_usage_are_the_merge(recipe: Recipes, tmp_path: Path) -> None:
    made = shrink_mixture(
        recipe("mixtral", "mc_smoe", experts=3), tmp_path / "out", members=tmp_path / "members"
    )
    merged = open_checkpoint(str(made.folder))
    members = [open_checkpoint(str(folder)) for folder in made.members]
    assert len(members) == max(len(g) for block in made.plan.blocks for g in block.groups)
    for block, layer in zip(made.plan.blocks, moe_layers(merged), strict=True):
        parts = [read_experts(member, layer) for member in members]
        for place, group in enumerate(block.groups):
            usage = block.statistics.usage[list(group)]
            total = sum(u * parts[n][place].up for n, u in enumerate(usage)) / usage.sum()
            torch.testing.assert_close(
                read_experts(merged, layer)[place].up, total.float(), atol=1e-6, rtol=1e-5
            )


def test_low_rank_is_stored_whole_and_its_factors_are_priced(
    recipe: Recipes, tmp_path: Path
) -> None:
    made = shrink_mixture(
        recipe("mixtral", "mc_smoe", experts=3, rank=0.5, density=0.1), tmp_path / "out"
    )
    written = open_checkpoint(str(made.folder))
    names = moe_layers(written)[0].projections(0)
    found = torch.linalg.matrix_rank(written.read(names[0]))
    assert found > 3  # of six, with the entries beside it
    assert any("these would take" in note for note in made.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 6}, "at most 5"),
        ({"experts": [2, 3, 2]}, "each of 2 blocks"),
        ({"experts": 0}, "greater than or equal to 1"),
        ({"experts": [2, 3], "allocation": "usage"}, "expected one number"),
        ({"experts": 2, "density": 0.1}, "expected a rank"),
        ({"experts": 2, "ranks": 0.1}, "known: experts"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], words: str, recipe: Recipes, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        shrink_mixture(recipe("mixtral", "mc_smoe", **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pruned_blocks_have_one_count(recipe: Recipes, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="same number in every block"):
        shrink_mixture(recipe("mixtral", "prune_experts", experts=[2, 3]), tmp_path / "out")
    with pytest.raises(RecipeError, match="uniform"):
        recipe("mixtral", "prune_experts", experts=2, allocation="usage")


def test_a_model_without_experts_is_refused(
    recipe: Recipes, recipe_text: Recipes, tmp_path: Path
) -> None:
    made = recipe("mixtral", "mc_smoe", experts=2)
    dense = tmp_path / "dense"
    dense.mkdir()
    for name in ("model.safetensors", "config.json"):
        (dense / name).write_bytes((Path(made.base) / name).read_bytes())
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="expected a mixture of experts"):
        shrink_mixture(replace(made, base=str(dense)), tmp_path / "out")
    (dense / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    with pytest.raises(CheckpointError, match=r"found more|expected shape"):
        shrink_mixture(replace(made, base=str(dense)), tmp_path / "out")


def test_other_weights_than_the_recipe_was_made_with_are_refused(
    recipe: Recipes, tmp_path: Path
) -> None:
    made = replace(recipe("mixtral", "mc_smoe", experts=2), fingerprint="0" * 64)
    with pytest.raises(RecipeError, match="they changed"):
        shrink_mixture(made, tmp_path / "out")


def test_folders_in_use_and_those_of_the_base_are_refused(recipe: Recipes, tmp_path: Path) -> None:
    made = recipe("mixtral", "mc_smoe", experts=2)
    with pytest.raises(InputError, match="without sources"):
        shrink_mixture(made, Path(made.base), overwrite=True)


def test_recipes_of_one_model_are_told_by_their_operator(
    recipe_text: Recipes, tmp_path: Path
) -> None:
    import yaml

    file = tmp_path / "recipe.yaml"
    text = recipe_text("mixtral", "mc_smoe", experts=2)
    file.write_text(yaml.safe_dump(text))
    assert is_mixture_recipe(file)
    file.write_text(yaml.safe_dump(text | {"experts": ["a"]}))
    with pytest.raises(RecipeError, match="expected none"):
        load_mixture_recipe(file)
    file.write_text(yaml.safe_dump(text | {"operator": "ties"}))
    assert not is_mixture_recipe(file)
    file.write_text("operator: [")
    assert not is_mixture_recipe(file)
