"""Evaluators score a model on a card as they score it in main memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.contracts import test_evaluators as contract
from tests.contracts.test_evaluators import (
    CASES,
    assert_same,
    candidates,
    evaluator,
    folder,
    model,
    opened,
    sections,
)
from tests.pretend.device import NAME, Cards

__all__ = ["TestOnCard", "evaluator", "folder", "model"]

#: They compute nothing with a model.
WITHOUT_MODEL = {name for name, kinds in CASES.items() if set(kinds) <= {"synthetic", "command"}}
#: One of each way to run a model; the whole contract runs them all in `make test-slow`.
QUICK = ["classification by domain", "entropy of tokens", "perplexity", "generation", "tasks"]
ALL = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in CASES
    if name not in WITHOUT_MODEL
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: maker().to(NAME) for name, maker in contract.MAKERS.items()}


@pytest.fixture(params=ALL)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_scores_are_those_of_main_memory(
    cards: Cards, case: str, folder: Path, models: dict[str, Any]
) -> None:
    there = opened(*sections(case), folder=folder)
    here = opened(*sections(case), folder=folder)
    on_card = models[there.model_class or ""]
    assert on_card.device.type == NAME
    on_host = copy.deepcopy(on_card).cpu()
    for one, other in zip(candidates(there, on_card), candidates(here, on_host), strict=True):
        assert_same(there.evaluate(one, "search"), here.evaluate(other, "search"))


def test_a_broken_card_is_no_score(
    cards: Cards, case: str, folder: Path, models: dict[str, Any]
) -> None:
    """The error of the card passes through every evaluator."""
    if case == "distance":
        pytest.skip("it computes nothing on the card")
    there = opened(*sections(case), folder=folder)
    (candidate, *_) = candidates(there, models[there.model_class or ""])
    cards.break_after(40)
    with pytest.raises(Exception, match="illegal memory access"):
        there.evaluate(candidate, "search")


@pytest.mark.slow
class TestOnCard(contract.TestEvaluatorContract):
    """The whole contract, on a card."""

    @pytest.fixture(autouse=True)
    def _on_card(self, cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
        made = {name: _maker(maker) for name, maker in contract.MAKERS.items()}
        monkeypatch.setattr(contract, "MAKERS", made)


def _maker(maker: Any) -> Any:
    return lambda *args, **kwargs: maker(*args, **kwargs).to(NAME)
