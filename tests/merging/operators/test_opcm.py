"""OPCM against the sequential procedure, written out with full decompositions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergesearch.merging import RecipeError, merge
from mergesearch.merging.operators import get_operator, opcm
from mergesearch.merging.tensors.memo import Memo

Array = npt.NDArray[np.float64]
Vectors = dict[str, Array]

SHAPES = {
    "layers.0.mlp.weight": (6, 4),
    "layers.1.mlp.weight": (3, 5),
    "layers.1.mlp.bias": (7,),
    "head.weight": (3, 4),
}


def task_vectors(count: int, seed: int = 0) -> dict[str, Vectors]:
    generator = np.random.default_rng(seed)
    return {
        f"task{k}": {
            name: 0.1 * (k + 1) * generator.standard_normal(shape) for name, shape in SHAPES.items()
        }
        for k in range(count)
    }


def merged(
    experts: Mapping[str, Vectors], order: Sequence[str], **options: float | str | list[float]
) -> Vectors:
    """What OPCM adds to a base of zeros."""
    first = next(iter(experts.values()))
    base = {name: torch.zeros(vector.shape, dtype=torch.float64) for name, vector in first.items()}
    states = {
        key: {name: torch.from_numpy(v) for name, v in vectors.items()}
        for key, vectors in experts.items()
    }
    result = merge(base, states, operator="opcm", order=list(order), **options)
    return {name: tensor.numpy() for name, tensor in result.items()}


def norm(vectors: Vectors) -> float:
    return float(np.sqrt(sum(np.sum(vector**2) for vector in vectors.values())))


def cleaned(merge_so_far: Array, vector: Array, alpha: float) -> Array:
    left, values, right = np.linalg.svd(merge_so_far, full_matrices=True)
    rank = int(np.argmax(np.cumsum(values) / values.sum() > alpha))
    x = left.T @ vector @ right.T
    np.fill_diagonal(x, 0.0)
    x[:rank, :rank] = 0.0
    return left @ x @ right


def sequential(experts: Mapping[str, Vectors], order: Sequence[str], alpha: float) -> Vectors:
    """Step by step, with the rescaling of every step."""
    state = experts[order[0]]
    norms = [norm(experts[order[0]])]
    previous = 1.0
    for key in order[1:]:
        norms.append(norm(experts[key]))
        for name, vector in experts[key].items():
            inside = vector.ndim == 2 and name.startswith("layers")
            change = cleaned(state[name], vector, alpha) if inside else vector
            state = state | {name: previous * state[name] + change}
        length = norm(state)
        mean = float(np.mean(norms))
        state = {name: vector * mean / length for name, vector in state.items()}
        previous = length / mean
    return state


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    "order", [("task0", "task1", "task2", "task3"), ("task2", "task0", "task3", "task1")]
)
def test_is_the_sequential_procedure(alpha: float, order: tuple[str, ...]) -> None:
    experts = task_vectors(4)
    expected = sequential(experts, order, alpha)
    result = merged(experts, order, alpha=alpha)
    for name in SHAPES:
        np.testing.assert_allclose(result[name], expected[name], atol=1e-12)


def test_the_norm_is_the_mean_norm() -> None:
    experts = task_vectors(3)
    result = merged(experts, list(experts))
    assert norm(result) == pytest.approx(
        np.mean([norm(vectors) for vectors in experts.values()]), rel=1e-12
    )


def test_the_order_matters() -> None:
    experts = task_vectors(3)
    results = [
        merged(experts, order)["layers.0.mlp.weight"] for order in itertools.permutations(experts)
    ]
    apart = [np.abs(one - other).max() for one, other in itertools.combinations(results, 2)]
    assert min(apart) > 1e-3


def test_a_copy_of_an_expert_adds_nothing_to_matrices() -> None:
    (vectors,) = task_vectors(1).values()
    matrices = {
        name: vector
        for name, vector in vectors.items()
        if name.startswith("layers") and vector.ndim == 2
    }
    result = merged({"one": matrices, "copy": matrices}, ["one", "copy"])
    for name, vector in matrices.items():
        np.testing.assert_allclose(result[name], vector, atol=1e-12)


def test_alpha_of_one_removes_all_inside_the_span() -> None:
    generator = np.random.default_rng(0)
    low = generator.standard_normal((6, 2)) @ generator.standard_normal((2, 5))
    other = generator.standard_normal((6, 5))
    first = {"layers.0.w.weight": low}
    result = merged(
        {"a": first, "b": {"layers.0.w.weight": other}},
        ["a", "b"],
        alpha=1.0,
        coefficients=[0.0, 1.0],
    )
    direction = result["layers.0.w.weight"]
    left, _, right = np.linalg.svd(low)
    np.testing.assert_allclose(left[:, :2].T @ direction @ right[:2].T, 0, atol=1e-12)
    # Outside the span of the first expert, whatever its arbitrary singular vectors there, nothing
    # is removed.
    rest = other - left[:, :2] @ left[:, :2].T @ other @ right[:2].T @ right[:2]
    np.testing.assert_allclose(
        direction / np.linalg.norm(direction), rest / np.linalg.norm(rest), atol=1e-12
    )


def test_an_expert_equal_to_the_base_may_come_first() -> None:
    experts = task_vectors(2)
    experts["task0"] = {name: np.zeros_like(vector) for name, vector in experts["task0"].items()}
    result = merged(experts, ["task0", "task1"])
    for name, vector in experts["task1"].items():
        np.testing.assert_allclose(
            result[name], vector / 2, atol=1e-12
        )  # the mean norm is half of the norm


def test_task_vectors_that_cancel_give_the_base() -> None:
    vector = np.ones(5)
    result = merged({"a": {"layers.0.bias": vector}, "b": {"layers.0.bias": -vector}}, ["b", "a"])
    assert not result["layers.0.bias"].any()


def test_close_singular_values_are_told_apart_for_weights_in_single_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.standard_normal((40, 40)))[0] for _ in range(2))
    first = (left * (1 + 1e-5 * np.arange(40)) @ right).astype(np.float32)
    second = generator.standard_normal((40, 40)).astype(np.float32)
    monkeypatch.setattr(
        "mergesearch.merging.operators.parts.decomposition.PRECISE_UP_TO", 0
    )  # as for large matrices
    name = "layers.0.w.weight"
    states = [{name: torch.from_numpy(matrix)} for matrix in (first, second)]
    base = {name: torch.zeros(40, 40)}
    result = merge(base, states, operator="opcm", order=["0", "1"], alpha=0.2)[name]
    expected = sequential(
        {"a": {name: first.astype(float)}, "b": {name: second.astype(float)}}, ["a", "b"], 0.2
    )
    np.testing.assert_allclose(result, expected[name], atol=1e-5)


@dataclass
class Source:
    name: str
    tensors: Mapping[str, torch.Tensor]
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


def test_decomposes_once_for_both_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = task_vectors(3)
    memo = Memo(tmp_path)
    base = Source(
        "base",
        {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()},
        memo,
    )
    sources = [
        Source(key, {name: torch.from_numpy(v) for name, v in vectors.items()}, memo)
        for key, vectors in experts.items()
    ]
    expected = merged(experts, list(experts))
    operator = get_operator("opcm")
    first = operator.prepare(base, sources, order=list(experts))
    monkeypatch.setattr(opcm, "decompose", None)
    for name in SHAPES:
        np.testing.assert_allclose(sum(first.rows(name)), expected[name], atol=1e-12)
    read = len(base.reads)
    operator.prepare(base, sources, order=list(experts))
    assert len(base.reads) == read  # the factor is remembered, too


@pytest.mark.parametrize("order", [["task0"], ["task0", "task0"], ["task0", "task1", "task2"]])
def test_refuses_an_order_of_other_length_before_reading(order: list[str]) -> None:
    with pytest.raises(
        RecipeError, match=r"operator opcm: order: expected the names of 2 experts, each once"
    ):
        merged(task_vectors(2), order)


def test_refuses_an_order_of_other_names() -> None:
    message = (
        r"operator opcm: order: expected every expert once, of \['task0', 'task1'\], "
        r"received \['task0', 'taskl'\]"
    )
    with pytest.raises(RecipeError, match=message):
        merged(task_vectors(2), ["task0", "taskl"])
    with pytest.raises(RecipeError, match="operator opcm: hyperparameter 'order' has no default"):
        merge({"w": torch.ones(2)}, [{"w": torch.ones(2)}], operator="opcm")
