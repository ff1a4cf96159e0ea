"""TIES against a plain reference over the whole flattened model, as the paper has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.merging import CheckpointError, RecipeError, merge
from mergesearch.merging.operators import get_operator
from mergesearch.merging.operators.parts.election import elect
from mergesearch.merging.operators.ties import prepare, thresholds
from mergesearch.merging.tensors.memo import Memo

State = dict[str, torch.Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.self_attn.q_proj.weight": (6, 5),
    "layers.0.mlp.up_proj.weight": (9, 4),
    "layers.1.self_attn.q_proj.weight": (6, 5),
    "norm.weight": (8,),
    "scale": (),
    "column": (7, 1),
}


def task_vectors(experts: int = 3, seed: int = 0) -> list[State]:
    """Whole multiples of 1/8, so that ties and exact cancellations occur.

    Every tensor has a scale of its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def vector(index: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(-9, 10, shape, generator=generator) * 0.125 * (1 + index)

    return [
        {name: vector(i, shape) for i, (name, shape) in enumerate(SHAPES.items())}
        for _ in range(experts)
    ]


def ties(vectors: Sequence[State], coefficients: Any = 1.0, /, **options: Any) -> State:
    """merged − base with a base of zeros: exact."""
    base = {name: torch.zeros_like(tensor) for name, tensor in vectors[0].items()}
    return merge(base, vectors, operator="ties", coefficients=coefficients, **options)


def trim(vector: State, density: float, groups: Sequence[Sequence[str]]) -> State:
    trimmed = {name: tensor.double().numpy().copy() for name, tensor in vector.items()}
    for group in groups:
        flat = np.sort(np.abs(np.concatenate([trimmed[name].reshape(-1) for name in group])))
        limit = flat[len(flat) - math.ceil(density * len(flat))]
        for name in group:
            trimmed[name][np.abs(trimmed[name]) < limit] = 0
    return {name: torch.from_numpy(array) for name, array in trimmed.items()}


def reference(
    vectors: Sequence[State], density: float, groups: Sequence[Sequence[str]], rule: str
) -> State:
    """Trim, elect, merge, on flat fp64 vectors ``(K, n)``; 0-d tensors are not in any group."""
    parts = [trim(vector, density, groups) for vector in vectors]
    flat = np.stack(
        [np.concatenate([part[name].numpy().reshape(-1) for name in SHAPES]) for part in parts]
    )
    sign = np.sign(flat.sum(axis=0))
    sign[sign == 0] = np.sign(sign.sum())
    agreeing = np.where(np.sign(flat) == sign, flat, 0)
    count = np.maximum((agreeing != 0).sum(axis=0), 1)
    rules: dict[str, Callable[[], np.ndarray]] = {
        "sum": lambda: agreeing.sum(axis=0),
        "mean": lambda: agreeing.sum(axis=0) / count,
        "max": lambda: sign * np.abs(agreeing).max(axis=0),
    }
    merged = rules[rule]()
    start = 0
    result = {}
    for name, shape in SHAPES.items():
        stop = start + math.prod(shape)
        result[name] = torch.from_numpy(merged[start:stop].reshape(shape))
        start = stop
    return result


def assert_close(one: State, other: State) -> None:
    assert all(
        torch.allclose(one[name].double(), other[name].double(), rtol=1e-6, atol=1e-7)
        for name in SHAPES
    )


MATRICES = [name for name, shape in SHAPES.items() if shape]
MODULES = [[n for n in SHAPES if word in n] for word in ("self_attn", "mlp", "norm", "column")]
GROUPS = {"model": [MATRICES], "tensor": [[name] for name in MATRICES], "module": MODULES}


@pytest.mark.parametrize("rule", ["mean", "sum", "max"])
@pytest.mark.parametrize("density", [0.07, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["model", "tensor", "module"])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_the_reference(scope: str, density: float, rule: str, seed: int) -> None:
    vectors = task_vectors(4, seed)
    merged = ties(vectors, density=density, scope=scope, merge=rule)
    assert_close(merged, reference(vectors, density, GROUPS[scope], rule))


def test_scopes_and_rules_differ_here() -> None:
    vectors = task_vectors()
    results = [
        ties(vectors, scope=scope, merge=rule)
        for scope in GROUPS
        for rule in ("mean", "sum", "max")
    ]
    assert len(
        {torch.cat([t.reshape(-1) for t in r.values()]).numpy().tobytes() for r in results}
    ) == len(results)


@pytest.mark.parametrize("lean", [1.0, -1.0])
def test_cancellations_take_the_sign_of_the_majority(lean: float) -> None:
    up = torch.tensor([2.0, 1.0, 1.0, 0.0])
    down = torch.tensor([-2.0, 1.0, 1.0, 0.0])
    merged = ties([{"w": lean * up, "v": up[:1]}, {"w": lean * down, "v": down[:1]}], density=1.0)
    assert merged["w"].tolist() == [2 * lean, lean, lean, 0.0]
    assert merged["v"].tolist() == [2 * lean]  # decided by the whole model, not by this tensor


def test_nothing_is_kept_where_even_the_majority_cancels() -> None:
    vectors = [torch.tensor([1.0, 3.0, -2.0]), torch.tensor([-1.0, 1.0, -1.0])]
    assert [row.tolist() for row in elect(vectors, "sum")] == [[0.0, 3.0, -2.0], [0.0, 1.0, -1.0]]


def test_is_odd_also_where_terms_cancel() -> None:
    vectors = task_vectors(2)
    negative = [{name: -tensor for name, tensor in vector.items()} for vector in vectors]
    merged = ties(vectors, density=0.6)
    mirrored = ties(negative, density=0.6)
    assert all(torch.equal(mirrored[name], -merged[name]) for name in SHAPES)
    cancelled = [(vectors[0][n] == -vectors[1][n]) & (vectors[0][n] != 0) for n in SHAPES]
    assert any(bool(c.any()) for c in cancelled)


def test_identical_experts_give_the_trimmed_vector_and_one_expert_itself() -> None:
    vector = task_vectors(1)[0]
    assert_close(ties([vector] * 3), trim(vector, 0.2, [MATRICES]))
    assert_close(ties([vector] * 3, merge="max"), trim(vector, 0.2, [MATRICES]))
    assert_close(ties([vector], density=1.0), vector)


def test_coefficients_weigh_experts_on_frozen_signs() -> None:
    vectors = task_vectors()
    one_hot = [ties(vectors, list(row), density=0.5) for row in np.eye(3)]
    merged = ties(vectors, [0.3, -0.5, 2.0], density=0.5)
    assert_close(
        merged, {n: 0.3 * one_hot[0][n] - 0.5 * one_hot[1][n] + 2.0 * one_hot[2][n] for n in SHAPES}
    )


def test_a_small_tensor_survives_only_a_ranking_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    vector = {
        "large": torch.randn(10, 20, generator=generator),
        "small": 0.01 * torch.randn(10, 5, generator=generator),
    }
    kept = {scope: ties([vector], density=0.2, scope=scope) for scope in ("model", "tensor")}
    assert [int((kept["model"][name] != 0).sum()) for name in vector] == [50, 0]
    assert [int((kept["tensor"][name] != 0).sum()) for name in vector] == [40, 10]


def test_vectors_can_pass_and_scalars_always_do() -> None:
    (vector,) = vectors = task_vectors(1)
    whole = ties(vectors, density=0.1, vectors="pass")
    trimmed = ties(vectors, density=0.1)
    assert torch.equal(whole["norm.weight"], vector["norm.weight"])
    assert not torch.equal(trimmed["norm.weight"], vector["norm.weight"])
    assert torch.equal(trimmed["scale"], vector["scale"])
    assert_close(whole, trim(vector, 0.1, [[name for name in MATRICES if name != "norm.weight"]]))


def test_live_elects_after_weighting_and_jumps() -> None:
    # One position, changes 1, −0.6, −0.5: the elected sign changes between weights 1.05 and 1.15 of
    # the first.
    vectors = [{"w": torch.tensor([change, 0.0])} for change in (1.0, -0.6, -0.5)]

    def at(weight: float, **options: Any) -> float:
        return float(ties(vectors, [weight, 1.0, 1.0], density=1.0, **options)["w"][0])

    weighted = {"mode": "live", "merge": "weighted_mean"}
    assert at(1.05, **weighted) == pytest.approx(-0.55)
    assert at(1.15, **weighted) == pytest.approx(1.0)
    assert at(1.05, mode="live", merge="sum") == pytest.approx(-1.1)
    assert at(1.15, mode="live", merge="max") == pytest.approx(1.15)
    assert at(1.05) == at(1.15) == pytest.approx(-0.55)  # frozen: the first is never kept


@pytest.mark.parametrize("rule", ["mean", "sum", "max"])
def test_live_at_equal_coefficients_is_frozen_but_for_cancellations(rule: str) -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(3)
    ]
    assert_close(ties(vectors, mode="live", merge=rule), ties(vectors, merge=rule))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 20}, r"'density': .*a fraction in \(0, 1\], 0.2 for 20 percent, received 20"),
        ({"density": 1.5}, r"'density': .*a fraction in \(0, 1\]"),
        ({"density": 0.0}, "'density': .*greater than 0, received 0.0"),
        (
            {"merge": "weighted_mean"},
            "operator ties: merge 'weighted_mean' expects mode 'live', received 'frozen'",
        ),
        ({"scope": "layer"}, "'scope': .*received 'layer'"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ties(task_vectors(), **options)


@pytest.mark.parametrize("options", [{}, {"density": 1.0}, {"scope": "tensor"}])
def test_names_expert_and_tensor_that_are_not_finite(options: dict[str, Any]) -> None:
    vectors = task_vectors()
    vectors[1]["column"][2] = float("nan")
    with pytest.raises(
        CheckpointError, match="expert '1': tensor 'column': expected finite numbers"
    ):
        ties(vectors, **options)


def test_models_without_anything_to_trim() -> None:
    assert ties([{"scale": torch.tensor(2.0)}] * 2)["scale"] == 2.0
    assert ties([{"w": torch.zeros(3, 2)}] * 2)["w"].tolist() == [[0.0, 0.0]] * 3
    assert ties([{"w": torch.tensor([[1.0]]), "none": torch.zeros(0, 3)}])["none"].shape == (0, 3)


@dataclass(frozen=True)
class Source:
    """A tensor source that counts its reads and remembers."""

    name: str
    tensors: State
    memo: Memo
    reads: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def identity(self) -> str:
        return self.name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self.tensors[name]


def test_densities_share_the_first_read_and_every_basis_the_thresholds(tmp_path: Path) -> None:
    vectors = task_vectors(2)
    memo = Memo(tmp_path)
    base = Source("base", {name: torch.zeros_like(t) for name, t in vectors[0].items()}, memo)
    experts = [Source(f"expert {i}", vector, memo) for i, vector in enumerate(vectors)]
    once = len(MATRICES)
    for density, reads in [(0.2, 2 * once), (0.5, once), (0.2, 0)]:
        experts[0].reads.clear()
        limits = thresholds(base, experts[0], density)
        assert len(experts[0].reads) == reads
        flat = (
            torch.cat([vectors[0][name].reshape(-1) for name in MATRICES])
            .abs()
            .sort(descending=True)
            .values
        )
        assert limits == {"model": float(flat[math.ceil(density * len(flat)) - 1])}
    rows = {name: prepare(base, experts).rows(name) for name in SHAPES}
    again = prepare(base, experts)
    experts[0].reads.clear()
    for name in reversed(SHAPES):
        assert all(
            torch.equal(one, other) for one, other in zip(again.rows(name), rows[name], strict=True)
        )
    assert sorted(experts[0].reads) == sorted(SHAPES)  # thresholds and the majority were remembered


def test_an_empty_set_of_thresholds_can_be_remembered(tmp_path: Path) -> None:
    memo = Memo(tmp_path)
    base, expert = (Source(name, {"scale": torch.tensor(1.0)}, memo) for name in ("base", "expert"))
    assert [thresholds(base, expert, 0.2) for _ in range(2)] == [{}, {}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge_rule", ["mean", "sum", "max"])
@pytest.mark.parametrize("scope", ["model", "tensor", "module"])
def test_merging_what_is_stored_gives_the_bits_of_the_rows(
    dtype: torch.dtype, merge_rule: str, scope: str
) -> None:
    from mergesearch.merging import Field, Layout
    from mergesearch.merging.in_memory import MappingSource, tensor_merger
    from mergesearch.merging.kernels.dispatch import combine

    generator = torch.Generator().manual_seed(3)
    shapes = {"layers.0.mlp.fc1.weight": (70, 40), "layers.0.norm1.bias": (1500,), "scale": ()}
    base = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    # Few different changes: many of them cancel exactly, so that the majority decides.
    experts = [
        {
            n: (t.float() + 0.25 * torch.randint(-2, 3, t.shape, generator=generator)).to(dtype)
            for n, t in base.items()
        }
        for _ in range(3)
    ]
    layout = Layout.build(
        {n: (tuple(t.shape), str(dtype).removeprefix("torch.")) for n, t in base.items()}
    )
    field = Field(np.array([0, 1000, layout.size]), np.array([[0.3, 1.0], [0.7, 0.0], [1.1, 0.4]]))
    sources = [
        MappingSource(str(i), state, layout.names) for i, state in enumerate([base, *experts])
    ]
    options = get_operator("ties").complete({"density": 0.6, "merge": merge_rule, "scope": scope})
    merge_one = tensor_merger(sources[0], sources[1:], "ties", options, field, layout)
    basis = get_operator("ties").prepare(sources[0], sources[1:], **options)
    assert basis.direct is not None
    for spec in layout.tensors:
        out = torch.empty(spec.size)
        rows = [row.reshape(-1) for row in basis.rows(spec.name)]
        combine(
            base[spec.name].float().reshape(-1),
            rows,
            field.restrict(spec.start, spec.stop),
            "delta",
            out,
        )
        merged, _ = merge_one(spec, spec.dtype)
        assert torch.equal(merged, out.view(spec.shape).to(dtype)), spec.name


def test_merging_what_is_stored_names_what_is_not_finite() -> None:
    base = {"layers.0.weight": torch.zeros(30, 40)}
    experts = [{"layers.0.weight": torch.randn(30, 40)} for _ in range(2)]
    experts[1]["layers.0.weight"][3, 4] = torch.nan
    for density in (0.5, 1.0):
        with pytest.raises(
            CheckpointError, match=r"'1': tensor 'layers\.0\.weight': expected finite numbers"
        ):
            merge(base, experts, operator="ties", density=density)
