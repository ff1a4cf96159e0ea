"""Zero-shot classification of images by class prompts, with a dual encoder such as CLIP or SigLIP.

The head of a domain is the text features of its own classes, so that several tasks share one model.
Scores are accuracy, cross-entropy and, without labels, the entropy of AdaMerging (Yang 2024, arXiv
2310.02575). SigLIP's sigmoids are compared within a domain by a softmax over its classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mergesearch.evaluators.base import (
    Batch,
    Candidate,
    ItemSubset,
    LossAndGradient,
    Measurement,
    Split,
)
from mergesearch.evaluators.data.item_files import ItemFiles, item_files
from mergesearch.evaluators.data.split_tables import classes_of
from mergesearch.evaluators.images.prompted import shares_text_tower
from mergesearch.evaluators.metrics.answers import answer_scores
from mergesearch.evaluators.model_items import ModelItems, read_labelled
from mergesearch.evaluators.text.tokenized import Tokenized
from mergesearch.merging import InputError
from mergesearch.merging.models.prompt_heads import PromptHeads, check_prompts
from mergesearch.merging.models.task_heads import TaskHead

if TYPE_CHECKING:
    import torch

#: Metrics that read no labels.
UNLABELLED = frozenset({"entropy"})


class ZeroShot(Tokenized):
    """Scores a model of images and texts.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        prompts: Domain -> prompts with ``{}`` for the name of a class; "" stands for all domains.
        **by_item: Arguments of :class:`ByItem`; the columns are ``pixel_values`` and ``label``.

    Raises:
        InputError: If the search is on the test items, and an objective reads their labels.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy", "entropy"})
    model_class: str | None = "AutoModelForZeroShotImageClassification"

    def __init__(
        self, tokenizer: str | None, prompts: Mapping[str, Sequence[str]], **by_item: Any
    ) -> None:
        super().__init__(tokenizer, **by_item)
        self._prompts = prompts
        self._heads: PromptHeads | None = None
        self._head: TaskHead | None = None  # of the model that is scored
        if self.transductive:
            self.proxies = tuple(name for name in self.proxies if name in UNLABELLED)
            odd = sorted(self._wanted - UNLABELLED)
            if odd:
                raise InputError(
                    f"{self._where}.transductive: expected objectives without labels (entropy) for "
                    f"a search on the test items, received {odd[0]}; measure it in a section of "
                    "its own"
                )

    def check(self) -> None:
        """Check as every evaluator of items, and find prompts, names of classes and tokenizer.

        Raises:
            InputError: In one line.
        """
        super().check()
        domains = sorted(self._domains or {""})
        check_prompts(self._prompts, domains, self._where)
        self._classes(domains)
        self._loaded()

    def open(self) -> None:
        """Read the items of all splits, and make the prompts."""
        super().open()
        domains = sorted({str(name) for items in self._items.values() for name in items.domains})
        self._heads = PromptHeads(self._prompts, self._classes(domains), self._loaded())

    def evaluate(self, candidate: Candidate, split: Split, items: ItemSubset = None) -> Measurement:
        """Measure as every evaluator of items, by text features without a graph."""
        self._head = self._head_to_score(candidate)
        return super().evaluate(candidate, split, items)

    def backward(
        self, candidate: Candidate, batch: Batch, weights: Mapping[str, float]
    ) -> LossAndGradient:
        """Run backwards; where text towers differ, through the texts too."""
        self._head = self._head_of_recipe(candidate)
        return super().backward(candidate, batch, weights)

    def _head_to_score(self, candidate: Candidate) -> TaskHead | None:
        """The head of a candidate's model, without a graph."""
        assert self._heads is not None
        return self._heads.kept(candidate.model, shared=shares_text_tower(candidate.recipe))

    def _head_of_recipe(self, candidate: Candidate) -> PromptHeads:
        """The head of all merges that base and experts of a candidate allow."""
        assert self._heads is not None
        if not shares_text_tower(candidate.recipe):
            return self._heads
        return self._heads.kept(candidate.model, shared=True)

    def _classes(self, domains: Sequence[str]) -> dict[str, Sequence[str]]:
        """Domain -> names of its classes.

        Raises:
            InputError: If nothing names those of a domain.
        """
        files: ItemFiles = item_files(self._data)
        given = files.classes or {}
        if all(domain in given or "" in given for domain in domains):
            return {domain: given.get(domain, given.get("", ())) for domain in domains}
        # Their numbers are those of the prompts, whatever the model's own are.
        found = classes_of(
            replace(files, named=True), str(self._columns["label"]), f"{self._where}.data"
        )
        return {domain: found.get(domain, found.get("", [])) for domain in domains}

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        return read_labelled(columns, self._where)

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        import torch

        logits = self._logits(model, items)
        names, owner = np.unique(items.domains, return_inverse=True)
        scores: dict[str, torch.Tensor] = {}
        for index, name in enumerate(names):
            rows = np.flatnonzero(owner == index)
            places = torch.from_numpy(rows).to(logits.device)
            own = logits[places, : self._count(str(name))].contiguous()
            for metric, values in self._domain_scores(own, items.rows(rows)).items():
                whole = scores.setdefault(metric, values.new_empty(len(owner)))
                scores[metric] = whole.index_copy(0, places, values)
        return scores

    def _count(self, domain: str) -> int:
        """Number of the classes of a domain."""
        assert self._heads is not None
        return self._heads.count(domain)

    def _logits(self, model: Any, items: ModelItems) -> torch.Tensor:
        """Logits of a batch ``(items, classes)``, each item's among the classes of its domain."""
        assert self._head is not None
        answer = self._head.answer(model, items.arguments(model), items.domains.tolist())
        logits: torch.Tensor = answer.logits
        return logits

    def _domain_scores(self, logits: torch.Tensor, items: ModelItems) -> dict[str, torch.Tensor]:
        """Metric -> score of each item ``(items,)`` of one domain."""
        labels = items.extra["label"]
        assert not isinstance(labels, list)
        scores = answer_scores(logits, labels, f"{self._where}.data.classes")
        log_p = logits.log_softmax(dim=1)
        return {**scores, "entropy": -(log_p.exp() * log_p).sum(dim=1)}
