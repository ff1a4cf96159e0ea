"""The planned peak of a card is the one that a study reaches there."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergesearch.evaluators import Candidate
from mergesearch.evaluators.base import Batch
from mergesearch.merging import InputError
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.merged_model import MergedModel
from mergesearch.search.plan.card_check import check_cards, plan_for, plan_for_this_machine
from mergesearch.search.plan.cards import PlannedCard, cards_here
from mergesearch.search.plan.plan import Plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.workers.messages import Task, WorkerSpec
from mergesearch.search.workers.worker import Worker
from tests.pretend.device import NAME, Cards
from tests.search.studies import spec_of

#: Of the measured peak.
TOLERANCE = 0.05
TOKENS = 16
ITEMS = 384
EXPERTS = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 million parameters and three experts in bf16, and texts of 16 tokens."""
    from datasets import Dataset, DatasetDict

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    for name in EXPERTS:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    splits = {
        split: Dataset.from_dict(
            {
                "input_ids": rng.integers(0, 512, (ITEMS, TOKENS)).tolist(),
                "id": [f"{split} {item}" for item in range(ITEMS)],
            }
        )
        for split in ("search", "validation", "test")
    }
    DatasetDict(splits).save_to_disk(folder / "data")
    return folder


def planned(
    folder: Path, operator: str, rows: str = "auto", batch: int = 2, strategy: str = "cma_es"
) -> Plan:
    evaluator = {"kind": "language_model", "data": "data", "id": "id", "batch_size": batch}
    data: dict[str, Any] = {
        "name": "peak",
        "base": "base",
        "experts": {name: name for name in EXPERTS},
        "operator": operator,
        "rows": rows,
        "strategy": strategy,
        "evaluators": [evaluator],
        "budget": {"trials": 30},
        "workers": {"gpus": 1, "backend": "inline"},
    }
    return plan_study(spec_of(data, folder))


@pytest.mark.parametrize(
    ("operator", "rows", "batch"),
    [
        ("task_arithmetic", "auto", ITEMS),  # the batch is larger than what a merge needs
        pytest.param("ties", "auto", 2, marks=pytest.mark.slow),
        pytest.param("task_arithmetic", "auto", 2, marks=pytest.mark.slow),
        pytest.param("ties", "int8", 2, marks=pytest.mark.slow),
    ],
)
def test_the_planned_peak_is_that_of_a_trial(
    cards: Cards, folder: Path, tmp_path: Path, operator: str, rows: str, batch: int
) -> None:
    plan = planned(folder, operator, rows, batch)
    expected = plan_for(plan, PlannedCard("pretend", 1 << 40, context=0), 1)
    assert expected is not None
    open_arenas(plan.template, tmp_path, rows=plan.spec.rows)  # which may be prepared on the card
    gc.collect()  # the model of the last test
    with cards.peak() as peak:
        before = cards.live()
        worker = Worker(
            WorkerSpec(
                template=plan.template,
                evaluators=tuple(e.model_dump(mode="json") for e in plan.spec.evaluators),
                arenas=str(tmp_path),
                device=NAME,
                rows=plan.spec.rows,
            )
        )
        loaded = cards.live() - before
        recipe = plan.space.decode(plan.space.start)
        outcome = worker.run(Task("0", recipe, "search"))
    assert outcome.failure is None
    weights = expected.fullest.base + expected.fullest.rows + expected.fullest.merged
    assert weights == pytest.approx(loaded, rel=TOLERANCE)
    assert expected.peak == pytest.approx(peak[0] - before, rel=TOLERANCE)


@pytest.mark.slow
def test_the_planned_peak_is_that_of_a_backward_pass(
    cards: Cards, folder: Path, tmp_path: Path
) -> None:
    """Within twice the tolerance: the plan counts activations that torch may drop early."""
    plan = planned(folder, "task_arithmetic", batch=128, strategy="frank_wolfe")
    expected = plan_for(plan, PlannedCard("pretend", 1 << 40, context=0), 1)
    assert expected is not None
    assert expected.fullest.gradient == expected.fullest.merged
    arenas = open_arenas(plan.template, tmp_path)
    plan.evaluator.open()
    recipe = plan.space.decode(plan.space.start)
    gc.collect()  # the model of the last test
    with cards.peak() as peak:
        before = cards.live()
        model = load_model(str(folder / "base"), "AutoModelForCausalLM")
        merged = MergedModel(model, arenas, device=NAME)
        merged.enable_gradient()
        merged.write(recipe.field)
        merged.clear_gradient()
        plan.evaluator.backward(
            Candidate(recipe, merged.model), Batch(size=128), {"cross_entropy": 1.0}
        )
    assert expected.peak == pytest.approx(peak[0] - before, rel=2 * TOLERANCE)
    assert expected.peak > peak[0] - before


def test_a_study_that_no_batch_makes_fit_is_refused_at_launch(cards: Cards, folder: Path) -> None:
    plan = planned(folder, "ties", batch=ITEMS)
    found = plan_for_this_machine(plan)
    assert found is not None
    least = found.fullest.total - found.fullest.batch
    assert check_cards(plan) == []
    for card in range(2):
        cards.limit(least, card)
    with pytest.raises(InputError, match="memory: expected at most"):
        check_cards(plan)


def test_a_batch_that_is_too_large_is_a_warning_at_launch(cards: Cards, folder: Path) -> None:
    """It is halved where memory runs out."""
    plan = planned(folder, "ties", "masked", batch=ITEMS)
    found = plan_for_this_machine(plan)
    assert found is not None
    for card in range(2):
        cards.limit(found.peak, card)  # of which a part stays free
    (warning,) = check_cards(plan)
    assert warning.endswith("set batch_size: 192 or workers.gpus: 2 or rows: int8")


def test_the_cards_of_the_machine_are_planned_with_their_memory(cards: Cards, folder: Path) -> None:
    cards.limit(10**9)
    assert [card.total for card in cards_here()][:1] == [10**9]
    plan = plan_for_this_machine(planned(folder, "ties"))
    assert plan is not None
    assert plan.fits
    cards.limit(10**6)
    plan = plan_for_this_machine(planned(folder, "ties"))
    assert plan is not None
    assert not plan.fits
