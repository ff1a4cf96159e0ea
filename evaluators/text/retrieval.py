"""Retrieval: how far up the document of a query stands among all documents of its domain.

``recall`` is 1 for a query whose document is among the first k. ``ndcg`` is the discounted gain of
its rank r among the first k, 1 / log2(r + 1), which is normalised because there is one right
document (Järvelin 2002, "Cumulated Gain-Based Evaluation of IR Techniques"). Documents with the
same score rank before the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.batching import item_batches
from mergesearch.evaluators.by_item import Array, domain_names
from mergesearch.evaluators.model_items import ModelItems
from mergesearch.evaluators.pooling import Pool
from mergesearch.evaluators.text.embeddings import Pooling, embeddings, text_inputs
from mergesearch.evaluators.text.text_classification import TextClassification

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class _Queries:
    """Queries, and all documents of the split.

    Attributes:
        model: Token ids of the queries.
        right: Index of each query's document ``(items,)``.
        documents: Token ids of the different documents, with the domain that each belongs to.
    """

    model: ModelItems
    right: npt.NDArray[np.intp]
    documents: ModelItems

    @property
    def domains(self) -> npt.NDArray[np.str_]:
        """Domain of each query ``(items,)``."""
        return self.model.domains

    def rows(self, indices: npt.NDArray[np.intp] | slice) -> _Queries:
        """The queries at some indices, among the same documents."""
        return replace(self, model=self.model.rows(indices), right=self.right[indices])


class Retrieval(TextClassification):
    """Scores an encoder on queries and documents.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        k: How many of the first documents count.
        pooling: How the states of tokens become one embedding.
        query_prefix, document_prefix: Said before every query and document.
        **options: Arguments of :class:`TextClassification`; the columns are ``text`` for the query
            and ``pair`` for its document.
    """

    smooth: ClassVar[frozenset[str]] = frozenset()
    pooled: ClassVar[Mapping[str, Pool]] = {}
    model_class: str | None = "AutoModel"
    _subject = "ranks"

    def __init__(
        self,
        tokenizer: str | None,
        *,
        k: int = 10,
        pooling: Pooling = "mean",
        query_prefix: str = "",
        document_prefix: str = "",
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        self._k = k
        self._pooling = pooling
        self._prefixes = (query_prefix, document_prefix)

    def _read(self, columns: Mapping[str, Any]) -> Any:
        tokenizer = self._loaded()
        queries = text_inputs(tokenizer, columns["text"], self._prefixes[0], self._max_length)
        domains = domain_names(columns.get("domain"), len(columns["text"]))
        keys = list(zip(domains.tolist(), columns["pair"], strict=True))
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        texts = [text for _, text in numbers]
        documents = text_inputs(tokenizer, texts, self._prefixes[1], self._max_length)
        owners = np.array([domain for domain, _ in numbers])
        return _Queries(
            ModelItems(queries, domains, {}),
            np.array([numbers[key] for key in keys]),
            ModelItems(documents, owners, {}),
        )

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """Metric -> score of each query ``(items,)``."""
        import torch

        with torch.inference_mode():
            documents = self._embedded(model, items.documents)
            queries = self._embedded(model, items.model)
            scores = queries @ documents.T
            other = items.documents.domains[None, :] != items.domains[:, None]
            scores = scores.masked_fill(torch.from_numpy(other).to(scores.device), -torch.inf)
            right = torch.from_numpy(items.right).to(scores.device)
            own = scores.gather(1, right[:, None])
            rank = (scores >= own).sum(dim=1).double()
            found = (rank <= self._k) & (rank > 0)
            gain = torch.where(found, 1 / torch.log2(rank + 1), 0.0)
            finite = torch.isfinite(own[:, 0])
            by_metric = {"recall": found.double(), "ndcg": gain}
        return {
            metric: torch.where(finite, values, torch.nan).cpu().numpy()
            for metric, values in by_metric.items()
        }

    def _embedded(self, model: Any, items: ModelItems) -> torch.Tensor:
        """Embeddings of all items ``(items, width)``."""
        import torch

        parts = item_batches(items, self._batch_size)
        return torch.cat([embeddings(model, part, self._pooling) for part in parts])
