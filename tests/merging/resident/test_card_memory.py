"""Sizes of weights on cards, from headers alone, and layers cut for several cards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.family import ModelFamily, align_family, open_family
from mergesearch.merging.operators import OPERATORS, get_operator
from mergesearch.merging.policies import TensorPolicies
from mergesearch.merging.recipe import Recipe, Source
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.card_memory import (
    EXACT,
    FACTORS,
    INTERPOLATING,
    ROW_BITS,
    TensorBytes,
    cut_for_cards,
    layers,
    weight_bytes,
)
from mergesearch.merging.resident.encodings.table import ENCODINGS
from mergesearch.merging.tensors.field import Field


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts in bf16, with odd sizes."""
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        tensors = {
            f"layers.{layer}.{part}": torch.randn(shape, generator=generator).to(torch.bfloat16)
            for layer in range(3)
            for part, shape in (("matrix", (129, 65)), ("norm", (65,)))
        }
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def recipe_of(folder: Path, operator: str) -> Recipe:
    size = open_family_of(folder).layout.size
    return Recipe(
        Source("base", str(folder / "base.safetensors")),
        tuple(Source(name, str(folder / f"{name}.safetensors")) for name in "ab"),
        operator,
        Field.constant(size, [0.0, 0.0]),
        tuple(sorted(get_operator(operator).complete({}).items())),
    )


def open_family_of(folder: Path) -> ModelFamily:
    base, a, b = (
        open_checkpoint(str(folder / f"{name}.safetensors"), name) for name in ("base", "a", "b")
    )
    return align_family(base, [a, b], TensorPolicies())


def test_bits_are_those_of_the_table_of_encodings() -> None:
    """Planning does not import torch, which the table does."""
    assert ROW_BITS.keys() == ENCODINGS.keys()
    for name, encoding in ENCODINGS.items():
        assert (name in EXACT) == encoding.exact
        for dtype in ("bfloat16", "float16", "float32"):
            for density in (0.1, 0.9, 1.0):
                assert ROW_BITS[name](dtype, density) == encoding.bits(dtype, density)


@pytest.mark.parametrize(
    ("operator", "rows"),
    [
        ("task_arithmetic", "auto"),
        ("ties", "masked"),
        ("average", "auto"),
        ("average", "int8"),
        ("pcb", "auto"),
        ("task_arithmetic", "int8"),
        ("task_arithmetic", "bf16"),
        ("ties", "dense"),
    ],
)
def test_planned_sizes_are_those_of_the_arena(
    operator: str, rows: str, folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(folder, operator)
    planned = weight_bytes(open_family(recipe), get_operator(operator), recipe.options, rows)
    arenas = open_arenas(recipe, tmp_path, rows=rows)
    parts = 6 * (1 + 3 * 2)  # of six tensors, each padded to 128 bytes
    assert planned.base + planned.rows <= arenas.memory.nbytes
    assert arenas.memory.nbytes < planned.base + planned.rows + 128 * parts


def test_packed_rows_keep_no_more_than_is_declared(folder: Path, tmp_path: Path) -> None:
    """Elections leave out some of what trimming keeps."""
    recipe = recipe_of(folder, "ties")
    planned = weight_bytes(open_family(recipe), get_operator("ties"), recipe.options)
    arenas = open_arenas(recipe, tmp_path)
    kept = [c.packed for one in arenas.packing.stored.values() for c in one.columns]
    most = 0.2 * open_family_of(folder).layout.parameters
    assert 0.8 * most < sum(kept[::2]) <= most + 1  # of one expert
    assert planned.by_encoding.keys() == {"packed"}
    assert 0.9 * planned.rows < arenas.memory.nbytes - planned.base
    assert arenas.memory.nbytes < planned.base + planned.rows + 128 * 6 * (1 + 3 * 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("average", {}),
        ("layer_swap", {"bottom": 1, "top": 1}),
        ("lines", {}),
        ("model_stock", {}),
        ("slerp", {}),
        ("task_arithmetic", {}),
    ],
)
def test_operators_that_interpolate_are_those_that_are_named(
    name: str, options: dict[str, int], folder: Path
) -> None:
    family = open_family_of(folder)
    operator = get_operator(name)
    full = operator.complete(options)
    basis = operator.prepare(family.base, family.experts[: operator.experts[1]], **full)
    assert (basis.form in ("interpolation", "slerp")) == (name in INTERPOLATING)


def test_no_other_operator_keeps_experts_as_they_are() -> None:
    """So that the test above has all operators that may interpolate."""
    given = {"layer_swap": {"bottom": 1, "top": 1}}
    stored = {
        name
        for name, operator in OPERATORS.items()
        if all(p.default is not p.empty or name in given for p in operator.hyperparameters.values())
        and operator.row_form(operator.complete(given.get(name, {}))) == "stored"
    }
    assert stored == {"average", "layer_swap", "lines", "model_stock", "slerp", "task_arithmetic"}


def unit(name: str, size: int) -> TensorBytes:
    return TensorBytes(name, size, 0, "stored", 0, 0)


def test_layers_are_not_cut() -> None:
    tensors = [
        *(unit(f"model.layers.{n}.{part}", 10) for n in (0, 1, 2, 10) for part in ("a", "b")),
        unit("model.norm", 1),
    ]
    assert [len(layer) for layer in layers(tensors)] == [2, 2, 2, 2, 1]
    stretches = cut_for_cards(tensors, 2)
    assert [sum(t.base for t in stretch) for stretch in stretches] == [40, 41]
    assert [t for stretch in stretches for t in stretch] == tensors


def test_a_large_layer_is_alone() -> None:
    tensors = [unit(f"layers.{n}.a", size) for n, size in enumerate((1, 9, 1, 1))]
    stretches = cut_for_cards(tensors, 3)
    assert [[t.base for t in stretch] for stretch in stretches] == [[1], [9], [1, 1]]
    assert cut_for_cards(tensors, 6)[4:] == [(), ()]


def test_experts_of_a_mixture_are_counted_twice(tmp_path: Path) -> None:
    """Transformers keeps them fused in parameters of its own, which are copied to."""
    tensors = {
        "layers.0.experts.0.up": torch.zeros(8, 8, dtype=torch.bfloat16),
        "layers.0.gate": torch.zeros(8, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    source = open_checkpoint(str(tmp_path / "m.safetensors"))
    family = align_family(source, [source], TensorPolicies())
    weights = weight_bytes(family, get_operator("task_arithmetic"), {})
    assert weights.fused == 128
    assert weights.merged == 144
    assert weights.by_encoding.keys() == {"stored"}
    assert FACTORS not in weights.by_encoding
