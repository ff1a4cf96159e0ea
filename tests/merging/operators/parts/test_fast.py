"""``decompositions: fast`` against precise ones: close, rarely worked out, and kept apart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from mergesearch.merging.in_memory import MappingSource
from mergesearch.merging.operators import OPERATORS
from mergesearch.merging.operators.parts import decomposition, interference, sides
from mergesearch.merging.operators.parts.decomposition import decompose
from mergesearch.merging.operators.parts.eigenvectors import largest_eigenvectors
from mergesearch.merging.tensors.memo import Memo
from mergesearch.merging.tensors.parallel import parallel_map
from mergesearch.merging.tensors.place import HOST, Place
from tests.merging.operators.parts.families import draw
from tests.merging.operators.test_same_bits import Kept
from tests.waiting import PATIENT

#: What the hyperparameter promises.
TOLERANCE = 1e-4
NAME = "layers.0.mlp.weight"
CASES: list[tuple[str, dict[str, Any]]] = [
    ("tsv", {}),
    ("tsv", {"rank": "full"}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("knots", {}),
    ("knots", {"inner": "task_arithmetic"}),
    ("wudi", {}),
    ("wudi", {"start": "mean", "rank": "participation"}),
]
OPERATORS_WITH = sorted({operator for operator, _ in CASES})


@pytest.fixture(autouse=True)
def from_the_first_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no matrix be too small for it."""
    monkeypatch.setattr(decomposition, "FAST_FROM", 0)


def tuned(m: int, n: int, seed: int) -> torch.Tensor:
    """A change as fine-tuning makes it: some large singular values before a flat rest."""
    spikes = draw(m, 5, seed=seed) * 20 / torch.arange(1.0, 6.0) / m**0.5
    rest = draw(m, n, seed=seed + 1) / max(m, n) ** 0.5
    return rest + spikes @ draw(5, n, seed=seed + 2) / n**0.5


def adapted(m: int, n: int, seed: int) -> torch.Tensor:
    """A change of rank 5."""
    return draw(m, 5, seed=seed) @ draw(5, n, seed=seed + 1) / (m * n) ** 0.5


def rows(operator: str, vectors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    tensors = [torch.zeros_like(vectors[0]), *vectors]
    base, *experts = [MappingSource(str(k), {NAME: t}, [NAME]) for k, t in enumerate(tensors)]
    full = OPERATORS[operator].complete(options)
    return OPERATORS[operator].prepare(base, experts, **full).rows(NAME)


@pytest.mark.parametrize("make", [tuned, adapted], ids=["tuned", "adapted"])
@pytest.mark.parametrize("shape", [(96, 96), (80, 200), (300, 80)], ids=str)
@pytest.mark.parametrize(("operator", "options"), CASES, ids=str)
def test_rows_are_those_of_precise_decompositions(
    operator: str, options: dict[str, Any], shape: tuple[int, int], make: Any
) -> None:
    vectors = [make(*shape, seed=10 * k) for k in range(3)]
    precise = rows(operator, vectors, **options)
    fast = rows(operator, vectors, **options, decompositions="fast")
    assert not all(torch.equal(one, other) for one, other in zip(precise, fast, strict=True))
    for one, other in zip(precise, fast, strict=True):
        assert float((one - other).norm() / one.norm()) <= TOLERANCE


@pytest.mark.parametrize("operator", ["iso_c", "knots", "tsv", "wudi"])
def test_adapters_need_no_gram_matrix(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = [adapted(240, 200, seed=10 * k) for k in range(3)]
    for module, name in ((sides, "lower_product"), (decomposition, "lower_gram")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(interference, "spectrum_of", None)
    rows(operator, vectors, decompositions="fast")
    with pytest.raises(TypeError):
        rows(operator, [tuned(240, 200, seed=10 * k) for k in range(3)], decompositions="fast")


@pytest.mark.parametrize("operator", OPERATORS_WITH)
def test_what_is_stored_in_double_precision_is_decomposed_in_it(operator: str) -> None:
    vectors = [tuned(40, 60, seed=10 * k).double() for k in range(3)]
    precise = rows(operator, vectors)
    for one, other in zip(precise, rows(operator, vectors, decompositions="fast"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("operator", "options"), [("wudi", {"time": 1e6}), ("iso_c", {"flatten": "all"})], ids=str
)
def test_what_would_not_be_close_is_precise(operator: str, options: dict[str, Any]) -> None:
    vectors = [tuned(40, 60, seed=10 * k) for k in range(3)]
    precise = rows(operator, vectors, **options)
    fast = rows(operator, vectors, **options, decompositions="fast")
    assert all(torch.equal(one, other) for one, other in zip(precise, fast, strict=True))


def test_an_unchanged_family_stays_where_it_is() -> None:
    vectors = [torch.zeros(90, 80)] * 3
    for operator in OPERATORS_WITH:
        assert not any(bool(row.any()) for row in rows(operator, vectors, decompositions="fast"))


@pytest.mark.parametrize("operator", OPERATORS_WITH)
def test_results_are_remembered_apart(operator: str, tmp_path: Path) -> None:
    memo = Memo(tmp_path)
    states = [torch.zeros(96, 80), *(tuned(96, 80, seed=10 * k) for k in range(3))]

    def kept(decompositions: str, memo: Memo | None) -> list[torch.Tensor]:
        base, *experts = [Kept(str(k), {NAME: state}, memo) for k, state in enumerate(states)]
        chosen = OPERATORS[operator]
        full = chosen.complete({"decompositions": decompositions})
        return chosen.prepare(base, experts, **full).rows(NAME)

    for way in ("precise", "fast", "precise", "fast"):
        pairs = zip(kept(way, None), kept(way, memo), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), way


def test_threads_decompose_large_matrices_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Barrier(2)

    def met(gram: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        meeting.wait(PATIENT)  # broken where one thread waits for the other to finish
        return largest_eigenvectors(gram, count)

    monkeypatch.setattr(decomposition, "largest_eigenvectors", met)
    with ThreadPoolExecutor(2) as pool:
        matrices = [draw(30, 40, seed=seed) for seed in range(2)]
        found = list(pool.map(lambda matrix: decompose(matrix, fast=True), matrices))
    for svd, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(svd.left * svd.values @ svd.right, matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS_WITH)
def test_bits_do_not_depend_on_the_number_of_threads(operator: str) -> None:
    names = [f"layers.{number}.mlp.weight" for number in range(4)]
    states = [{name: torch.zeros(70, 90) for name in names}]
    for k in range(3):
        states.append({name: tuned(70, 90, seed=31 * k + i) for i, name in enumerate(names)})
    base, *experts = [MappingSource(str(k), state, names) for k, state in enumerate(states)]
    chosen = OPERATORS[operator]
    basis = chosen.prepare(base, experts, **chosen.complete({"decompositions": "fast"}))
    alone = [row for made in parallel_map(basis.rows, names, 1) for row in made]
    together = [row for made in parallel_map(basis.rows, names, 4) for row in made]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_one_thread_at_a_time_works_on_an_accelerator() -> None:
    card = Place("cuda")
    with ThreadPoolExecutor(1) as pool:
        with card.turn:
            assert not pool.submit(card.lock.acquire, blocking=False).result()
        with HOST.turn:
            assert pool.submit(HOST.lock.acquire, blocking=False).result()
