"""Bytes that a study needs on each card, from its headers, configurations and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mergesearch.evaluators.spec.evaluators import AnySpec
from mergesearch.merging.family.aligned import model_dtype
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.kernels.spans import ITEMSIZE, RowsSetting
from mergesearch.merging.operators import Operator, get_operator
from mergesearch.merging.resident.card_memory import (
    TensorBytes,
    WeightBytes,
    cut_for_cards,
    merge_scratch,
    weight_bytes,
)
from mergesearch.merging.tensors.source import Options
from mergesearch.search.plan.batch_memory import (
    BatchBytes,
    batch_bytes,
    largest_batch,
    model_shape,
)
from mergesearch.search.plan.cards import PlannedCard
from mergesearch.search.plan.heads import head_bytes
from mergesearch.search.plan.plan import Plan

#: Pinned main memory of a card's uploads: two chunks, one read while the other is sent.
STAGING_BYTES = 2 * 128_000_000
#: Main memory of a worker's process beside weights: Python, torch and transformers.
PROCESS_BYTES = 2_000_000_000


@dataclass(frozen=True, eq=False)
class Demand:
    """What a study computes with, whatever the cards.

    Attributes:
        family: Base and experts.
        operator, options: The study's, with complete hyperparameters.
        evaluators: Sections of its evaluators.
        gradients: Whether its strategy needs backward passes.
        heads: Bytes of the heads that its experts keep and its items are scored with.
        hidden_states: Bytes of main memory that each worker may keep of what lower blocks gave.
    """

    family: ModelFamily
    operator: Operator
    options: Options
    evaluators: Sequence[AnySpec]
    gradients: bool = False
    heads: int = 0
    hidden_states: int = 0

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's configuration."""
        return self.family.base.config

    def weights(self, rows: RowsSetting) -> WeightBytes:
        """Sizes of base, rows and merged weights."""
        return _weights(self, rows)

    def batch(self, itemsize: int, divisor: int) -> BatchBytes:
        """The largest batch, divided by ``divisor``."""
        return batch_bytes(
            self.evaluators,
            model_shape(self.config),
            itemsize,
            gradients=self.gradients,
            divisor=divisor,
        )

    @property
    def rounds_weights(self) -> bool:
        """Whether weights are rounded for an evaluator, and kept as they were meanwhile."""
        return any(getattr(spec, "quantise", None) is not None for spec in self.evaluators)

    @property
    def largest_batch(self) -> int:
        """The largest ``batch_size`` of the evaluators."""
        return largest_batch(self.evaluators)


@lru_cache(maxsize=8)
def _weights(demand: Demand, rows: RowsSetting) -> WeightBytes:
    return weight_bytes(demand.family, demand.operator, demand.options, rows)


def demand_of(plan: Plan) -> Demand | None:
    """What a planned study computes with; None for problems without a model."""
    if plan.family is None or plan.evaluator.model_class is None:
        return None
    itemsize = ITEMSIZE[model_dtype(plan.family.base)]
    return Demand(
        plan.family,
        get_operator(plan.template.operator),
        plan.template.options,
        plan.spec.evaluators,
        plan.differentiable_space is not None,
        head_bytes(plan.heads, plan.evaluator, itemsize),
        plan.hidden_states,
    )


@dataclass(frozen=True)
class CardSettings:
    """What a study says about cards, or might say instead.

    Attributes:
        rows: How rows are kept.
        gpus: Cards of each worker.
        per_gpu: Workers of each card; 1 where workers have several cards.
        divisor: Batches are so much smaller than the study says.
        on_host: Whether base and rows stay in main memory, and trials are merged there.
    """

    rows: RowsSetting = "auto"
    gpus: int = 1
    per_gpu: int = 1
    divisor: int = 1
    on_host: bool = False


def settings_of(plan: Plan, cards: int | None = None) -> CardSettings:
    """The settings of a study; those of one without GPUs are of one worker on each card.

    Args:
        plan: The study.
        cards: Over so many cards its workers are spread evenly; by default as few as can be.
    """
    workers = plan.spec.workers
    each = workers.gpus_each or 1.0
    per_gpu = 1 if each >= 1 else int(1 / each + 1e-9)
    if workers.count is not None:
        per_gpu = min(per_gpu, math.ceil(workers.count / (cards or 1)))
    return CardSettings(plan.spec.rows, max(1, int(each)), per_gpu)


@dataclass(frozen=True)
class CardBytes:
    """Bytes on one card.

    Attributes:
        base, rows: One copy, which the card's workers share.
        merged: Merged weights of all workers, with parameters that cannot be views into them, and
            heads.
        gradient: Gradient buffers of all workers.
        batch: Activations, logits and caches of all workers, with copies of weights that are
            rounded for an evaluator; or what merging needs instead if that is more.
        engine: Of an engine beside the resident models.
        context: Of processes, beside tensors.
    """

    base: int
    rows: int
    merged: int
    gradient: int
    batch: int
    engine: int
    context: int

    @property
    def total(self) -> int:
        """All of it: the predicted peak."""
        return sum(vars(self).values())


def card_bytes(demand: Demand, settings: CardSettings, card: PlannedCard) -> list[CardBytes]:
    """Bytes on each card of one worker, or on the one card that workers share."""
    weights = demand.weights(settings.rows)
    batch = demand.batch(weights.itemsize, settings.divisor)
    return [
        _one_card(part, len(weights.tensors), demand, settings, batch, card)
        for part in cut_for_cards(weights.tensors, settings.gpus)
    ]


def _one_card(
    part: Sequence[TensorBytes],
    tensors: int,
    demand: Demand,
    settings: CardSettings,
    batch: BatchBytes,
    card: PlannedCard,
) -> CardBytes:
    """Bytes on the card that holds these tensors.

    Every card runs its layers on the whole batch; caches are divided as the layers are.
    """
    workers = settings.per_gpu
    merged = sum(tensor.merged for tensor in part)
    # Where workers share a card, one more process holds what they share.
    processes = workers + (workers > 1)
    kept = 0 if settings.on_host else 1
    evaluating = batch.passing + batch.cache * len(part) // max(tensors, 1)
    evaluating += merged if demand.rounds_weights else 0
    directions = demand.operator.directions(len(demand.family.experts), demand.options)
    merging = kept * merge_scratch(demand.family.layout, directions)
    return CardBytes(
        base=kept * sum(tensor.base for tensor in part),
        rows=kept * sum(tensor.rows for tensor in part),
        merged=workers * (merged + sum(tensor.fused for tensor in part) + demand.heads),
        gradient=workers * merged if demand.gradients else 0,
        batch=workers * max(evaluating, merging),
        engine=int(batch.engine * card.total) * workers,
        context=processes * card.context,
    )


@dataclass(frozen=True)
class NodeBytes:
    """Bytes of one node.

    Attributes:
        disk: Prepared weights, which all workers of the node map.
        host: Main memory that is not given back under pressure: processes, models that are being
            loaded, kept hidden states, pinned staging; and base and rows where trials are merged
            there.
    """

    disk: int
    host: int


def node_bytes(demand: Demand, settings: CardSettings, count: int) -> NodeBytes:
    """Bytes of a node with ``count`` cards."""
    weights = demand.weights(settings.rows)
    workers = count // settings.gpus * settings.per_gpu
    stored = weights.base + weights.rows
    holders = count if settings.per_gpu > 1 else 0
    host = (workers + holders) * PROCESS_BYTES + count * STAGING_BYTES
    host += workers * (weights.merged + demand.hidden_states)
    return NodeBytes(stored, host + (stored if settings.on_host else 0))
