"""The published contracts: the product's members and a plug-in's keep them, broken ones do not."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from mergesearch.merging.extensions import references
from mergesearch.merging.extensions.references import give
from mergesearch.merging.operators import Basis
from mergesearch.search import Problem, Suggestion, TrialResult
from mergesearch.testing import (
    EvaluatorContract,
    OperatorContract,
    SpaceContract,
    StrategyContract,
)
from tests.plugins.installing import forget, install


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(install(tmp_path))
    yield tmp_path
    forget()


class TestTies(OperatorContract):
    name = "ties"


class TestSobol(StrategyContract):
    name = "sobol"


class TestGroups(SpaceContract):
    name = "groups"


class TestSynthetic(EvaluatorContract):
    section: ClassVar[dict[str, Any]] = {"kind": "synthetic", "problem": "sphere", "items": 9}


@pytest.mark.usefixtures("tiny")
class TestMedian(OperatorContract):
    name = "median"


@pytest.mark.usefixtures("tiny")
class TestWalk(StrategyContract):
    name = "walk"


@pytest.mark.usefixtures("tiny")
class TestCapped(SpaceContract):
    name = "capped"


@pytest.mark.usefixtures("tiny")
class TestSmallness(EvaluatorContract):
    section: ClassVar[dict[str, Any]] = {"kind": "smallness"}


@pytest.mark.parametrize(
    ("package", "code"), [("Tiny_Plugin", 0), pytest.param("tinny", 1, marks=pytest.mark.slow)]
)
def test_pytest_runs_the_contracts_of_a_package(package: str, code: int, tiny: Path) -> None:
    """As ``pytest --mergesearch-plugin PACKAGE`` does in a folder of the package's own."""
    (tiny / "pytest.ini").write_text("[pytest]\n")
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "mergesearch.testing"]
    empty = tiny / "tests"
    empty.mkdir()
    before = {name for name in sys.modules if name.endswith(".installed")}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ended = pytest.main(
            [*options, "-c", str(tiny / "pytest.ini"), "--mergesearch-plugin", package, str(empty)]
        )
    for name in {name for name in sys.modules if name.endswith(".installed")} - before:
        del sys.modules[name]
    assert ended == code, said.getvalue()
    if code == 0:
        assert " passed" in said.getvalue()
        # 13 of the operator, 8 of the strategy, 6 of the space, 6 of the evaluator, the package.
        assert said.getvalue().count(".") >= 30


# --- broken members ----------------------------------------------------------------------------


class Unseeded:
    """Draws from the global generator."""

    needs: ClassVar[frozenset[str]] = frozenset()
    recommends: ClassVar[bool] = False

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem

    def ask(self, count: int) -> list[Suggestion]:
        draw = np.random.random
        return [Suggestion(k, 3 * draw(self._problem.dim)) for k in range(count)]

    def tell(self, trials: Sequence[TrialResult]) -> None:
        pass

    def best(self) -> list[Any]:
        return [self._problem.start]


class Careless:
    """Adds noise of the global generator, and writes into the base."""

    identities = ("base_at_zero", "linearity", "homogeneity", "zero_vector")

    def prepare(self, base: Any, experts: Sequence[Any]) -> Basis:
        def rows(name: str) -> list[torch.Tensor]:
            base.read(name).add_(1.0)
            return [torch.randn(base.shape(name)) / 0 for _ in experts]

        return Basis("delta", len(experts), rows)


@pytest.fixture
def given() -> Iterator[None]:
    give({"tests:Unseeded": Unseeded, "tests:Careless": Careless})
    yield
    for name in ("tests:Unseeded", "tests:Careless"):
        references._GIVEN.pop(name)


def _failing(contract: Any) -> set[str]:
    """Names of the tests of a contract that fail."""
    failing = set()
    for name in (name for name in dir(contract) if name.startswith("test_")):
        test: Callable[[], None] = getattr(contract, name)
        try:
            test()
        except pytest.skip.Exception:
            continue
        except Exception:
            failing.add(name)
    return failing


@pytest.mark.usefixtures("given")
def test_the_contracts_catch_broken_members() -> None:
    class Strategy(StrategyContract):
        name = "tests:Unseeded"

    class Operator(OperatorContract):
        name = "tests:Careless"

    assert _failing(Strategy()) >= {
        "test_points_lie_in_the_box",
        "test_ids_count_from_zero",
        "test_asking_for_several_equals_asking_one_by_one",
        "test_the_seed_decides_the_points",
        "test_a_record_can_be_replayed",
        "test_it_recommends_only_what_it_declares",
    }
    assert _failing(Operator()) >= {
        "test_merges_are_finite_and_shaped_like_the_base",
        "test_the_same_merge_has_the_same_bits",
        "test_sources_are_left_as_they_are",
        "test_global_generators_are_left_alone",
        "test_merges_are_linear_in_the_coefficients",
    }
