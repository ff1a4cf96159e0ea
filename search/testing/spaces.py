"""The contract of a kind of space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Field, Layout, Recipe, Source
from mergesearch.spaces import Space
from mergesearch.spaces.spec import SPACE_KINDS, SpaceSpec, build_space

#: Names of the tensors of the model whose merges the space holds.
NAMES = [
    *(
        f"model.layers.{block}.{part}.weight"
        for block in range(3)
        for part in ("self_attn.q_proj", "mlp.up_proj")
    ),
    "lm_head.weight",
]
#: Names of its experts.
EXPERTS = ("first", "second", "third")

Point = npt.NDArray[np.float64]


class SpaceContract:
    """Tests of a kind of space. Subclass it with a name that begins with ``Test``.

    Attributes:
        name: The kind's name.
        section: The ``space`` section without ``kind``; default: the example of the kind.
        operator: Operator of the merges.
    """

    name: ClassVar[str]
    section: ClassVar[Mapping[str, Any] | None] = None
    operator: ClassVar[str] = "task_arithmetic"

    def test_coordinates_have_names_and_bounds_of_their_own(self) -> None:
        """All numbers are finite, and the start lies inside."""
        space = self._make()
        dim = len(space.names)
        assert dim >= 1
        assert len(set(space.names)) == dim
        for array in (space.lower, space.upper, space.start):
            assert array.shape == (dim,)
            assert np.all(np.isfinite(array))
        assert np.all(space.lower < space.upper)
        assert np.all((space.lower <= space.start) & (space.start <= space.upper))

    def test_a_point_is_one_merge(self) -> None:
        """In every process, and whatever becomes of the array."""
        space = self._make()
        point = self._sample(space, 1)
        recipe = space.decode(point)
        assert recipe.digest == self._make().decode(point.copy()).digest
        assert recipe.field == space.field(point)
        point[:] = space.lower
        assert recipe.field != space.field(point)

    def test_encode_is_exact_or_none(self) -> None:
        """The start is always held."""
        space = self._make()
        fields = [space.field(self._sample(space, seed)) for seed in range(5)]
        for field in fields:
            point = space.encode(field)
            assert point is None or space.field(point) == field
        start = space.encode(space.field(space.start))
        assert start is not None
        assert space.field(start) == space.field(space.start)

    def test_refining_to_itself_changes_nothing(self) -> None:
        """A portfolio hands points from one space to another."""
        space = self._make()
        point = self._sample(space, 6)
        again = space.field(space.refine(point, space))
        assert np.allclose(again.values, space.field(point).values, rtol=0, atol=1e-12)

    def test_the_summary_is_small_and_named_alike(self) -> None:
        """Dashboards show it for every trial."""
        space = self._make()
        summaries = [space.summary(self._sample(space, seed)) for seed in range(2)]
        assert [*summaries[0]] == [*summaries[1]]
        assert 1 <= len(summaries[0]) <= 16
        assert all(np.isfinite(value) for summary in summaries for value in summary.values())

    def test_the_table_adds_up(self) -> None:
        """`mergesearch check` prints it."""
        space = self._make()
        rows = space.table()
        assert sum(row.coefficients for row in rows) == len(space.names)
        assert {name for row in rows for name in row.tensors} <= set(NAMES)

    def _make(self) -> Space:
        kind = SPACE_KINDS[self.name]
        section = dict(kind.example if self.section is None else self.section)
        if self.name not in SPACE_KINDS.own:
            section["kind"] = self.name
        layout = Layout.build(dict.fromkeys(NAMES, ((3, 5), "float32")))
        template = Recipe(
            Source("base", "base"),
            tuple(Source(name, name) for name in EXPERTS),
            self.operator,
            Field.constant(layout.size, [0.0] * len(EXPERTS)),
        )
        return build_space(
            SpaceSpec(**section),
            template,
            layout,
            default_bounds=(-0.2, 1.5),
            default_start=0.4,
            searched=kind.searched,
        )

    def _sample(self, space: Space, seed: int) -> Point:
        return np.random.default_rng(seed).uniform(space.lower, space.upper)
