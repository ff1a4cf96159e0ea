"""The contract of an operator: what the search and the export rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from mergesearch.merging import Field, Layout, RecipeError
from mergesearch.merging.in_memory import merge_stream
from mergesearch.merging.operators import IDENTITIES, Operator, get_operator

#: Shapes of the tensors that are merged.
SHAPES: dict[str, tuple[int, ...]] = {
    "block.0.weight": (6, 5),
    "block.0.square.weight": (5, 5),
    "block.1.bias": (7,),
    "scale": (),
}
#: A few units in the last place of fp32 numbers near 1.
ROUNDING = 1e-6

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Tensors:
    """A checkpoint in memory."""

    name: str
    tensors: dict[str, torch.Tensor]
    memo: None = None
    identity: str = ""

    @property
    def names(self) -> Sequence[str]:
        """Names of the tensors."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        """A tensor."""
        return self.tensors[name]

    def map(self, change: Callable[[str, torch.Tensor], torch.Tensor], rename: str = "") -> Tensors:
        """Another checkpoint, with every tensor changed, given its name and itself."""
        return Tensors(
            rename or self.name,
            {name: change(name, tensor) for name, tensor in self.tensors.items()},
        )


class OperatorContract:
    """Tests of an operator. Subclass it with a name that begins with ``Test``, and set ``name``.

    Attributes:
        name: The operator's name.
        options: Hyperparameters to test it with, where it needs some.
        experts: Number of experts to merge.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    experts: ClassVar[int] = 3

    @property
    def operator(self) -> Operator:
        """The operator."""
        return get_operator(self.name)

    def test_it_says_what_it_is(self) -> None:
        """It has a name, a line for listings, and identities that exist."""
        operator = self.operator
        assert operator.name == self.name
        assert operator.summary
        assert "\n" not in operator.summary
        assert operator.identities <= set(IDENTITIES)

    def test_an_unknown_option_is_refused_in_one_line(self) -> None:
        """Names of options are checked before weights are read."""
        with pytest.raises(RecipeError) as caught:
            self.operator.complete({**self.options, "no_such_option": 1})
        assert "\n" not in str(caught.value)

    def test_default_and_bounds_are_in_order(self) -> None:
        """A search begins inside the bounds."""
        options = self.operator.complete(self.options)
        low, high = self.operator.bounds(self.experts, options)
        assert low < high
        assert low <= self.operator.default(self.experts, options) <= high

    def test_merges_are_finite_and_shaped_like_the_base(self) -> None:
        """Whatever the coefficients within the bounds."""
        base, experts = self._family()
        merged = self._merged(base, experts, self._coefficients())
        assert {name: tuple(t.shape) for name, t in merged.items()} == SHAPES
        assert all(torch.isfinite(tensor).all() for tensor in merged.values())

    def test_the_same_merge_has_the_same_bits(self) -> None:
        """Preparing twice gives the same rows: workers and export prepare on their own."""
        base, experts = self._family()
        one = self._merged(base, experts, self._coefficients())
        two = self._merged(base, experts, self._coefficients())
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_sources_are_left_as_they_are(self) -> None:
        """Preparing writes into no tensor of base or experts."""
        base, experts = self._family()
        before = [{n: t.clone() for n, t in s.tensors.items()} for s in (base, *experts)]
        self._merged(base, experts, self._coefficients())
        for source, kept in zip((base, *experts), before, strict=True):
            assert all(torch.equal(source.tensors[name], kept[name]) for name in kept)

    def test_global_generators_are_left_alone(self) -> None:
        """Random draws come from generators that the operator seeds."""
        before = torch.get_rng_state()
        base, experts = self._family()
        self._merged(base, experts, self._coefficients())
        assert torch.equal(torch.get_rng_state(), before)

    def test_coefficients_of_zero_give_the_base(self) -> None:
        """Where it is declared, bit for bit."""
        self._needs("base_at_zero")
        base, experts = self._family()
        merged = self._merged(base, experts, 0 * self._coefficients())
        assert all(torch.equal(merged[name], base.tensors[name]) for name in merged)

    def test_merges_are_linear_in_the_coefficients(self) -> None:
        """Where it is declared, within rounding."""
        self._needs("linearity")
        one = self._change(*self._family(), self._coefficients())
        two = self._change(*self._family(), 2 * self._coefficients())
        assert np.allclose(two, 2 * one, rtol=0, atol=10 * ROUNDING)

    def test_an_expert_equal_to_the_base_adds_nothing(self) -> None:
        """Where it is declared, within rounding."""
        self._needs("zero_vector")
        base, experts = self._family()
        same = [experts[0], *(base.map(lambda _, t: t.clone(), e.name) for e in experts[1:])]
        coefficients = self._coefficients()
        alone = coefficients.copy()
        alone[1:] = 0.0
        one = self._change(base, same, coefficients)
        assert np.allclose(one, self._change(base, same, alone), rtol=0, atol=10 * ROUNDING)

    def test_larger_task_vectors_change_the_merge_as_much(self) -> None:
        """Where homogeneity is declared, within rounding."""
        self._needs("homogeneity")
        base = Tensors("base", {name: torch.zeros(shape) for name, shape in SHAPES.items()})
        experts = self._family()[1]
        doubled = [expert.map(lambda _, tensor: 2 * tensor) for expert in experts]
        one = self._change(base, experts, self._coefficients())
        two = self._change(base, doubled, self._coefficients())
        assert np.allclose(two, 2 * one, rtol=0, atol=10 * ROUNDING)

    def _needs(self, identity: str) -> None:
        if identity not in self.operator.identities:
            pytest.skip(f"{identity} is not declared")

    def _coefficients(self) -> Array:
        """A coefficient for every direction, within the bounds."""
        options = self.operator.complete(self.options)
        low, high = self.operator.bounds(self.experts, options)
        count = self.operator.directions(self.experts, options)
        return low + (high - low) * np.linspace(0.3, 0.6, count)

    def _family(self) -> tuple[Tensors, list[Tensors]]:
        draw = torch.Generator().manual_seed(0)
        base = Tensors("base", {n: torch.randn(s, generator=draw) for n, s in SHAPES.items()})
        experts = [
            base.map(lambda _, t: t + 0.1 * torch.randn(t.shape, generator=draw), f"expert {k}")
            for k in range(self.experts)
        ]
        return base, experts

    def _merged(
        self, base: Tensors, experts: Sequence[Tensors], coefficients: Array
    ) -> dict[str, torch.Tensor]:
        layout = Layout.build({name: (shape, "float32") for name, shape in SHAPES.items()})
        field = Field.constant(layout.size, coefficients)
        options = self.operator.complete(self.options)
        return dict(merge_stream(base, experts, self.name, options, field, layout))

    def _change(self, base: Tensors, experts: Sequence[Tensors], coefficients: Array) -> Array:
        merged = self._merged(base, experts, coefficients)
        parts = [(merged[n].double() - base.tensors[n].double()).reshape(-1) for n in merged]
        return np.asarray(torch.cat(parts).numpy())
