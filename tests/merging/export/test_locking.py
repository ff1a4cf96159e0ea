"""Locked models on disk: checked before they get their name, found out, merged once re-aligned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError, InputError, RecipeError
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.export.locking import lock_model
from mergesearch.merging.family.family import open_family
from mergesearch.merging.lineage.compare import compare_weights
from mergesearch.merging.lineage.description import lineage_line
from mergesearch.merging.lineage.refusal import check_lineages
from mergesearch.merging.operators import get_operator
from mergesearch.merging.recipe_file import load_recipe
from tests.merging.lineage import twins


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert of it, and that expert locked."""
    folder = tmp_path_factory.mktemp("llamas")
    base = twins.build("llama", 1).state_dict()
    twins.save(folder / "base", "llama", base)
    twins.save(folder / "tuned", "llama", twins.changed(base, twins.fine_tuned))
    lock_model(str(folder / "tuned"), folder / "locked", seed=2)
    return folder


def _recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_locked_folder_is_checked_and_a_seed_tells_it(llamas: Path, tmp_path: Path) -> None:
    again = lock_model(str(llamas / "tuned"), tmp_path / "again", seed=2)
    assert again.difference is not None
    assert again.difference < 1e-5
    assert (again.attentions, again.pairs, again.rotary) == (2, 4, 2)
    prints = [
        open_checkpoint(str(path)).fingerprint()
        for path in (llamas / "locked", tmp_path / "again", llamas / "tuned")
    ]
    assert prints[0] == prints[1] != prints[2]
    assert (tmp_path / "again" / "config.json").is_file()
    assert "seed" not in "".join(path.name for path in (tmp_path / "again").iterdir())


def test_a_lock_that_would_change_answers_is_not_written(llamas: Path, tmp_path: Path) -> None:
    """A configuration that does not say that positions are rotary: the check finds it out."""
    config = json.loads((llamas / "tuned" / "config.json").read_text())
    silent = {key: value for key, value in config.items() if not key.startswith("rope")}
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text(json.dumps(silent))
    (odd / "model.safetensors").symlink_to(llamas / "tuned" / "model.safetensors")
    with pytest.raises(InputError, match="expected the same answers after the lock"):
        lock_model(str(odd), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


def test_a_model_without_known_heads_is_refused(llamas: Path, tmp_path: Path) -> None:
    alone = llamas / "tuned" / "model.safetensors"
    with pytest.raises(CheckpointError, match="nothing to lock"):
        lock_model(str(alone), tmp_path / "out")


def test_a_locked_expert_is_named_with_what_re_alignment_recovers(llamas: Path) -> None:
    base = open_checkpoint(str(llamas / "base"))
    lineage = compare_weights(base, open_checkpoint(str(llamas / "locked")))
    assert lineage.kind == "locked"
    assert lineage.recovered is not None
    assert lineage.recovered > 0.9
    with pytest.raises(CheckpointError, match=r"set unlock: true .9\d% of distance"):
        check_lineages([lineage], None, "")


def test_an_unlocked_expert_merges_as_it_would_without_the_lock(
    llamas: Path, tmp_path: Path
) -> None:
    text = (
        f"base: {llamas / 'base'}\noperator: task_arithmetic\ncoefficients: 1.0\n"
        f"experts: {{one: {{path: {llamas / 'locked'}, unlock: true}}}}\n"
    )
    recipe = load_recipe(_recipe(tmp_path, text))
    assert dict(recipe.special) == {"unlock": ("one",)}
    family = open_family(recipe)
    lineage = compare_weights(family.base, family.experts[0])
    assert lineage.kind == "fine-tuned"
    assert "re-aligned: 9" in lineage_line(lineage)
    assert check_lineages([lineage], None, "") == []
    export_model(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    tuned = twins.changed(twins.build("llama", 1).state_dict(), twins.fine_tuned)
    wanted = twins.answers("llama", tuned)
    given = twins.answers("llama", merged)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    name = "model.layers.1.self_attn.q_proj.weight"
    seen = family.experts[0].read(name)
    torch.testing.assert_close(merged[name], seen, rtol=0, atol=1e-6)
    locked = open_checkpoint(str(llamas / "locked")).read(name)
    assert (seen - locked).norm() > locked.norm()


def test_what_unlocking_cannot_serve_is_refused(llamas: Path, tmp_path: Path) -> None:
    text = (
        f"base: {llamas / 'base'}\noperator: task_arithmetic\n"
        f"experts: {{one: {llamas / 'locked'}}}\nspecial: {{unlock: [two]}}\n"
    )
    with pytest.raises(RecipeError, match=r"special\.unlock: expected names of experts"):
        load_recipe(_recipe(tmp_path, text))
    odd = text.replace(f"{llamas / 'locked'}", f"{{path: {llamas / 'locked'}, lock: true}}")
    with pytest.raises(RecipeError, match=r"experts\.'one': expected a path, or"):
        load_recipe(_recipe(tmp_path, odd))
    family = open_family(load_recipe(_recipe(tmp_path, text.replace("two", "one"))))
    with pytest.raises(RecipeError, match="unlock"):
        family.check(get_operator("fisher"))


def test_merges_with_other_experts_unlocked_are_other_merges(llamas: Path, tmp_path: Path) -> None:
    text = (
        f"base: {llamas / 'base'}\noperator: task_arithmetic\ncoefficients: 0.5\n"
        f"experts: {{one: {llamas / 'locked'}, two: {llamas / 'tuned'}}}\n"
        "special: {unlock: [one]}\n"
    )
    recipe = load_recipe(_recipe(tmp_path, text))
    first, second = recipe.experts
    renamed = replace(recipe, experts=(replace(first, name="two"), replace(second, name="one")))
    assert renamed.basis_key != recipe.basis_key
