"""What is exported has the bits of what was evaluated, whatever was remembered of it in between.

A study prepares an arena and keeps what other hyperparameters can use again; an export computes all
of it once more, tensor by tensor, and keeps nothing. Products of the same numbers have other last
bits where these lie transposed or not aligned in memory, which shows in fp64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergesearch.merging import Field, Recipe, Source
from mergesearch.merging.family.family import open_family
from mergesearch.merging.in_memory import merge_stream
from mergesearch.merging.operators import Basis, get_operator
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.terms import Terms, combine_terms
from mergesearch.merging.tensors.memo import ALIGNMENT, Memo

SHAPES = [(6, 5), (5, 6), (33, 17), (17, 64), (64, 48), (48, 49)]
#: Bits differed in fp64 alone; others stay in the long suite.
DTYPES = [
    torch.float64,
    *(
        pytest.param(dtype, marks=pytest.mark.slow)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
]
SEEDS = range(6)
MATRIX = "layers.0.mlp.weight"
BIAS = "layers.0.mlp.bias"

#: Operators that keep factors, vectors or counts of single tensors, with hyperparameters that share
#: them.
REMEMBERING: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("optmerge", {}, {"time": 20.0}),
    ("optmerge", {"form": "lora"}, {"form": "lora", "steps": 3}),
    ("wudi", {}, {"time": 20.0}),
    ("iso_c", {}, {}),
    ("iso_cts", {}, {}),
    ("tsv", {}, {}),
    ("opcm", {"order": ["e0", "e1"]}, {"order": ["e0", "e1"]}),
    ("pcb", {}, {"ratio": 0.3}),
    ("ties", {}, {"density": 0.4}),
]
CASES = [
    pytest.param(*case, id=f"{case[0]}-{case[1].get('form', 'plain')}") for case in REMEMBERING
]


@dataclass(frozen=True)
class Kept:
    """A source whose results are kept in a memo, or nowhere."""

    name: str
    tensors: Mapping[str, torch.Tensor]
    memo: Memo | None

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def identity(self) -> str:
        return self.name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def family_of(seed: int, experts: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """States of a base and its experts, drawn from a seed."""
    generator = np.random.default_rng(seed)
    rows, columns = SHAPES[seed % len(SHAPES)]
    shapes = {MATRIX: (rows, columns), BIAS: (rows,)}
    base = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
    states = [base] + [
        {name: value + 0.1 * generator.standard_normal(value.shape) for name, value in base.items()}
        for _ in range(experts)
    ]
    return [
        {name: torch.from_numpy(value).to(dtype) for name, value in state.items()}
        for state in states
    ]


def basis_of(
    states: list[dict[str, torch.Tensor]], operator: str, options: Mapping[str, Any], memo: Any
) -> Basis:
    base = Kept("base", states[0], memo)
    experts = [Kept(f"e{k}", state, memo) for k, state in enumerate(states[1:])]
    chosen = get_operator(operator)
    return chosen.prepare(base, experts, **chosen.complete(options))


def same(one: Basis, other: Basis) -> bool:
    return all(
        torch.equal(ours, theirs)
        for name in (MATRIX, BIAS)
        for ours, theirs in zip(one.rows(name), other.rows(name), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "options", "others"), CASES)
def test_rows_have_the_same_bits_with_a_memo_and_without_one(
    tmp_path: Path,
    operator: str,
    options: dict[str, Any],
    others: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    for seed in SEEDS:
        count = 2 if operator == "opcm" else 2 + seed % 4
        states = family_of(seed, count, dtype)
        memo = Memo(tmp_path / str(seed))
        basis_of(states, operator, others, memo).rows(MATRIX)
        without = basis_of(states, operator, options, None)
        for _ in range(2):
            assert same(without, basis_of(states, operator, options, memo)), (seed, count)


def save(folder: Path, state: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "none"}))
    save_file(state, str(folder / "model.safetensors"))
    return str(folder)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ["optmerge", "wudi"])
def test_streamed_merges_have_the_bits_of_resident_ones(
    tmp_path: Path, operator: str, dtype: torch.dtype
) -> None:
    for seed in SEEDS[2:4]:
        states = family_of(seed, 2, dtype)
        paths = [save(tmp_path / f"{seed}-{k}", state) for k, state in enumerate(states)]
        names = ["base", "e0", "e1"]
        base, *experts = (Source(*each) for each in zip(names, paths, strict=True))
        coefficients = Field.constant(1, [0.7, 0.9])
        other = Recipe(base, tuple(experts), operator, coefficients, (("time", 20.0),))
        recipe = replace(other, hyperparameters=())
        folder = tmp_path / f"arenas-{seed}"
        open_arenas(other, folder)  # its factors serve the next one
        arenas = open_arenas(recipe, folder)
        layout = arenas.layout
        field = Field.constant(layout.size, [0.7, 0.9])
        evaluated = torch.zeros(layout.size, dtype=dtype)
        combine_terms(Terms.of(arenas), field, evaluated)
        family = open_family(recipe)
        sources = family.experts
        exported = dict(merge_stream(family.base, sources, operator, {}, field, layout))
        for spec in layout.tensors:
            ours = evaluated[spec.start : spec.stop]
            assert torch.equal(ours, exported[spec.name].reshape(-1)), (seed, spec.name)


def test_remembered_tensors_lie_alike_in_memory_wherever_they_come_from(tmp_path: Path) -> None:
    def compute() -> dict[str, torch.Tensor]:
        numbers = torch.arange(56, dtype=torch.float64)
        return {"transposed": numbers[:54].view(6, 9).T, "shifted": numbers[1:55].view(6, 9)}

    memo = Memo(tmp_path)
    for tensors in (memo.get(["key"], compute), memo.get(["key"], compute)):
        for name, tensor in tensors.items():
            assert torch.equal(tensor, compute()[name])
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % ALIGNMENT == 0
