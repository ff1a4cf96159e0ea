"""What evaluators that score items by running a model on them share.

Objectives are means of item scores over domains, or the worst domain. A member says how a batch of items is scored; the
item order is that of the folder and the arithmetic is deterministic, so a recipe scores the same each time and in each
worker.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from evaluators.base import SPLITS, Batch, Candidate, Measurement, Objective, Slope, Split
from evaluators.items import balanced_order, batch_places, check_items, count_items, load_columns
from merging import InputError, NonFiniteError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]

#: Metric -> where better is.
DIRECTIONS: Mapping[str, Literal["maximize", "minimize"]] = {
    "accuracy": "maximize",
    "cross_entropy": "minimize",
    "entropy": "minimize",
    "alignment": "minimize",
}


@dataclass(frozen=True)
class Metric:
    """One objective.

    Attributes:
        name: Name of the objective, or None for one made from the rest.
        metric: A key of :data:`DIRECTIONS`.
        domains: Domains to measure on, each once; None means all.
        reduce: ``mean`` of the domains' means, or the ``worst`` domain.
    """

    name: str | None = None
    metric: str = "accuracy"
    domains: Sequence[str] | None = None
    reduce: Literal["mean", "worst"] = "mean"

    @property
    def label(self) -> str:
        """The objective's name: ``accuracy``, ``accuracy[rotated]``, ``worst accuracy``, unless one was given."""
        if self.name is not None:
            return self.name
        where = f"[{', '.join(self.domains)}]" if self.domains is not None else ""
        return f"{'worst ' if self.reduce == 'worst' else ''}{self.metric}{where}"


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
        metrics: The objectives.
        splits: ``search``, ``validation``, ``test`` -> name of that split in the folder, where it differs.
        columns: ``label``, ``domain``, ``id`` and inputs -> column; the first three may be None.
        batch_size: Items per forward pass.
        where: Key of the study file, for messages.
        transductive: Search on the test items themselves, for members that read no labels.

    Raises:
        InputError: If two objectives have one name, domains are asked for without a domain column, or one twice.
    """

    #: Metrics that have gradients.
    smooth: ClassVar[frozenset[str]]
    model_class: str | None

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
    ) -> None:
        self._data, self._metrics, self._batch_size, self._where = data, tuple(metrics), batch_size, where
        self._splits: dict[Split, str] = {split: (splits or {}).get(split, split) for split in SPLITS}
        self._columns, self.transductive = columns, transductive
        if transductive:
            self._splits["search"] = self._splits["test"]
        self.objectives = tuple(Objective(metric.label, DIRECTIONS[metric.metric]) for metric in metrics)
        self.differentiable = tuple(m.label for m in metrics if m.metric in self.smooth and m.reduce == "mean")
        self.provides = frozenset({"items", "gradient"} if self.differentiable else {"items"})
        self._check_metrics()
        self._items: dict[Split, Any] = {}
        self._domains: set[str] = set()  # of all splits, once checked

    def check(self) -> None:
        """Refuse a missing folder, split or column, empty or overlapping splits, unknown or missing domains.

        Raises:
            InputError: In one line.
        """
        roles = {split: name for split, name in self._splits.items() if not (self.transductive and split == "search")}
        domains = check_items(self._data, roles, self._columns, f"{self._where}.data")
        domains.setdefault("search", domains["test"])
        for metric in self._metrics:
            for split in SPLITS:
                odd = sorted(set(metric.domains or ()) - domains[split])
                if odd:
                    raise InputError(
                        f"{self._where}.objectives: expected domains among {sorted(domains[split])} (those of the "
                        f"{split} items), received {odd[0]!r}"
                    )
        everywhere = self._domains = set.union(*domains.values())
        for split in SPLITS:
            # A mean over all domains would mean something else on these items.
            absent = sorted(everywhere - domains[split])
            if absent and any(metric.domains is None for metric in self._metrics):
                raise InputError(
                    f"{self._where}.data: {self._data}: expected items of every domain in every split, received none "
                    f"of {absent[0]!r} in {self._splits[split]!r}; add some, or name the domains of each objective"
                )

    def open(self) -> None:
        """Read the items of all splits."""
        for split in SPLITS:
            self._items[split] = self._read(load_columns(self._data, self._splits[split], self._columns))

    def size(self, split: Split) -> int:
        """Items of a split."""
        return count_items(self._data, self._splits[split])

    def cost(self, split: Split, items: int | None = None) -> int:
        """One forward pass per item serves all objectives."""
        size = self.size(split)
        return size if items is None else min(items, size)

    def evaluate(self, candidate: Candidate, split: Split, items: int | None = None) -> Measurement:
        """Measure the model on a split.

        Raises:
            NonFiniteError: If a score is not finite; names the objective.
        """
        chosen = self._items_of(split)
        if items is not None and items < len(chosen.domains):
            chosen = chosen.rows(np.sort(balanced_order(chosen.domains)[:items]))
        return self._measure(candidate.model, chosen)

    def batch_cost(self, batch: Batch) -> int:
        """Items of the batch's share, over all domains."""
        return sum(len(places) for places, _ in batch_places(self._search_domains, batch).values())

    @cached_property
    def _search_domains(self) -> npt.NDArray[np.str_]:
        """Domain of each search item; the driver, which never opens, reads that column alone."""
        column = {"domain": self._columns["domain"]}
        found = load_columns(self._data, self._splits["search"], column) if column["domain"] else {}
        return domain_names(found.get("domain"), self.size("search"))

    def backward(self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]) -> Slope:
        """Run backwards domain by domain: only one domain's graph is alive at a time.

        Raises:
            NonFiniteError: If a loss is not finite.
        """
        items, total = self._items_of("search"), 0.0
        for domain, (places, size) in batch_places(items.domains, batch).items():
            factors = self._factors(domain, set(items.domains.tolist()), weights)
            for start in range(0, len(places), self._batch_size):
                if factors:
                    part = items.rows(places[start : start + self._batch_size])
                    total += self._backward(candidate.model, part, factors, batch.shares / size)
        return Slope(total)

    def _backward(self, model: Any, items: Items, factors: Mapping[str, float], scale: float) -> float:
        scores = self._scores(model, items)
        parts = [factor * scores[metric].sum() for metric, factor in factors.items()]
        loss = scale * sum(parts[1:], parts[0])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(f"loss of {', '.join(factors)}")
        loss.backward()  # type: ignore[no-untyped-call]
        return value

    def _factors(self, domain: str, everywhere: set[str], weights: Mapping[str, float]) -> dict[str, float]:
        """Metric -> its weight in the loss of one domain, over all objectives that measure there."""
        factors: dict[str, float] = {}
        for metric in self._metrics:
            chosen = everywhere if metric.domains is None else set(metric.domains)
            weight = weights.get(metric.label, 0.0)
            assert not weight or metric.label in self.differentiable
            if weight and domain in chosen:
                factors[metric.metric] = factors.get(metric.metric, 0.0) + weight / len(chosen)
        return factors

    def _measure(self, model: Any, items: Items) -> Measurement:
        scores = self._item_scores(model, items)
        values, errors, kept = {}, {}, {}
        for metric, objective in zip(self._metrics, self.objectives, strict=True):
            value, error, used = reduce_scores(metric, scores[metric.metric], items.domains)
            if not math.isfinite(value):
                raise NonFiniteError(f"objective {objective.name!r}")
            values[objective.name], errors[objective.name], kept[objective.name] = value, error, used
        return Measurement(values, errors, kept)

    def _item_scores(self, model: Any, items: Items) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``."""
        import torch

        found: dict[str, list[torch.Tensor]] = {}
        with torch.inference_mode():
            for start in range(0, len(items.domains), self._batch_size):
                for metric, scores in self._scores(model, items.rows(slice(start, start + self._batch_size))).items():
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
        """Metric -> score of each item ``(items,)`` of a batch, with a graph where gradients are on."""

    def _check_metrics(self) -> None:
        names = [objective.name for objective in self.objectives]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                f"{self._where}.objectives: expected unique names, received {twice} twice; give one a name"
            )
        again = next((m for m in self._metrics if m.domains is not None and len(set(m.domains)) < len(m.domains)), None)
        if again is not None:
            raise InputError(
                f"{self._where}.objectives: expected each domain once, received {again.domains}; drop the repeat"
            )
        by_domain = next((m.label for m in self._metrics if m.domains is not None or m.reduce == "worst"), None)
        if by_domain is not None and self._columns["domain"] is None:
            raise InputError(
                f"{self._where}.domain: required key is missing: objective {by_domain!r} needs a domain column"
            )


def reduce_scores(metric: Metric, scores: Array, domains: npt.NDArray[np.str_]) -> tuple[float, float, Array]:
    """Value, standard error and the item scores behind them.

    The mean over domains is the mean of the domains' means, its error that of independent means; the worst domain
    brings its own error. The item scores of a mean are those of the domains in question, in the order of the split;
    of a worst domain, those of that domain.

    Args:
        metric: What to measure.
        scores: Score of each item ``(items,)``.
        domains: Domain of each item ``(items,)``; one name throughout where there is no domain column.
    """
    chosen = sorted(set(domains.tolist())) if metric.domains is None else list(metric.domains)
    by_domain = [scores[domains == name] for name in chosen]
    means = np.array([part.mean() for part in by_domain])
    errors = np.array([part.std() / math.sqrt(part.size) for part in by_domain])
    if metric.reduce == "worst":
        worst = int(np.argmin(means) if DIRECTIONS[metric.metric] == "maximize" else np.argmax(means))
        return float(means[worst]), float(errors[worst]), by_domain[worst]
    error = math.sqrt(float(np.sum(errors**2))) / len(chosen)
    return float(means.mean()), error, scores[np.isin(domains, chosen)]


def domain_names(column: Any, count: int) -> npt.NDArray[np.str_]:
    """Domain of each item ``(items,)``; one empty name where there is no column."""
    return np.full(count, "") if column is None else np.asarray(column).astype(np.str_)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32, or fp64 where it is that."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
