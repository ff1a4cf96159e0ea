"""What evaluators that score items by running a model on them share.

Objectives are means of item scores over domains, or the worst domain. A member says how a batch of
items is scored; the item order is that of the folder and the arithmetic is deterministic, so a
recipe scores the same each time and in each worker.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
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
from mergesearch.evaluators.items import (
    balanced_order,
    batch_places,
    check_items,
    chosen_places,
    count_items,
    load_columns,
)
from mergesearch.evaluators.objectives import (
    DomainScore,
    Metric,
    additive_of,
    check_metrics,
    constraints_of,
    measure,
    needed_references,
    objectives_of,
    score_domains,
)
from mergesearch.merging import InputError, NonFiniteError

__all__ = ["ByItem", "Items", "Metric", "domain_names", "wide"]

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]


class Items(Protocol):
    """Items of a split in memory."""

    @property
    def domains(self) -> npt.NDArray[np.str_]:
        """Domain of each item ``(items,)``."""

    def rows(self, places: npt.NDArray[np.intp] | slice) -> Self:
        """Some of the items."""


class ByItem(ABC):
    """Scores a model item by item.

    Args:
        data: Folder written by ``DatasetDict.save_to_disk``.
        metrics: The objectives, and bounds.
        splits: ``search``, ``validation``, ``test`` -> name of that split in the folder, where it
            differs.
        columns: ``label``, ``domain``, ``id`` and inputs -> column; the first three may be None.
        batch_size: Items per forward pass.
        where: Key of the study file, for messages.
        transductive: Search on the test items themselves, for members that read no labels.
        max_items: Search on so many of the search items only, the first of the fixed order; None
            means all.
        experts: Domain -> its expert, where that has another name; for objectives relative to
            experts.

    Raises:
        InputError: If two objectives have one name, domains are asked for without a domain column,
            or one twice.
    """

    #: Metrics that have gradients.
    smooth: ClassVar[frozenset[str]]
    model_class: str | None
    selects: bool = True

    def __init__(
        self,
        data: Path,
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
        self.additive = additive_of(self._metrics)
        plain = (
            m
            for m in metrics
            if m.metric in self.smooth and m.reduce == "mean" and m.normalise is None
        )
        self.differentiable = tuple(metric.label for metric in plain if not metric.bounds)
        self.provides = frozenset({"items", "gradient"} if self.differentiable else {"items"})
        self._items: dict[Split, Any] = {}
        self._domains: set[str] = set()  # of all splits, once checked

    def check(self) -> None:
        """Refuse a missing folder, split or column, empty or overlapping splits, unknown or missing
        domains.

        Raises:
            InputError: In one line.
        """
        roles = {
            split: name
            for split, name in self._splits.items()
            if not (self.transductive and split == "search")
        }
        domains = check_items(self._data, roles, self._columns, f"{self._where}.data")
        domains.setdefault("search", domains["test"])
        for metric in self._metrics:
            for split in SPLITS:
                odd = sorted(set(metric.domains or ()) - domains[split])
                if odd:
                    raise InputError(
                        f"{self._where}.objectives: expected domains "
                        f"among {sorted(domains[split])} (those of the "
                        f"{split} items), received {odd[0]!r}"
                    )
        everywhere = self._domains = set.union(*domains.values())
        for split in SPLITS:
            # A mean over all domains would mean something else on these items.
            absent = sorted(everywhere - domains[split])
            if absent and any(metric.domains is None for metric in self._metrics):
                raise InputError(
                    f"{self._where}.data: {self._data}: expected items of every domain in every "
                    "split, received none "
                    f"of {absent[0]!r} in {self._splits[split]!r}; add some, or name the domains "
                    "of each objective"
                )

    def references(self) -> frozenset[str]:
        """Anchors that objectives are relative to; known once checked."""
        return needed_references(self._metrics, self._domains or {""}, self._experts)

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """None: items are what a model reads."""
        return []

    def open(self) -> None:
        """Read the items of all splits."""
        for split in SPLITS:
            items = self._read(load_columns(self._data, self._splits[split], self._columns))
            self._items[split] = (
                items.rows(self._kept(items.domains)) if split == "search" else items
            )

    def size(self, split: Split) -> int:
        """Items of a split, as far as they are used."""
        size = count_items(self._data, self._splits[split])
        return size if split != "search" or self._max_items is None else min(size, self._max_items)

    def _kept(self, domains: npt.NDArray[np.str_]) -> npt.NDArray[np.intp]:
        """Places of the search items that are used, of the domains ``(items,)`` of all."""
        return np.sort(balanced_order(domains)[: self._max_items])

    def cost(self, split: Split, items: int | None = None) -> int:
        """One forward pass per item serves all objectives."""
        size = self.size(split)
        return size if items is None else min(items, size)

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Measure the model on a split.

        Raises:
            NonFiniteError: If a score is not finite; names the objective.
        """
        chosen = self._items_of(split)
        places = chosen_places(chosen.domains, items)
        scores = self._scored(candidate, chosen, places, split)
        domains = chosen.domains[places]
        by_domain = {
            metric: self._by_domain(metric, split, places, s, domains)
            for metric, s in scores.items()
        }
        return measure(
            self._metrics, by_domain, candidate.references, self._experts, chosen.domains
        )

    def batch_cost(self, batch: Batch) -> int:
        """Items of the batch's share, over all domains."""
        return sum(len(places) for places, _ in batch_places(self._search_domains, batch).values())

    @cached_property
    def _search_domains(self) -> npt.NDArray[np.str_]:
        """Domain of each search item; the driver, which never opens, reads that column alone."""
        column = {"domain": self._columns["domain"]}
        found = load_columns(self._data, self._splits["search"], column) if column["domain"] else {}
        domains = domain_names(found.get("domain"), count_items(self._data, self._splits["search"]))
        return domains[self._kept(domains)]

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Run backwards domain by domain: only one domain's graph is alive at a time.

        Raises:
            NonFiniteError: If a loss is not finite.
        """
        items = self._items_of("search")
        total = 0.0
        for domain, (places, size) in batch_places(items.domains, batch).items():
            factors = self._factors(domain, set(items.domains.tolist()), weights)
            for start in range(0, len(places), self._batch_size):
                if factors:
                    part = items.rows(places[start : start + self._batch_size])
                    total += self._backward(candidate.model, part, factors, batch.shares / size)
        return LossAndGradient(total)

    def _backward(
        self, model: Any, items: Items, factors: Mapping[str, float], scale: float
    ) -> float:
        scores = self._scores(model, items)
        parts = [factor * scores[metric].sum() for metric, factor in factors.items()]
        loss = scale * sum(parts[1:], parts[0])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(f"loss of {', '.join(factors)}")
        loss.backward()  # type: ignore[no-untyped-call]
        return value

    def _factors(
        self, domain: str, everywhere: set[str], weights: Mapping[str, float]
    ) -> dict[str, float]:
        """Metric -> its weight in the loss of one domain, over all objectives that measure
        there.
        """
        factors: dict[str, float] = {}
        for metric in self._metrics:
            chosen = everywhere if metric.domains is None else set(metric.domains)
            weight = 0.0 if metric.bounds else weights.get(metric.label, 0.0)
            assert not weight or metric.label in self.differentiable
            if weight and domain in chosen:
                factors[metric.metric] = factors.get(metric.metric, 0.0) + weight / len(chosen)
        return factors

    def _scored(
        self, candidate: Candidate, items: Items, places: npt.NDArray[np.intp], split: Split
    ) -> dict[str, Array]:
        """Metric -> score of the items at ``places``; those that this candidate was scored on
        before are kept.
        """
        key = (id(self), split)
        before, scores = candidate.scored.get(key, (np.empty(0, np.intp), {}))
        fresh = np.setdiff1d(places, before)
        if fresh.size:
            part = items if len(fresh) == len(items.domains) else items.rows(fresh)
            found = self._item_scores(candidate.model, part)
            merged = np.concatenate([before, fresh])
            order = np.argsort(merged)
            scores = {
                m: np.concatenate([scores[m], s] if m in scores else [s])[order]
                for m, s in found.items()
            }
            candidate.scored[key] = before, scores = merged[order], scores
        rows = np.searchsorted(before, places)
        return {metric: values[rows] for metric, values in scores.items()}

    def _by_domain(
        self,
        metric: str,
        split: Split,
        places: npt.NDArray[np.intp],
        scores: Array,
        domains: npt.NDArray[np.str_],
    ) -> dict[str, DomainScore]:
        """A metric's score in every domain: the mean of its items, unless a member has it
        otherwise.
        """
        found = score_domains(scores, domains)
        return {name: replace(score, places=places[score.places]) for name, score in found.items()}

    def _item_scores(self, model: Any, items: Items) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``."""
        import torch

        found: dict[str, list[torch.Tensor]] = {}
        with torch.inference_mode():
            for start in range(0, len(items.domains), self._batch_size):
                for metric, scores in self._scores(
                    model, items.rows(slice(start, start + self._batch_size))
                ).items():
                    found.setdefault(metric, []).append(scores)
        return {metric: torch.cat(parts).double().cpu().numpy() for metric, parts in found.items()}

    def _items_of(self, split: Split) -> Any:
        """The items of a split, with all that scoring needs."""
        return self._items[split]

    @abstractmethod
    def _read(self, columns: Mapping[str, Any]) -> Items:
        """Items from columns by role."""

    @abstractmethod
    def _scores(self, model: Any, items: Any) -> dict[str, torch.Tensor]:
        """Metric -> score of each item ``(items,)`` of a batch, with a graph where gradients are
        on.
        """


def domain_names(column: Any, count: int) -> npt.NDArray[np.str_]:
    """Domain of each item ``(items,)``; one empty name where there is no column."""
    return np.full(count, "") if column is None else np.asarray(column).astype(np.str_)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32, or fp64 where it is that."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
