"""Plans of scoring: made once, kept on the device, and run without a wait for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergesearch.evaluators.batching import KeptPlans
from mergesearch.evaluators.harness import plan as planning
from mergesearch.evaluators.harness.plan import PADDING, ScoringPlan, make_plan, tree_mask
from mergesearch.evaluators.harness.rows import Options, Request
from mergesearch.evaluators.harness.scoring import score_requests
from tests.evaluators.language import text_llama
from tests.evaluators.measuring import Counter, batch_sizes


@pytest.fixture(scope="module")
def model() -> Any:
    return text_llama(1)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Three continuations of each of twelve contexts."""
    rng = np.random.default_rng(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, 299, int(rng.integers(1, most))).tolist())

    contexts = [tokens(30) for _ in range(12)]
    return [Request(context, tokens(9)) for context in contexts for _ in range(3)]


def test_what_a_token_sees() -> None:
    numbers = [[0, 0, 1, 1, 2, PADDING], [PADDING, 0, 1, 2, 2, 2]]
    seen = tree_mask(torch.tensor(numbers), torch.float32) == 0
    for row, own in enumerate(numbers):
        for token, branch in enumerate(own):
            expected = [
                other == token
                or (branch != PADDING and other < token and own[other] in {0, branch})
                for other in range(len(own))
            ]
            assert seen[row, 0, token].tolist() == expected


@pytest.mark.parametrize("padding", ["right", "left"])
def test_masks_are_made_once_while_there_is_room(
    model: Any, requests: list[Request], padding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(branches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        made.append(len(branches))
        return tree_mask(branches, dtype)

    monkeypatch.setattr(planning, "tree_mask", counted)
    options = Options(5, 64, packed=True, padding=padding)
    plans = KeptPlans[ScoringPlan]()
    first = score_requests(model, requests, options, plans)
    assert made == [5, 5, 2]
    assert score_requests(model, requests, options, plans) == first
    assert made == [5, 5, 2]
    without = make_plan(model, requests, options, mask_room=0)
    assert without.mask_bytes == 0
    assert plans.plans()[0].mask_bytes == sum(
        batch.arguments["attention_mask"].nbytes for batch in plans.plans()[0].batches
    )
    kept = [batch.model_arguments(torch.float32) for batch in plans.plans()[0].batches]
    again = [batch.model_arguments(torch.float32) for batch in without.batches]
    assert made == [5, 5, 2] * 2
    for one, other in zip(kept, again, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in ("attention_mask", "position_ids"))


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_waits_for_the_device_once_at_most(
    model: Any, requests: list[Request], packed: bool
) -> None:
    plans = KeptPlans[ScoringPlan]()
    options = Options(4, 64, packed=packed)
    expected = score_requests(model, requests, options, plans)
    with Counter() as counter, batch_sizes(model) as sizes:
        assert score_requests(model, requests, options, plans) == expected
    assert len(sizes) >= 3
    # Ours come as one whole tensor at the end. Transformers asks in every pass without a mask
    # whether positions are those of packed sequences.
    assert counter.waits == (0 if packed else len(sizes))
    # Nothing is sent either: the plan is where the model is.
    assert counter.counts.get("aten.lift_fresh.default", 0) == 0


def test_no_pass_has_more_tokens_than_allowed(model: Any, requests: list[Request]) -> None:
    expected = score_requests(model, requests, Options(64, 64))
    with batch_sizes(model) as sizes:
        found = score_requests(model, requests, Options(64, 64, batch_tokens=100))
    assert len(sizes) > 4
    assert max(sizes) <= 100
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], rtol=1e-6)
    assert [right for _, right in found] == [right for _, right in expected]
