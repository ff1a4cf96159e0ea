"""The contract of every evaluator, and the data that it exchanges with the search.

An evaluator scores a *candidate* on the items of a *split*::

    evaluator = build_evaluator(parse_evaluators([{"kind": "classification", ...}]), folder)
    evaluator.objectives                    # names and directions, known before weights are read
    evaluator.open()                        # loads the items, once in each worker
    evaluator.evaluate(candidate, "search") # returns a Measurement

Values are in the user's direction (accuracy is maximised as accuracy); the search flips signs once,
at its own boundary. Items of the three splits are disjoint: the search sees ``search``, the winner
is chosen on ``validation`` and reported once on ``test``.

A search may ask for a part of the items: the first so many of a fixed order that is the same in
every worker and balanced over domains, so that the items of a smaller part are among those of a
larger one.

Evaluators that provide gradients also run backwards, on a :class:`Batch` of the search items::

    result = evaluator.backward(candidate, Batch(number=0, size=16), {"entropy": 1.0})

adds the gradient of the weighted losses to ``.grad`` of the model's parameters, one domain after
the other, so that memory does not grow with the number of domains, and returns the loss as a
:class:`LossAndGradient`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from mergesearch.merging import Recipe

Split = Literal["search", "validation", "test"]
#: Which items of a split are meant: all (None), the first so many of the fixed order, or those at
#: given indices in the split ``(n,)``, which rise.
ItemSubset = int | npt.NDArray[np.intp] | None
SPLITS: tuple[Split, ...] = ("search", "validation", "test")


@dataclass(frozen=True)
class Objective:
    """Name and direction of one thing to optimise."""

    name: str
    direction: Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Candidate:
    """The recipe to evaluate and, where the evaluator needs one, the merged model.

    ``model`` is the worker's resident ``torch.nn.Module`` whose parameters are views into the
    merged arena; it changes with the next trial, so an evaluator must not keep it. ``merged`` is
    what merges into it (:class:`mergesearch.merging.resident.merged_model.MergedModel`), for merges
    that depend on their input.

    Attributes:
        heads: Expert -> the merged model with that expert's head, where experts keep their own.
            All share the merged weights.
        references: Anchor -> ``metric/domain`` -> value on the items in question, for objectives
            that are relative to other models; None while those are measured themselves.
        scored: The evaluators' own memory of the items that they have scored already, so that a
            larger part scores only what is new.
    """

    recipe: Recipe
    model: Any = None
    merged: Any = None
    references: Mapping[str, Mapping[str, float]] | None = None
    scored: dict[Any, Any] = field(default_factory=dict)
    heads: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """What a model made of one prompt, for a person to look at.

    Attributes:
        prompt: The prompt as the data has it.
        kind: ``text``, or the format of a picture: ``png``, ``jpeg``, ``gif`` or ``webp``.
        content: The picture's file, or the text in UTF-8.
    """

    prompt: str
    kind: str
    content: bytes


@dataclass(frozen=True)
class Exhibit:
    """What a person must judge before an objective has its value.

    Attributes:
        question: What the person is asked of two outputs for the same prompt.
        choices: How many pairs with this model in them are shown.
        outputs: The model's outputs, in a fixed order of the prompts.
    """

    question: str
    choices: int
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Measurement:
    """The result of one evaluation.

    Attributes:
        values: Objective name -> value in the user's direction.
        errors: Objective name -> standard error of the value over items, where it is known.
        items: Objective name -> score of each item ``(items,)``, in the order of the split; where
            only a part was asked for, of the items in that part.
        means: ``metric/domain`` -> value there, for objectives of other models that are relative to
            this one.
        violations: Bound -> how far it is missed; kept at 0 and below.
        weights: Objective name -> weight of each item ``(items,)``, where the value is the sum of
            weighted items.
        item_indices: The same objectives -> indices of the items among all that the split has for
            them ``(items,)``.
        resampled: Other objectives -> value on each of
            :data:`mergesearch.evaluators.items.RESAMPLES` resamples of the items ``(resamples,)``,
            which are the same for all merges; where it is known, on held-out items.
        exhibits: Objective that a person judges -> what is to be judged. Its value and error are
            what is believed before, until the driver puts in what the choices say.
    """

    values: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    items: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    means: Mapping[str, float] = field(default_factory=dict)
    violations: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    item_indices: Mapping[str, npt.NDArray[np.intp]] = field(default_factory=dict)
    resampled: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    exhibits: Mapping[str, Exhibit] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Which search items one gradient step uses.

    Every domain has an endless stream of its items, shuffled anew in every round by the seed; batch
    ``number`` holds positions ``number * size`` to ``(number + 1) * size`` of it
    (:func:`mergesearch.evaluators.items.batch_indices`).

    Attributes:
        number: Index of the batch in the streams, from 0.
        size: Items of each domain; None takes all of them.
        samples: Draw from the first so many items of each domain in the fixed order only; None
            means all.
        share, shares: The part of the batch that this worker uses, where several split it.
        seed: Shuffles the streams.
    """

    number: int = 0
    size: int | None = None
    samples: int | None = None
    share: int = 0
    shares: int = 1
    seed: int = 0


@dataclass(frozen=True)
class LossAndGradient:
    """The loss and the gradient of one backward pass.

    Attributes:
        loss: The weighted sum of the losses on the batch, or what this share contributes to it: the
            mean over shares is the loss of the whole batch.
        field: For problems without a model, the gradient of the loss with respect to the field's
            values ``(K, segments)``; None where the gradient lies in ``.grad`` of the model's
            parameters.
    """

    loss: float
    field: npt.NDArray[np.float64] | None = None


class Evaluator(Protocol):
    """Scores candidates; built from the study file in the driver and again in each worker."""

    #: Extras beyond the values: subset of {"items", "gradient"}.
    provides: frozenset[str]
    #: Names of the objectives that :meth:`backward` can follow; all of them are minimised. Empty
    #: without "gradient".
    differentiable: tuple[str, ...]
    #: Names of other losses that :meth:`backward` can follow: smooth ones that score the same items
    #: as the objectives do, and are objectives themselves only where the study lists them.
    proxies: tuple[str, ...]
    #: Whether the search items are the test items, without their labels.
    transductive: bool
    #: The ``transformers`` auto class of the model it runs, or None when it needs no model.
    model_class: str | None
    #: Whether items may be asked for by their indices.
    selects: bool

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives that are measured, in a fixed order."""

    @property
    def constraints(self) -> tuple[str, ...]:
        """Names of the bounds that a merge must keep."""

    @property
    def additive(self) -> tuple[str, ...]:
        """Objectives whose value is a weighted sum of item scores, also on a part of the items."""

    def lend(self, share: float) -> None:
        """Let the search use a share of the validation items; called before :meth:`check`.

        Raises:
            InputError: If the evaluator cannot.
        """

    def check(self) -> None:
        """Refuse missing data and overlapping or empty splits before any weight is read."""

    def use_heads(self, names: Sequence[str]) -> Mapping[str, str]:
        """Choose heads for the items, and return those that are used with their auto classes.

        Called after :meth:`check`, and in a worker after :meth:`open`.

        Args:
            names: Experts whose heads there are (and ``base``); none where all tensors are shared.

        Raises:
            InputError: If it is not known which head scores some item.
        """

    def references(self) -> frozenset[str]:
        """Anchors that must be measured first, because objectives are relative to them.

        Names as of :mod:`mergesearch.search.plan.anchors`, ``base`` and ``expert NAME``; known
        after :meth:`check`.
        """

    def warnings(self, sources: Sequence[str]) -> list[str]:
        """Warnings about the models' folders (base, experts), one line each.

        A user should know of them before the models are evaluated.
        """

    def open(self) -> None:
        """Load the items; called once in each worker, before the first evaluation."""

    def size(self, split: Split) -> int:
        """Number of items of a split, 0 where there are none.

        Known after :meth:`check`, before :meth:`open`.
        """

    def cost(self, split: Split, items: int | None = None) -> int:
        """Item evaluations that one call of :meth:`evaluate` makes; 1 where there are no items."""

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Score ``candidate`` on all items of ``split``, or on some of them.

        Deterministic for a given recipe, split and set of items. Indices may be given only to an
        evaluator that :attr:`selects`.
        """

    def batch_cost(self, batch: Batch, names: Collection[str] | None = None) -> int:
        """Items that one call of :meth:`backward` uses; known after :meth:`check`.

        Args:
            batch: Which items.
            names: Losses that are followed; None: every differentiable objective.
        """

    def halve_batch(self) -> int | None:
        """Halve the batch after an evaluation ran out of memory.

        Returns:
            Items of a forward pass from now on; None where they are one already, or where there are
            no batches.
        """

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Add the gradient of ``Σ weight · loss`` on a batch to ``.grad`` of the parameters.

        A loss is the mean over the objective's domains of the mean over the domain's items. With
        shares, each counts its own items only and divides by the number in its share's fraction of
        the batch, so that the mean over all shares is the gradient on the whole batch, whatever
        their sizes.

        Args:
            candidate: The model; its gradients are not cleared first.
            batch: Which items.
            weights: Loss -> weight, some of :attr:`differentiable` and :attr:`proxies`.

        Raises:
            NonFiniteError: If the loss is not finite.
        """
