"""What is proposed for encoders without a head, and for models that give one number to a text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mergesearch.merging.checkpoints.safetensors_files import read_json
from mergesearch.search.init.commented import Key
from mergesearch.search.init.models import Models
from mergesearch.search.init.proposed import Proposal, tokenizer_keys
from mergesearch.search.init.roles import Finder
from mergesearch.search.init.tables import Column

#: What sentence-transformers calls how tokens become an embedding -> what a study calls it.
POOLING = {"pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}


def embeddings(finder: Finder, models: Models) -> Proposal:
    """Pairs of texts and how similar they are, or queries and their documents.

    Raises:
        InputError: If there are neither.
    """
    query = finder.usual("query", ("text",))
    document = finder.usual("document", ("text",))
    pair = finder.pair()
    if pair is not None and (query is None or document is None or query == document):
        number = finder.find("number", ("number", "integer"), [column.name for column in pair])
        if number is not None:
            return _similarity(finder, models, pair, number)
        query, document = pair
    if query is None or query == document:
        raise finder.missing(
            "query", "queries and one of their documents (or two of texts and one of numbers)"
        )
    if document is None:
        raise finder.missing("document", "documents, one for each query")
    keys = (
        Key("query", query.name),
        Key("document", document.name),
        *_pooling(models),
        *tokenizer_keys(models),
    )
    why = "The models have no head: they are scored by which texts they find alike."
    reason = "How early the document of a query comes among all; `recall` is another metric."
    return _with_domain(
        finder, models, Proposal(finder.data, "retrieval", why, keys, "ndcg", reason)
    )


def _similarity(
    finder: Finder, models: Models, pair: tuple[Column, Column], number: Column
) -> Proposal:
    keys = (
        Key("text", pair[0].name),
        Key("pair", pair[1].name),
        Key("number", number.name),
        *_pooling(models),
        *tokenizer_keys(models),
    )
    why = "The models have no head: they are scored by how alike they find texts."
    reason = "Whether cosines rank the pairs as the numbers do, on whatever scale."
    return _with_domain(
        finder, models, Proposal(finder.data, "similarity", why, keys, "spearman", reason)
    )


def preferences(finder: Finder, models: Models) -> Proposal | None:
    """Pairs of texts of which the first is better; None where the items are no such pairs."""
    chosen = finder.usual("chosen", ("text",))
    rejected = finder.usual("rejected", ("text",))
    if chosen is None or rejected is None:
        return None
    keys = (Key("chosen", chosen.name), Key("rejected", rejected.name), *tokenizer_keys(models))
    why = "The models give one number to a text: the better one should have the higher."
    reason = "Share of pairs that are ranked right."
    return _with_domain(
        finder, models, Proposal(finder.data, "reward", why, keys, "accuracy", reason)
    )


def _with_domain(finder: Finder, models: Models, proposal: Proposal) -> Proposal:
    """A proposal with the column of domains, if the items have one."""
    taken = [key.value for key in proposal.keys if isinstance(key.value, str)]
    domain = finder.domain([expert.name for expert in models.experts], taken)
    return proposal if domain is None else replace(proposal, domain=domain.name)


def _pooling(models: Models) -> tuple[Key, ...]:
    """How tokens become an embedding, where sentence-transformers wrote it down."""
    file = Path(models.base.folder or "") / "1_Pooling" / "config.json"
    config = read_json(file) if file.is_file() else {}
    found = next((how for key, how in POOLING.items() if config.get(key)), None)
    if found is None:
        return ()
    return (Key("pooling", found, "As 1_Pooling/config.json of the base says."),)
