"""The base of evaluators that score items by running a model on them.

Objectives are means of item scores over domains, or the worst domain. A subclass says how a batch
of items is scored; the item order is that of the folder and the arithmetic is deterministic, so a
recipe scores the same each time and in each worker.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import (
    SPLITS,
    Batch,
    Candidate,
    ItemSubset,
    LossAndGradient,
    Measurement,
    Split,
)
from mergesearch.evaluators.batching import item_batches
from mergesearch.evaluators.data.item_files import ItemFiles
from mergesearch.evaluators.data.splits import ItemTables
from mergesearch.evaluators.evaluator_base import EvaluatorBase, model_for, scores_by_head
from mergesearch.evaluators.items import balanced_order, batch_indices, chosen_indices
from mergesearch.evaluators.objectives import (
    Metric,
    additive_of,
    check_metrics,
    constraints_of,
    loss_factors,
    needed_references,
    objectives_of,
    tolerances_of,
)
from mergesearch.evaluators.pooling import Pool, is_part, pooled_domains, with_resamples
from mergesearch.evaluators.reduction import DomainScore, measure, score_domains
from mergesearch.evaluators.score_memory import scores_at
from mergesearch.merging import InputError, MergesearchError, NonFiniteError
from mergesearch.merging.foreign.shown import shown

__all__ = ["ByItem", "Items", "Metric", "domain_names", "wide"]

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]


class Items(Protocol):
    """Items of a split in memory."""

    @property
    def domains(self) -> npt.NDArray[np.str_]:
        """Domain of each item ``(items,)``."""

    def rows(self, indices: npt.NDArray[np.intp] | slice) -> Self:
        """The items at some indices."""


class ByItem(EvaluatorBase, ABC):
    """Scores a model item by item.

    Args:
        data: Folder written by ``DatasetDict.save_to_disk``, or other files of items.
        metrics: The objectives, and bounds.
        splits: ``search``, ``validation``, ``test`` -> name of that split in the folder, where it
            differs.
        columns: ``label``, ``domain``, ``id`` and inputs -> column; the first three may be None.
        batch_size: Items per forward pass.
        where: Key of the study file, for messages.
        transductive: Search on the test items themselves, for evaluators that read no labels.
        max_items: Use at most this many search items, the first of the fixed order; None
            means all.
        experts: Domain -> its expert, where that has another name; for objectives relative to
            experts.

    Raises:
        InputError: If two objectives have one name, domains are named without a domain column, or
            a domain is named twice.
    """

    #: Metrics that have gradients.
    smooth: ClassVar[frozenset[str]]
    #: Metrics that are made of all items of a domain together -> what makes them of their parts.
    pooled: ClassVar[Mapping[str, Pool]] = {}
    selects = True

    def __init__(
        self,
        data: Path | ItemFiles,
        metrics: Sequence[Metric],
        *,
        splits: Mapping[Split, str] | None = None,
        columns: Mapping[str, str | None],
        batch_size: int = 256,
        where: str,
        transductive: bool = False,
        max_items: int | None = None,
        experts: Mapping[str, str] | None = None,
    ) -> None:
        self._max_items = max_items
        self._experts = dict(experts or {})
        self._data = data
        self._tables = ItemTables(data, columns, f"{where}.data")
        self._metrics = tuple(metrics)
        self._batch_size = batch_size
        self._where = where
        self._splits: dict[Split, str] = {
            split: (splits or {}).get(split, split) for split in SPLITS
        }
        self._columns = columns
        self.transductive = transductive
        if transductive:
            self._splits["search"] = self._splits["test"]
        check_metrics(self._metrics, where, by_domain=columns.get("domain") is not None)
        self.objectives = objectives_of(self._metrics)
        self.constraints = constraints_of(self._metrics)
        self._tolerances = tolerances_of(self._metrics)
        self._wanted = {metric.metric for metric in self._metrics}
        apart = {metric.label for metric in self._metrics if metric.metric in self.pooled}
        self.additive = tuple(name for name in additive_of(self._metrics) if name not in apart)
        plain = (
            m
            for m in metrics
            if m.metric in self.smooth and m.reduce == "mean" and m.normalise is None
        )
        self.differentiable = tuple(metric.label for metric in plain if not metric.bounds)
        self.provides = frozenset({"items", "gradient"} if self.differentiable else {"items"})
        self.proxies = _proxies(self._metrics, self.smooth)
        self._items: dict[Split, Any] = {}
        self._domains: set[str] = set()  # of all splits, once checked

    def lend(self, share: float) -> None:
        """Let the search use a share of the validation items, alike in every domain.

        Raises:
            InputError: If the search uses the test items.
        """
        if self.transductive:
            raise InputError(
                f"selection.lend: expected a search on items of its own, received {share:g} with "
                f"{self._where}.transductive; leave one out"
            )
        self._tables.lend(share, self._splits["validation"], self._splits["search"])

    def check(self) -> None:
        """Refuse a missing folder, split or column, bad splits, and unknown or missing domains.

        Raises:
            InputError: In one line.
        """
        roles = {
            split: name
            for split, name in self._splits.items()
            if not (self.transductive and split == "search")
        }
        domains = self._tables.check(roles)
        self.largest_classes = self._tables.largest
        domains.setdefault("search", domains["test"])
        for metric in self._metrics:
            for split in SPLITS:
                odd = sorted(set(metric.domains or ()) - domains[split])
                if odd:
                    raise InputError(
                        f"{self._where}.objectives: expected domains among "
                        f"{sorted(domains[split])} (those of the {split} items), received "
                        f"{shown(odd[0])}"
                    )
        everywhere = self._domains = set.union(*domains.values())
        for split in SPLITS:
            # A mean over all domains would mean something else on these items.
            absent = sorted(everywhere - domains[split])
            if absent and any(metric.domains is None for metric in self._metrics):
                raise InputError(
                    f"{self._where}.data: {self._data}: expected items of every domain in every "
                    f"split, received none of {absent[0]!r} in {self._splits[split]!r}; add some, "
                    "or name the domains of each objective"
                )

    def identities(self, split: Split) -> set[str]:
        """Hashes of the contents of a split's items, by which other studies know them again."""
        return self._tables.identities(self._splits[split])

    def references(self) -> frozenset[str]:
        """Anchors that objectives are relative to; known after :meth:`check`."""
        return needed_references(self._metrics, self._domains or {""}, self._experts)

    def open(self) -> None:
        """Read the items of all splits."""
        for split in SPLITS:
            items = self._read(self._tables.load(self._splits[split]))
            self._domains |= set(items.domains.tolist())
            self._items[split] = (
                items.rows(_used_items(items.domains, self._max_items))
                if split == "search"
                else items
            )
        self._tables.release()

    def size(self, split: Split) -> int:
        """Number of the items of a split that are used."""
        size = self._tables.count(self._splits[split])
        return size if split != "search" or self._max_items is None else min(size, self._max_items)

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Measure the model on a split; one forward pass per item serves all objectives.

        Raises:
            NonFiniteError: If a score is not finite; names the objective.
        """
        of_split = self._items_of(split)
        indices = chosen_indices(of_split.domains, items)

        def score(fresh: npt.NDArray[np.intp]) -> Mapping[str, Array]:
            whole = len(fresh) == len(of_split.domains)
            part = of_split if whole else of_split.rows(fresh)
            return self._scores_of(candidate, part)

        by_metric = scores_at(candidate.scored, (id(self), split), indices, score)
        domains = of_split.domains[indices]
        by_domain = {
            metric: self._by_domain(metric, split, indices, scores, domains)
            for metric, scores in by_metric.items()
            if metric not in self.pooled and not is_part(metric)
        }
        for metric, pool in self.pooled.items():
            if metric in self._wanted:
                by_domain[metric] = pooled_domains(metric, pool, by_metric, indices, domains)
        references = candidate.references
        scores = (self._metrics, by_domain, references, self._experts)
        measured = measure(*scores, of_split.domains)
        return measured if split == "search" else with_resamples(measured, *scores)

    def _scores_of(self, candidate: Candidate, items: Any) -> Mapping[str, Array]:
        """Metric -> score of each item, by the head of its domain where there are several."""
        return scores_by_head(candidate, items, self._head_of, self._item_scores)

    def batch_cost(self, batch: Batch, names: Collection[str] | None = None) -> int:
        """Number of items in the batch's share, over all domains."""
        domains = self._tables.domains(self._splits["search"])
        by_domain = batch_indices(domains[_used_items(domains, self._max_items)], batch)
        return sum(len(indices) for indices, _ in by_domain.values())

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Run backwards domain by domain: only one domain's graph is alive at a time.

        Raises:
            NonFiniteError: If a loss is not finite.
        """
        metrics = [*self._metrics, *(Metric(metric=name) for name in self.proxies)]
        own = (metric.label for metric in metrics if not metric.bounds)
        offered = {*self.differentiable, *self.proxies}
        assert all(name in offered for name in own if weights.get(name))
        items = self._items_of("search")
        everywhere = set(items.domains.tolist())
        total = 0.0
        for domain, (indices, size) in batch_indices(items.domains, batch).items():
            factors = loss_factors(metrics, domain, everywhere, weights)
            model = model_for(candidate, domain, self._head_of)
            for start in range(0, len(indices), self._batch_size):
                if factors:
                    part = items.rows(indices[start : start + self._batch_size])
                    scores = self._scores(model, part)
                    total += _add_gradient(scores, factors, batch.shares / size)
        return LossAndGradient(total)

    def _by_domain(
        self,
        metric: str,
        split: Split,
        indices: npt.NDArray[np.intp],
        scores: Array,
        domains: npt.NDArray[np.str_],
    ) -> dict[str, DomainScore]:
        """Domain -> a metric's score there: the mean of its items, unless a subclass differs."""
        return {
            name: replace(score, item_indices=indices[score.item_indices])
            for name, score in score_domains(scores, domains).items()
        }

    def _item_scores(self, model: Any, items: Items) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``."""
        import torch

        by_metric: dict[str, list[torch.Tensor]] = {}
        with torch.inference_mode():
            for part in item_batches(items, self._batch_size):
                for metric, scores in self._scores(model, part).items():
                    by_metric.setdefault(metric, []).append(scores)
        # One copy for all metrics: every copy waits until the device has caught up.
        values = torch.stack([torch.cat(parts).double() for parts in by_metric.values()]).cpu()
        return dict(zip(by_metric, values.numpy(), strict=True))

    def _items_of(self, split: Split) -> Any:
        """The items of a split, with all that scoring needs."""
        return self._items[split]

    @abstractmethod
    def _read(self, columns: Mapping[str, Any]) -> Items:
        """Make items from columns by role."""

    def _scores(self, model: Any, items: Any) -> dict[str, torch.Tensor]:
        """Metric -> score of each item ``(items,)`` of a batch.

        Scores have a graph where gradients are enabled. A subclass that has no gradients may
        override :meth:`_item_scores` instead.

        Raises:
            MergesearchError: If it does.
        """
        raise MergesearchError(f"{self._where}: expected no gradients of {self._subject}")


def _proxies(metrics: Sequence[Metric], smooth: Collection[str]) -> tuple[str, ...]:
    """Smooth metrics that no objective has, and whose names are free; none of bounds alone."""
    if all(metric.bounds for metric in metrics):
        return ()
    taken = {metric.label for metric in metrics}
    taken |= {metric.metric for metric in metrics if not metric.bounds}
    return tuple(name for name in sorted(smooth) if name not in taken)


def _used_items(domains: npt.NDArray[np.str_], max_items: int | None) -> npt.NDArray[np.intp]:
    """Indices of the search items that are used, from the domain of every item ``(items,)``."""
    every = np.arange(len(domains))
    return every if max_items is None else np.sort(balanced_order(domains)[:max_items])


def _add_gradient(
    scores: Mapping[str, torch.Tensor], factors: Mapping[str, float], scale: float
) -> float:
    """Add the gradient of ``scale · Σ factor · score`` to the parameters, and return that loss."""
    parts = [factor * scores[metric].sum() for metric, factor in factors.items()]
    loss = scale * sum(parts[1:], parts[0])
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(f"loss of {', '.join(factors)}")
    loss.backward()  # type: ignore[no-untyped-call]
    return value


def domain_names(column: Any, count: int) -> npt.NDArray[np.str_]:
    """Domain of each item ``(items,)``; one empty name where there is no column."""
    return np.full(count, "") if column is None else np.asarray(column).astype(np.str_)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to fp32, or keep fp64."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
