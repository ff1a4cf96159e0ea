"""Harmless defaults for the parts of the contract that many evaluators do not need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.base import Batch, Candidate, LossAndGradient, Split
from mergesearch.merging import InputError, MergesearchError

#: Auto classes of models that give one of their classes to an item or a word.
CLASSIFIERS = (
    "AutoModelForImageClassification",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForAudioClassification",
)
#: (model, items) -> metric -> score of each item ``(items, ...)``.
ItemScores = Callable[[Any, Any], Mapping[str, npt.NDArray[np.float64]]]


def with_head(candidate: Candidate, evaluator: Any) -> Candidate:
    """The candidate whose model has the one head of an evaluator, if it has one."""
    head = getattr(evaluator, "one_head", None)
    return candidate if head is None else replace(candidate, model=candidate.heads[head])


@contextmanager
def weights_for(candidate: Candidate, evaluator: Any) -> Iterator[None]:
    """The weights of a candidate as an evaluator scores them, within the context."""
    kind = getattr(evaluator, "quantise", None)
    if kind is None:
        yield
        return
    from mergesearch.merging.models.quantised import quantised_weights

    with quantised_weights([candidate.model, *candidate.heads.values()], kind):
        yield


def model_for(candidate: Candidate, domain: str, head_of: Mapping[str, str]) -> Any:
    """The model for a domain's items: with the domain's own head, where ``head_of`` has one."""
    return candidate.heads[head_of[domain]] if head_of else candidate.model


def scores_by_head(
    candidate: Candidate, items: Any, head_of: Mapping[str, str], score: ItemScores
) -> Mapping[str, npt.NDArray[np.float64]]:
    """Metric -> score of each item, each domain's by the model with its own head.

    Args:
        candidate: The model, and those with heads.
        items: In memory (:class:`mergesearch.evaluators.by_item.Items`).
        head_of: Domain -> head; empty where one model scores all items.
        score: Scores items by one model.
    """
    if not head_of:
        return score(candidate.model, items)
    heads = np.array([head_of[domain] for domain in items.domains.tolist()])
    scores: dict[str, npt.NDArray[np.float64]] = {}
    for head in sorted({*heads.tolist()}):
        rows = np.flatnonzero(heads == head)
        for metric, own in score(candidate.heads[head], items.rows(rows)).items():
            scores.setdefault(metric, np.empty((len(heads), *own.shape[1:])))[rows] = own
    return scores


class EvaluatorBase:
    """An evaluator without items, data, references, warnings and gradients.

    Subclasses say what they measure (``objectives``, ``constraints``, ``additive``, ``evaluate``)
    and override what they have.
    """

    provides: frozenset[str] = frozenset()
    differentiable: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    transductive: bool = False
    model_class: str | None = None
    selects: bool = False
    #: Domain ("" without) -> largest class number of its items, after the check; empty without.
    largest_classes: Mapping[str, int] = MappingProxyType({})
    #: Bound -> its tolerance with the unit, for those that have one.
    _tolerances: Mapping[str, str] = MappingProxyType({})
    #: Expert whose head scores the items, as the study names it; None: found by name.
    head: str | None = None
    #: How the model's weights are rounded while it is scored
    #: (:data:`mergesearch.merging.models.quantised.QuantisedKind`); None: they are not.
    quantise: str | None = None
    #: Whether the values are those of weights, rather than of what a model answers.
    measures_weights: ClassVar[bool] = False
    #: The one head that scores all items; None where there are none, or it depends on the domain.
    one_head: str | None = None
    #: Domain -> head, where it depends on the domain.
    _head_of: Mapping[str, str] = MappingProxyType({})
    #: Domain -> expert, where that has another name.
    _experts: Mapping[str, str] = MappingProxyType({})
    #: Domains of all items, once they are known.
    _domains: Collection[str] = frozenset()
    #: What it is that has no gradients, for the message of :meth:`backward`.
    _subject: ClassVar[str] = "this evaluator"
    #: Key of the study file, for messages.
    _where: str
    #: Items of a forward pass; 1 where there are no batches.
    _batch_size: int = 1
    #: Padded tokens of a forward pass as the study states them; None where it does not.
    _batch_tokens: int | None = None
    #: How often the batch was halved.
    _halvings: int = 0

    @property
    def deterministic(self) -> bool:
        """Whether a merge scores the same each time, so that it need not be measured twice.

        What runs code of others, or asks people, promises that only where it is told so.
        """
        return False

    @property
    def tolerances(self) -> Mapping[str, str]:
        """Bound -> its tolerance with the unit, for those that have one."""
        return self._tolerances

    def lend(self, share: float) -> None:
        """Refuse to lend: there are no validation items of files.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"selection.lend: expected evaluators whose items come from files, received {share:g} "
            f"and {self._subject}; leave it out"
        )

    def check(self) -> None:
        """Refuse nothing: there is no data."""

    def use_heads(self, names: Sequence[str]) -> Mapping[str, str]:
        """Choose the head that the study names, else those of the domains' experts.

        Without domains it is that of the expert after which an objective is named.

        Raises:
            InputError: If it is not known which head scores some item.
        """
        if not names or self.model_class is None:
            if self.head is not None:
                raise InputError(
                    f"{self._where}.head: expected an evaluator that runs a model, and experts "
                    "with heads that do not line up (special: {heads: own}), received "
                    f"{self.head!r} without; leave it out"
                )
            return {}
        by_domain = {name: self._experts.get(name, name) for name in sorted(self._domains) if name}
        lost = next((name for name, head in by_domain.items() if head not in names), None)
        if self.head is None and by_domain and lost is None:
            self._head_of = by_domain
            return dict.fromkeys(by_domain.values(), self.model_class)
        objectives = [objective.name for objective in getattr(self, "objectives", ())]
        named = [*{name for name in objectives if name in names}]
        head = self.head if self.head is not None or len(named) != 1 else named[0]
        if head is None or head not in names:
            items = f" for the items of domain {lost!r}" if head is None and lost else ""
            raise InputError(
                f"{self._where}.head: expected one of {', '.join(names)}{items}, received "
                f"{'none' if head is None else repr(head)}; write head: NAME, or experts: "
                "{DOMAIN: NAME} where evaluators have domains"
            )
        self.one_head = head
        return {head: self.model_class}

    def check_classes(self, count_of: Callable[[str | None], int | None]) -> None:
        """Refuse class numbers that a classifier has no class for.

        Args:
            count_of: Head (None: the model's own) -> number of its classes, None where it is not
                known.

        Raises:
            InputError: In one line.
        """
        if self.model_class not in CLASSIFIERS:
            return
        for domain, largest in self.largest_classes.items():
            count = count_of(self.one_head or self._head_of.get(domain))
            if count is not None and largest >= count:
                whose = f" for the items of {domain!r}" if domain else ""
                raise InputError(
                    f"{self._where}.data: expected class numbers 0 to {count - 1}{whose}, as the "
                    f"model has {count} classes, received {largest}; number the classes as the "
                    "model does, or name its classes in data.classes"
                )

    def references(self) -> frozenset[str]:
        """Name no anchor: the values are relative to nothing."""
        return frozenset()

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Give no warnings."""
        return []

    def open(self) -> None:
        """Load nothing."""

    def size(self, split: Split) -> int:
        """Number of items, 0."""
        return 0

    def cost(self, split: Split, items: int | None = None) -> int:
        """One evaluation per item, or one where there are no items."""
        size = self.size(split)
        return max(size if items is None else min(items, size), 1)

    def batch_cost(self, batch: Batch, names: Collection[str] | None = None) -> int:
        """No item: there are no gradients."""
        return 0

    def halve_batch(self) -> int | None:
        """Halve the batch; it is that of all further evaluations."""
        if self._batch_size < 2:
            return None
        self._batch_size //= 2
        self._halvings += 1
        return self._batch_size

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Refuse to compute gradients.

        Raises:
            MergesearchError: Always.
        """
        raise MergesearchError(
            f"{self._where}: expected no gradients of {self._subject}, received a request for some"
        )
