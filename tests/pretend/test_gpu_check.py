"""The checks of ``make gpu-check`` that need a card, on pretend cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.gpu_check import models, out_of_memory, peak
from experiments.gpu_check.check import Machine, Result, result_of
from experiments.gpu_check.table import BY_NAME
from tests.pretend import torch_module
from tests.pretend.device import NAME, Cards

#: Bytes of a card.
LIMIT = 200_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and arenas, which checks share."""
    return tmp_path_factory.mktemp("gpu-check")


@pytest.fixture
def machine(cards: Cards, folder: Path) -> Machine:
    """A machine of two pretend cards."""
    for card in range(2):
        cards.limit(LIMIT, card)
    return Machine(NAME, folder, scale=1e-4)


def passed(name: str, machine: Machine) -> Result:
    """The result of a check that is passed."""
    found = result_of(BY_NAME[name], machine)
    assert found.passed, found.reason + found.detail
    return found


@pytest.mark.slow  # test_card_plan.py has the same promise
def test_the_planned_peak_is_the_real_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peak, "OPERATORS", ("task_arithmetic",))
    stays, most = passed("peak", machine).figures
    assert "GB, planned" in stays.value
    assert most.bar == "5%"
    monkeypatch.setattr(peak, "BAR", -1.0)
    found = result_of(BY_NAME["peak"], machine)
    assert [figure.passed for figure in found.figures] == [False, False]


def test_a_batch_that_does_not_fit_is_halved(machine: Machine) -> None:
    batch, score = passed("out of memory", machine).figures
    assert batch.value == "finished with 32 texts"
    assert score.passed


@pytest.mark.slow
def test_a_batch_that_is_not_halved_is_no_proof(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_memory, "ROOM", 2.0)  # nothing is in the way
    found = result_of(BY_NAME["out of memory"], machine)
    assert found.figures[0].value == "finished with None texts"
    assert found.passed is False


@pytest.mark.slow
def test_a_batch_that_never_fits_is_no_proof(machine: Machine, cards: Cards) -> None:
    models.models(machine)
    cards.limit(cards.live() + 6_000_000)
    found = result_of(BY_NAME["out of memory"], machine)
    assert found.verdict == "skipped"
    assert "does not fit on this card" in found.reason


def test_a_model_over_two_cards_is_that_on_one(machine: Machine, cards: Cards) -> None:
    shards, weights, logits = passed("two cards", machine).figures
    assert shards.value == "on 2 cards"
    assert weights.value.startswith("0 numbers differ")
    assert logits.passed
    cards.count(1)
    assert result_of(BY_NAME["two cards"], machine).reason == "needs two cards"


def test_the_bits_of_a_card_are_the_cpus(machine: Machine) -> None:
    assert len(passed("bits", machine).figures) == 16


def test_memory_is_planned_for_what_is_there(machine: Machine, cards: Cards) -> None:
    assert models.config_of(machine)["num_hidden_layers"] == 2
    cards.limit(1_000_000)
    found = result_of(BY_NAME["two cards"], Machine(NAME, machine.folder / "none", scale=1e-4))
    assert found.verdict == "skipped"
    assert "a model of one layer takes" in found.reason
    cards.limit(600_000)
    combine = passed("combine", machine)
    assert {figure.value[:12] for figure in combine.figures} == {"not measured"}
    assert passed("upload", machine).figures[1].passed


def test_what_torch_cannot_share_is_skipped(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch_module, "computes_in_host_memory", raising=False)
    found = result_of(BY_NAME["sharing"], machine)
    assert found.verdict == "skipped"
    assert "whose memory processes can share, received pretend" in found.reason
