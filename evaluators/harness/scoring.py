"""Log-likelihoods of many short continuations at the cost of the forward passes alone.

Requests hold token ids. Rows are sorted by length and padded together; logits are computed at the
positions that are scored and nowhere else; continuations of one context may share a row, each
seeing the context and itself alone, so that the context is run through the model once (tree
attention as in Miao 2024, "SpecInfer").

Forward passes follow each other without a look at their results, which are fetched from the device
once, when all have been queued.

Numbers are those of the language-model evaluation harness, up to rounding: the sum of
log-probabilities of the continuation's tokens, and whether each of them is the most likely one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mergesearch.evaluators.batching import KeptPlans
from mergesearch.evaluators.harness.plan import MASK_BYTES, ScoringPlan, make_plan
from mergesearch.evaluators.harness.rows import Answer, Options, Request, rows_of
from mergesearch.evaluators.text.token_scores import TokenScores, score_tokens
from mergesearch.merging.tensors.device_errors import device_error

#: How far sums of log-probabilities of a packed and a plain row may differ for packing to be
#: trusted, by precision.
TRUSTED = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}

#: What models raise that take no mask of ours: unknown arguments, shapes that do not match, and
#: positions beyond a table. Torch has no type of its own for shapes.
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError)


def score_requests(
    model: Any,
    requests: Sequence[Request],
    options: Options,
    plans: KeptPlans[ScoringPlan] | None = None,
) -> list[Answer]:
    """Score every request: sum of log-probabilities, and whether every token is the likeliest.

    Args:
        model: A causal language model.
        requests: What to score.
        options: How rows are run.
        plans: Plans of earlier calls, among which that of these requests is looked up and kept.

    Raises:
        InputError: If a continuation is longer than a row may be.
    """
    import torch

    plan = _plan(model, requests, options, plans)
    if not plan.batches:
        return []
    dtype = next(model.parameters()).dtype
    with torch.inference_mode():
        scores = [
            score_tokens(model, batch.model_arguments(dtype), batch.wanted)
            for batch in plan.batches
        ]
        return _answers(plan, scores)


def _plan(
    model: Any,
    requests: Sequence[Request],
    options: Options,
    plans: KeptPlans[ScoringPlan] | None,
) -> ScoringPlan:
    """The plan of some requests, kept where plans are kept."""
    if plans is None:
        return make_plan(model, requests, options)
    like = next(model.parameters())
    room = MASK_BYTES - sum(plan.mask_bytes for plan in plans.plans())
    return plans.get(
        requests,
        (options, like.device, like.dtype),
        lambda: make_plan(model, requests, options, room),
    )


def _answers(plan: ScoringPlan, scores: Sequence[TokenScores]) -> list[Answer]:
    """The answer of every request, in the order of the requests."""
    import torch

    log_p = torch.cat([one.log_p for one in scores])
    likeliest = torch.cat([one.likeliest for one in scores]).to(log_p.dtype)
    log_p, likeliest = torch.stack([log_p, likeliest]).cpu()  # the one copy that waits
    sizes = [size for _, size in plan.requests]
    sums = torch.stack([part.sum() for part in log_p.split(sizes)]).tolist()
    starts = np.cumsum([0, *sizes[:-1]])
    right = np.minimum.reduceat(likeliest.numpy(), starts).astype(bool).tolist()
    answers: list[Answer] = [(0.0, False)] * len(sizes)
    for (index, _), value, all_right in zip(plan.requests, sums, right, strict=True):
        answers[index] = (value, all_right)
    return answers


def can_pack(model: Any, requests: Sequence[Request], options: Options) -> bool:
    """Try on ``requests`` whether packed rows give the same scores as plain ones.

    They do not in models whose layers take no mask of ours, or see other tokens than attention
    shows them. Such models refuse masks or positions with one of :data:`REFUSALS`; memory that runs
    out and a device that breaks are no answer, and are raised.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    packed = replace(options, packed=True, padding="right")
    rows = list(rows_of(requests, packed))
    if all(len(row.branches) < 2 for row in rows) or (
        window and max(row.length for row in rows) > window
    ):
        return False
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    plain = score_requests(model, requests, replace(packed, packed=False))
    try:
        shared = score_requests(model, requests, packed)
    except REFUSALS as error:
        if device_error(error) is not None:
            raise
        return False
    return all(
        abs(one - two) <= TRUSTED[dtype] for (one, _), (two, _) in zip(plain, shared, strict=True)
    )
