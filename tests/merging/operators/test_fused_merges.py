"""Operators merge the queries, keys and values that a fused projection holds, not their mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergesearch.merging import merge
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.family.untouched import untouched
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.recipe import Recipe, Source
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.tensors.field import Field
from mergesearch.merging.tensors.layout import Layout
from tests.merging.operators.fused_models import MODELS, State, divided

INTERNLM = {"model_type": "internlm2", "num_attention_heads": 6, "num_key_value_heads": 2}
FAMILIES = ["falcon grouped", "falcon multi-query", "gpt_neox", "bloom", "internlm2"]
SPECTRAL = ["tsv", "iso_c", "optmerge"]
#: What all operators may be given that follow a formula on matrices or columns.
BY_MATRIX = [
    name
    for name, operator in OPERATORS.items()
    if operator.family in ("spectral", "column") and "single_expert" in operator.identities
]


def _family(which: str) -> tuple[State, dict[str, State], dict[str, Any], str]:
    """Base, three experts, configuration, and the end of the name of the fused tensors."""
    if which == "internlm2":
        config: dict[str, Any] = INTERNLM
        fused = "attention.wqkv.weight"
        generator = torch.Generator().manual_seed(1)
        base = {
            f"model.layers.{block}.attention.{name}.weight": torch.randn(
                *shape, generator=generator
            )
            for block in range(2)
            for name, shape in (("wqkv", (40, 24)), ("wo", (24, 24)))
        }
    else:
        model = MODELS[which].build()
        config = json.loads(json.dumps(model.config.to_dict(), default=str))
        fused = MODELS[which].name
        base = {n: t.float() for n, t in model.state_dict().items() if "attention" in n}
    generator = torch.Generator().manual_seed(2)
    experts = {
        f"e{number}": {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        for number in range(3)
    }
    return base, experts, config, fused


def _apart(state: State, config: dict[str, Any], fused: str) -> State:
    """The state with each matrix of a fused tensor as a tensor of its own."""
    apart: State = {}
    for name, tensor in state.items():
        parts = divided(name, tensor, config) if name.endswith(fused) else ()
        assert len(parts) in (0, 3)
        apart |= {f"{name}.{number}": p.view(tensor).clone() for number, p in enumerate(parts)}
        apart |= {} if parts else {name: tensor}
    return apart


@pytest.mark.parametrize("operator", SPECTRAL)
@pytest.mark.parametrize("which", FAMILIES)
def test_a_merge_is_that_of_queries_keys_and_values_apart(which: str, operator: str) -> None:
    base, experts, config, fused = _family(which)
    merged = merge(base, experts, operator=operator, config=config)
    alone = merge(
        _apart(base, config, fused),
        {name: _apart(expert, config, fused) for name, expert in experts.items()},
        operator=operator,
    )
    again = _apart(merged, config, fused)
    assert again.keys() == alone.keys()
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="as one matrix, as no configuration says how they are"):
        mixed = merge(base, experts, operator=operator)
    moved = [name for name in merged if not torch.allclose(merged[name], mixed[name], atol=1e-3)]
    assert moved == [name for name in base if name.endswith(fused)]


@pytest.mark.parametrize("which", FAMILIES)
@pytest.mark.parametrize("operator", BY_MATRIX)
def test_one_expert_is_given_back(which: str, operator: str) -> None:
    base, experts, config, fused = _family(which)
    order = {"order": ["e0"]} if operator in ("dop", "opcm") else {}
    options = {"operator": operator, "coefficients": 1.0, "config": config, **order}
    merged = merge(base, {"e0": experts["e0"]}, **options)
    names = [name for name in base if name.endswith(fused)]
    assert names
    for name in names:
        torch.testing.assert_close(merged[name], experts["e0"][name], rtol=1e-3, atol=1e-4)


def _saved(folder: Path, which: str) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """A recipe of folders, and what it should merge."""
    base, experts, config, _ = _family(which)
    for name, state in {"base": base, **experts}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(state, folder / name / "model.safetensors")
    layout = Layout.build(open_checkpoint(str(folder / "base")).merged)
    recipe = Recipe(
        Source("base", str(folder / "base")),
        tuple(Source(name, str(folder / name)) for name in experts),
        "tsv",
        Field.constant(layout.size, [0.5] * len(experts)),
        layout=layout.digest,
    )
    return recipe, merge(base, experts, operator="tsv", coefficients=0.5, config=config)


def test_a_folder_says_itself_how_its_attention_is_divided(tmp_path: Path) -> None:
    recipe, expected = _saved(tmp_path, "falcon grouped")
    exported = export_model(recipe, tmp_path / "merged")
    merged = open_checkpoint(str(tmp_path / "merged"))
    for name in merged.names:
        assert torch.equal(merged.read(name), expected[name])
    assert exported.untouched.undivided == ()
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    del settings["num_attention_heads"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    assert export_model(recipe, tmp_path / "whole").untouched.undivided
    assert "are merged as one matrix" in (tmp_path / "whole" / "README.md").read_text()


def test_an_arena_that_was_divided_otherwise_is_prepared_again(tmp_path: Path) -> None:
    recipe, _ = _saved(tmp_path, "falcon grouped")
    first = open_arenas(recipe, tmp_path / "arenas")
    assert open_arenas(recipe, tmp_path / "arenas").name == first.name
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    settings |= {"new_decoder_architecture": False, "multi_query": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    assert open_arenas(recipe, tmp_path / "arenas").name != first.name


def test_what_is_not_divided_is_named() -> None:
    name = "h.{}.self_attention.query_key_value.weight"
    layout = Layout.build({name.format(block): ((24, 8), "float32") for block in range(2)})
    config = {"model_type": "falcon", "num_attention_heads": 4, "multi_query": True}
    known = untouched(OPERATORS["tsv"], layout, {}, config)
    assert known.undivided == ()
    assert known.sentence == ""
    unknown = untouched(OPERATORS["tsv"], layout, {})
    assert unknown.sentence == (
        "fused projections are merged as one matrix, as no configuration says how they are "
        "divided: h.#.self_attention.query_key_value.weight (384 in 2)"
    )
    assert untouched(OPERATORS["tsv"], layout, {"fused": "whole"}).sentence == ""
    assert untouched(OPERATORS["ties"], layout, {}).sentence == ""
