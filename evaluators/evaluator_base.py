"""Harmless defaults for the parts of the contract that many evaluators do not need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from mergesearch.evaluators.base import Batch, Candidate, LossAndGradient, Split
from mergesearch.merging import MergesearchError


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

    def check(self) -> None:
        """Refuse nothing: there is no data."""

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
