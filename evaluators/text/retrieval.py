"""Retrieval: how far up the document of a query stands among all documents of its domain.

``recall`` is 1 for a query whose document is among the first k. ``ndcg`` is the discounted gain of
its rank r among the first k, 1 / log2(r + 1), which is normalised because there is one right
document (Järvelin 2002, "Cumulated Gain-Based Evaluation of IR Techniques"). Documents with the
same score rank before the right one.

``cross_entropy`` is smooth: InfoNCE (van den Oord 2018, "Representation Learning with Contrastive
Predictive Coding", arXiv 1807.03748, equation 4), −log of the share that the right document has of
the sum of exp(cosine / temperature). The sum goes over that document and a pool of others, which is
the same for all queries of a domain. So the loss of a query does not depend on its batch, as it
would with negatives from the batch, and gradients embed the pool alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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
from mergesearch.evaluators.transfer import to_device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class _Queries:
    """Queries, and all documents of the split.

    Attributes:
        model: Token ids of the queries.
        right: Index of each query's document ``(items,)``.
        documents: Token ids of the different documents, with the domain that each belongs to.
        pool: Which documents the loss compares with the right one ``(documents,)``.
    """

    model: ModelItems
    right: npt.NDArray[np.intp]
    documents: ModelItems
    pool: npt.NDArray[np.bool_]

    @property
    def domains(self) -> npt.NDArray[np.str_]:
        """Domain of each query ``(items,)``."""
        return self.model.domains

    def rows(self, indices: npt.NDArray[np.intp] | slice) -> _Queries:
        """The queries at some indices, among the same documents."""
        return replace(self, model=self.model.rows(indices), right=self.right[indices])

    def compared(self) -> _Queries:
        """The same queries among those documents alone that their loss needs."""
        needed = self.pool & np.isin(self.documents.domains, self.domains)
        needed[self.right] = True
        chosen = np.flatnonzero(needed)
        return replace(
            self,
            right=np.searchsorted(chosen, self.right),
            documents=self.documents.rows(chosen),
            pool=self.pool[chosen],
        )


class Retrieval(TextClassification):
    """Scores an encoder on queries and documents.

    Args:
        tokenizer: Folder of the tokenizer, or ``org/name@revision``.
        k: How many of the first documents count.
        pooling: How the states of tokens become one embedding.
        query_prefix, document_prefix: Said before every query and document.
        candidates: Documents of a domain that the loss compares with the right one.
        temperature: What the loss divides cosines by.
        **options: Arguments of :class:`TextClassification`; the columns are ``text`` for the query
            and ``pair`` for its document.
    """

    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})
    pooled: ClassVar[Mapping[str, Pool]] = {}
    model_class: str | None = "AutoModel"

    def __init__(
        self,
        tokenizer: str | None,
        *,
        k: int = 10,
        pooling: Pooling = "mean",
        query_prefix: str = "",
        document_prefix: str = "",
        candidates: int = 64,
        temperature: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        self._k = k
        self._candidates = candidates
        self._temperature = temperature
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
            _pool(texts, owners, self._candidates),
        )

    def _item_scores(self, model: Any, items: Any) -> dict[str, Array]:
        """Metric -> score of each query ``(items,)``."""
        import torch

        with torch.inference_mode():
            scores, own = self._cosines(model, items)
            rank = (scores >= own).sum(dim=1).double()
            found = (rank <= self._k) & (rank > 0)
            gain = torch.where(found, 1 / torch.log2(rank + 1), 0.0)
            finite = torch.isfinite(own[:, 0])
            by_metric = {"recall": found.double(), "ndcg": gain}
            if "cross_entropy" in self._wanted:
                by_metric["cross_entropy"] = self._losses(scores, own, items)
        return {
            metric: torch.where(finite, values, torch.nan).cpu().numpy()
            for metric, values in by_metric.items()
        }

    def _scores(self, model: Any, items: Any) -> dict[str, torch.Tensor]:
        few = items.compared()
        return {"cross_entropy": self._losses(*self._cosines(model, few), few)}

    def _cosines(self, model: Any, items: _Queries) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines of queries with documents, −inf in other domains, and with the right one.

        Returns:
            ``(items, documents)`` and ``(items, 1)``.
        """
        import torch

        documents = self._embedded(model, items.documents)
        queries = self._embedded(model, items.model)
        scores = queries @ documents.T
        other = items.documents.domains[None, :] != items.domains[:, None]
        scores = scores.masked_fill(torch.from_numpy(other).to(scores.device), -torch.inf)
        right = torch.from_numpy(items.right).to(scores.device)
        return scores, scores.gather(1, right[:, None])

    def _losses(self, scores: torch.Tensor, own: torch.Tensor, items: _Queries) -> torch.Tensor:
        """InfoNCE of each query ``(items,)``, from what :meth:`_cosines` returns."""
        import torch

        counted = np.broadcast_to(items.pool, tuple(scores.shape)).copy()
        counted[np.arange(len(counted)), items.right] = True
        left_out = to_device(torch.from_numpy(~counted), scores.device)
        among = scores.masked_fill(left_out, -torch.inf) / self._temperature
        return among.logsumexp(dim=1) - own[:, 0] / self._temperature

    def _embedded(self, model: Any, items: ModelItems) -> torch.Tensor:
        """Embeddings of all items ``(items, width)``."""
        import torch

        parts = item_batches(items, self._batch_size)
        return torch.cat([embeddings(model, part, self._pooling) for part in parts])


def _pool(texts: Sequence[str], owners: npt.NDArray[np.str_], size: int) -> npt.NDArray[np.bool_]:
    """Up to ``size`` documents of each domain ``(documents,)``, the first by a hash of their text.

    They do not depend on the order of the rows.
    """
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    order = np.argsort(hashes)
    pool = np.zeros(len(texts), dtype=np.bool_)
    for owner in np.unique(owners):
        pool[order[owners[order] == owner][:size]] = True
    return pool
