"""Encodings: exact ones give the bits of fp32 rows, approximate ones a stated error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergesearch.merging import Field, Recipe, Source
from mergesearch.merging.kernels.spans import RowsSetting
from mergesearch.merging.operators import get_operator
from mergesearch.merging.resident.arena import Arenas, open_arenas
from mergesearch.merging.resident.encodings import ENCODINGS, planned_encoding
from mergesearch.merging.resident.terms import Terms, combine_terms
from tests.merging.arenas import decoded

#: Odd sizes, a matrix, a convolution, a vector, a scalar and an empty tensor.
SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (37, 29),
    "model.layers.0.norm.weight": (29,),
    "model.layers.1.mlp.up_proj.weight": (8, 16),
    "model.layers.1.conv.weight": (3, 5, 3, 3),
    "model.layers.1.gate": (),
    "model.layers.1.none": (0, 4),
}

#: Operator, its options, and the encoding of the rows of a matrix of bf16 experts.
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("average", {}, "stored"),
    ("task_arithmetic", {}, "stored"),
    ("slerp", {}, "stored"),
    ("lines", {}, "stored"),
    ("layer_swap", {"bottom": 1, "top": 0}, "stored"),
    ("ties", {}, "packed"),
    ("ties", {"merge": "sum", "scope": "tensor", "density": 0.5}, "packed"),
    ("ties", {"merge": "max", "density": 0.6}, "masked"),
    ("ties", {"mode": "live"}, "packed"),
    ("dare", {}, "packed"),
    ("dare", {"rescale": "l1", "drop": 0.3}, "masked"),
    ("dare_ties", {"drop": 0.4}, "masked"),
    ("dare_ties", {}, "packed"),
    ("della", {"epsilon": 0.0}, "masked"),
    ("della", {"epsilon": 0.0, "density": 0.25}, "packed"),
    ("della_linear", {"rescale": "none"}, "masked"),
    ("della_linear", {}, "dense"),
    ("breadcrumbs", {}, "packed"),
    ("breadcrumbs", {"elect": True, "density": 0.7}, "masked"),
    ("consensus", {}, "masked"),
    ("emr", {}, "masked"),
]
EXACT_ROWS: tuple[RowsSetting, ...] = ("packed", "masked", "dense")
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options, _ in CASES]


def family(
    folder: Path, dtypes: Mapping[str, torch.dtype] | torch.dtype, experts: int = 2
) -> Recipe:
    """A base and experts beside it in the dtypes; the recipe of task arithmetic."""
    generator = torch.Generator().manual_seed(3)
    sources = []
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for number in range(experts + 1):
        name = f"expert{number}" if number else "base"
        own = dtypes if isinstance(dtypes, torch.dtype) else dtypes["expert" if number else "base"]
        tensors = {}
        for key, tensor in base.items():
            change = 0.002 * torch.randn(tensor.shape, generator=generator) * (number > 0)
            tensors[key] = (tensor + change).to(own)
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text("{}")
        sources.append(Source(name, str(path)))
    return Recipe(sources[0], tuple(sources[1:]), "task_arithmetic", Field.constant(1, [0.0]))


def recipe_of(family: Recipe, operator: str, options: Mapping[str, Any]) -> Recipe:
    experts = family.experts[:1] if operator == "slerp" else family.experts
    return Recipe(
        family.base, experts, operator, Field.constant(1, [0.0]), tuple(sorted(options.items()))
    )


def encodings_of(arenas: Arenas, name: str = "model.layers.0.mlp.up_proj.weight") -> str:
    """The encoding of a tensor, by its columns."""
    columns = arenas.packing.stored[name].columns
    if any(column.packed is not None for column in columns):
        return "packed"
    if any(column.masked for column in columns):
        return "masked"
    return "dense" if all(column.dtype == "float32" for column in columns) else "stored"


def field_of(arenas: Arenas, seed: int = 0) -> Field:
    """Segments that cut tensors, with coefficients of 0 and 1 among others."""
    rng = np.random.default_rng(seed)
    size = arenas.layout.size
    cuts = np.unique([0, size, *rng.integers(1, size, 9)])
    values = rng.uniform(-0.5, 1.0, (arenas.packing.directions, len(cuts) - 1))
    values[:, 1] = 0.0
    values[:, 2] = np.eye(len(values))[0]
    return Field(cuts, values)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return family(tmp_path_factory.mktemp("bf16"), torch.bfloat16)


@pytest.mark.parametrize(("operator", "options", "encoding"), CASES, ids=IDS)
def test_exact_encodings_have_the_bits_of_fp32_rows(
    bf16: Recipe, tmp_path: Path, operator: str, options: dict[str, Any], encoding: str
) -> None:
    recipe = recipe_of(bf16, operator, options)
    arenas = open_arenas(recipe, tmp_path)
    dense = open_arenas(recipe, tmp_path, rows="dense")
    assert encodings_of(arenas) == encoding
    full = get_operator(operator).complete(options)
    assert planned_encoding(get_operator(operator), full).name == encoding
    for one, other in zip(decoded(arenas), decoded(dense), strict=True):
        assert one.tobytes() == other.tobytes()
    field = field_of(arenas)
    for dtype in (torch.bfloat16, torch.float32):
        merged = []
        for terms in (Terms.of(arenas), Terms.of(dense)):
            out = torch.zeros(arenas.layout.size, dtype=dtype)
            combine_terms(terms, field, out, threads=2)
            merged.append(out.view(torch.uint8))
        assert torch.equal(*merged)
    if encoding != "dense":
        assert arenas.memory.nbytes < 0.85 * dense.memory.nbytes
    if encoding == "packed":
        masked = open_arenas(recipe, tmp_path, rows="masked")
        assert arenas.memory.nbytes < masked.memory.nbytes


@pytest.mark.parametrize(
    "dtypes",
    [
        torch.float16,
        torch.float32,
        {"base": torch.float32, "expert": torch.bfloat16},
        {"base": torch.bfloat16, "expert": torch.float32},
        {"base": torch.float64, "expert": torch.bfloat16},
        {"base": torch.bfloat16, "expert": torch.float64},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "operator", [pytest.param("average", marks=pytest.mark.slow), "task_arithmetic", "ties"]
)
def test_any_dtypes_of_base_and_experts(tmp_path: Path, operator: str, dtypes: Any) -> None:
    recipe = recipe_of(family(tmp_path, dtypes), operator, {})
    arenas = open_arenas(recipe, tmp_path / "arenas")
    dense = open_arenas(recipe, tmp_path / "arenas", rows="dense")
    for one, other in zip(decoded(arenas), decoded(dense), strict=True):
        assert one.tobytes() == other.tobytes()
    wide = isinstance(dtypes, dict) and dtypes["base"] == torch.float64
    assert (encodings_of(arenas) == "packed") == (operator == "ties" and not wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("density", [0.2, 0.97, 1.0])
def test_rows_are_packed_where_that_takes_less_room(
    tmp_path: Path, dtype: torch.dtype, density: float
) -> None:
    recipe = recipe_of(family(tmp_path, dtype), "ties", {"density": density, "mode": "live"})
    packed, masked, dense = (open_arenas(recipe, tmp_path / "a", rows=rows) for rows in EXACT_ROWS)
    assert packed.memory.nbytes <= masked.memory.nbytes <= dense.memory.nbytes
    assert (encodings_of(packed) == "packed") == (density == 0.2)
    assert (packed.memory.nbytes < 0.75 * masked.memory.nbytes) == (density == 0.2)
    for one, other in zip(decoded(packed), decoded(dense), strict=True):
        assert one.tobytes() == other.tobytes()


def test_identical_experts_and_zero_rows_are_stored_too(tmp_path: Path) -> None:
    recipe = family(tmp_path, torch.bfloat16, experts=1)
    same = Recipe(recipe.base, (Source("same", recipe.base.path),), "task_arithmetic", recipe.field)
    arenas = open_arenas(same, tmp_path / "arenas")
    assert not decoded(arenas)[1].any()


@pytest.mark.parametrize(("rows", "bound"), [("bf16", 0.002), ("int8", 0.01)])
def test_approximate_rows_have_a_small_error_and_less_room(
    bf16: Recipe, tmp_path: Path, rows: Any, bound: float
) -> None:
    assert not ENCODINGS[rows].exact
    exact = open_arenas(bf16, tmp_path, rows="dense")
    arenas = open_arenas(bf16, tmp_path, rows=rows)
    truth = decoded(exact)[1]
    error = np.linalg.norm(decoded(arenas)[1] - truth) / np.linalg.norm(truth)
    assert 0 < error < bound
    assert np.array_equal(decoded(arenas)[0], decoded(exact)[0])
    assert arenas.memory.nbytes < 0.7 * exact.memory.nbytes


def test_int8_of_interpolated_experts_falls_back_to_dense(bf16: Recipe, tmp_path: Path) -> None:
    recipe = recipe_of(bf16, "average", {})
    arenas = open_arenas(recipe, tmp_path, rows="int8")
    assert encodings_of(arenas) == "dense"


def test_arenas_of_every_setting_lie_beside_each_other(bf16: Recipe, tmp_path: Path) -> None:
    for rows in ("auto", "dense", "auto"):
        open_arenas(bf16, tmp_path, rows=rows)
    assert len(list(tmp_path.glob("*.arena"))) == 2


def test_arenas_whose_rows_are_packed_now_are_prepared_again(bf16: Recipe, tmp_path: Path) -> None:
    recipe = recipe_of(bf16, "ties", {})
    open_arenas(recipe, tmp_path, rows="masked")
    (sheet,) = tmp_path.glob("*.json")
    # As before there were packed rows: masked ones under the key of the rule.
    for file in tmp_path.iterdir():
        file.rename(tmp_path / file.name.replace("-masked", ""))
    arenas = open_arenas(recipe, tmp_path)
    assert encodings_of(arenas) == "packed"
    assert json.loads((tmp_path / sheet.name.replace("-masked", "")).read_text())["encoding"] == (
        "packed"
    )


def test_files_are_the_same_on_any_number_of_threads(bf16: Recipe, tmp_path: Path) -> None:
    names = []
    for threads in (1, 3):
        folder = tmp_path / str(threads)
        open_arenas(recipe_of(bf16, "ties", {}), folder, threads=threads)
        names.append([file.name for file in folder.glob("*.arena")])
    assert names[0] == names[1]
