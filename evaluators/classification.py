"""Accuracy and cross-entropy of an image classifier on a ``datasets`` folder, overall or by domain, item by item.

One forward pass over a split serves all objectives. The item order is that of the folder, the arithmetic is
deterministic, so a recipe scores the same each time and in each worker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from evaluators.base import SPLITS, Candidate, Measurement, Objective, Split
from evaluators.items import balanced_order, check_items, count_items, load_columns
from merging import InputError, NonFiniteError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]

DIRECTIONS: Mapping[str, Literal["maximize", "minimize"]] = {"accuracy": "maximize", "cross_entropy": "minimize"}


@dataclass(frozen=True)
class Metric:
    """One objective.

    Attributes:
        name: Name of the objective, or None for one made from the rest.
        metric: ``accuracy`` (share of right answers, maximised) or ``cross_entropy`` (nats per item, minimised).
        domains: Domains to measure on, each once; None means all.
        reduce: ``mean`` of the domains' means, or the ``worst`` domain.
    """

    name: str | None = None
    metric: Literal["accuracy", "cross_entropy"] = "accuracy"
    domains: Sequence[str] | None = None
    reduce: Literal["mean", "worst"] = "mean"

    @property
    def label(self) -> str:
        """The objective's name: ``accuracy``, ``accuracy[rotated]``, ``worst accuracy``, unless one was given."""
        if self.name is not None:
            return self.name
        where = f"[{', '.join(self.domains)}]" if self.domains is not None else ""
        return f"{'worst ' if self.reduce == 'worst' else ''}{self.metric}{where}"


@dataclass(frozen=True, eq=False)
class _Items:
    """A split in memory: images ``(items, channels, height, width)``, labels ``(items,)``, domain names."""

    images: torch.Tensor
    labels: torch.Tensor
    domains: npt.NDArray[np.str_]

    def first(self, count: int | None) -> _Items:
        """The first so many in the balanced order, as they lie in the split; all of them for None."""
        if count is None or count >= len(self.labels):
            return self
        rows = np.sort(balanced_order(self.domains)[:count])
        return _Items(self.images[rows], self.labels[rows], self.domains[rows])


class Classification:
    """Scores an image classification model.

    Args:
        data: Folder written by ``DatasetDict.save_to_disk``.
        metrics: The objectives.
        splits: ``search``, ``validation``, ``test`` -> name of that split in the folder, where it differs.
        columns: ``input``, ``label``, ``domain``, ``id`` -> column; domain and id may be None.
        batch_size: Items per forward pass.
        where: Key of the study file, for messages.

    Raises:
        InputError: If two objectives have one name, domains are asked for without a domain column, or one twice.
    """

    model_class: str | None = "AutoModelForImageClassification"
    provides = frozenset({"items"})

    def __init__(
        self,
        data: Path,
        metrics: Sequence[Metric],
        *,
        splits: Mapping[Split, str] | None = None,
        columns: Mapping[str, str | None],
        batch_size: int = 256,
        where: str = "classification",
    ) -> None:
        self._data, self._metrics, self._batch_size, self._where = data, tuple(metrics), batch_size, where
        self._splits: dict[Split, str] = {split: (splits or {}).get(split, split) for split in SPLITS}
        self._columns = columns
        self.objectives = tuple(Objective(metric.label, DIRECTIONS[metric.metric]) for metric in metrics)
        names = [objective.name for objective in self.objectives]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"{where}.objectives: expected unique names, received {twice} twice; give one a name")
        again = next((m for m in metrics if m.domains is not None and len(set(m.domains)) < len(m.domains)), None)
        if again is not None:
            raise InputError(
                f"{where}.objectives: expected each domain once, received {again.domains}; drop the repeat"
            )
        by_domain = next((m.label for m in metrics if m.domains is not None or m.reduce == "worst"), None)
        if by_domain is not None and columns["domain"] is None:
            raise InputError(f"{where}.domain: required key is missing: objective {by_domain!r} needs a domain column")
        self._items: dict[Split, _Items] = {}

    def check(self) -> None:
        """Refuse a missing folder, split or column, empty or overlapping splits, unknown or missing domains.

        Raises:
            InputError: In one line.
        """
        domains = check_items(self._data, self._splits, self._columns, f"{self._where}.data")
        for metric in self._metrics:
            for split in SPLITS:
                odd = sorted(set(metric.domains or ()) - domains[split])
                if odd:
                    raise InputError(
                        f"{self._where}.objectives: expected domains among {sorted(domains[split])} (those of the "
                        f"{split} items), received {odd[0]!r}"
                    )
        everywhere = set.union(*domains.values())
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
            columns = load_columns(self._data, self._splits[split], self._columns)
            self._items[split] = _as_items(columns["input"], columns["label"], columns.get("domain"))

    def size(self, split: Split) -> int:
        """Images of a split."""
        return count_items(self._data, self._splits[split])

    def cost(self, split: Split, items: int | None = None) -> int:
        """One forward pass per image serves all objectives."""
        size = self.size(split)
        return size if items is None else min(items, size)

    def evaluate(self, candidate: Candidate, split: Split, items: int | None = None) -> Measurement:
        """Measure the model on a split.

        Raises:
            NonFiniteError: If a score is not finite; names the objective.
        """
        return self._measure(candidate.model, self._items[split].first(items))

    def _measure(self, model: Any, items: _Items) -> Measurement:
        scores = self._item_scores(model, items)
        values, errors, kept = {}, {}, {}
        for metric, objective in zip(self._metrics, self.objectives, strict=True):
            value, error, used = reduce_scores(metric, scores[metric.metric], items.domains)
            if not math.isfinite(value):
                raise NonFiniteError(f"objective {objective.name!r}")
            values[objective.name], errors[objective.name], kept[objective.name] = value, error, used
        return Measurement(values, errors, kept)

    def _item_scores(self, model: Any, items: _Items) -> dict[str, Array]:
        """Metric -> score of each item ``(items,)``."""
        import torch
        from torch.nn.functional import cross_entropy

        parameter = next(model.parameters())
        losses, right = [], []
        with torch.inference_mode():
            for start in range(0, len(items.labels), self._batch_size):
                images = items.images[start : start + self._batch_size].to(parameter.device, parameter.dtype)
                labels = items.labels[start : start + self._batch_size].to(parameter.device)
                logits = model(images).logits.float()
                losses.append(cross_entropy(logits, labels, reduction="none"))
                # A row of NaN has an argmax too; it must not count as an answer.
                finite = torch.isfinite(logits).all(dim=1)
                right.append(torch.where(finite, (logits.argmax(dim=1) == labels).float(), torch.nan))
        return {
            "accuracy": torch.cat(right).double().cpu().numpy(),
            "cross_entropy": torch.cat(losses).double().cpu().numpy(),
        }


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


def _as_items(images: Any, labels: Any, domains: Any) -> _Items:
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if pixels.ndim == 3:  # (items, height, width): the channel axis is implied
        pixels = pixels[:, None]
    names = np.full(len(pixels), "") if domains is None else np.asarray(domains).astype(np.str_)
    return _Items(pixels, torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)), names)
