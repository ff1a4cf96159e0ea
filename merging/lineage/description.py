"""Lineages for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mergesearch.merging.attention.head_maps import SIDES, Pair
from mergesearch.merging.family.messages import listed
from mergesearch.merging.lineage.agreement import Agreement
from mergesearch.merging.lineage.products import HeadAgreement
from mergesearch.merging.lineage.relation import Lineage
from mergesearch.merging.lineage.verdict import judged


def lineage_dict(lineage: Lineage) -> dict[str, Any]:
    """A lineage as JSON; numbers that do not exist are null."""
    return {
        "base": lineage.base[1],
        "expert": lineage.expert[1],
        "name": lineage.expert[0],
        "kind": lineage.kind,
        "finding": lineage.finding,
        "refused": lineage.refused,
        "roles": {
            role: {"parameters": one.parameters, **_figures(one)}
            for role, one in lineage.roles.items()
        },
        "products": {
            pair: {
                "heads": len(heads),
                "elements": _number(_median(head.elements for head in heads)),
                "product": _number(_median(head.product.cosine for head in heads)),
            }
            for pair, heads in _by_pair(lineage.heads).items()
        },
        "moved": [vars(one) for one in lineage.moved],
        "apart": list(lineage.apart),
        "broken": list(lineage.broken),
        "tensors": lineage.tensors,
        "bytes_read": lineage.size,
        **({} if lineage.recovered is None else {"recovered": round(lineage.recovered, 4)}),
    }


def lineage_line(lineage: Lineage) -> str:
    """One line for ``check``: the verdict and its figures."""
    by_role = judged(lineage.roles)
    if not by_role:
        return f"{lineage.expert[0]}: {lineage.finding}"
    all_roles = sum(by_role.values(), Agreement())
    figures = f"cosine {all_roles.cosine:.3f}, distance {all_roles.distance:.3f}"
    roles = ", ".join(f"{role} {one.cosine:.3f}" for role, one in by_role.items())
    products = [
        f"{pair} products {_median(head.product.cosine for head in heads):.3f}"
        for pair, heads in _by_pair(lineage.heads).items()
    ]
    again = "" if lineage.recovered is None else f"; {realigned_clause(lineage.recovered)}"
    again += f"; aligned by {lineage.aligned} before the merge" if lineage.aligned else ""
    described = "; ".join([roles, *products])
    return f"{lineage.expert[0]}: {lineage.kind}, {figures} ({described}){again}"


def realigned_clause(recovered: float) -> str:
    """What re-alignment makes of a locked expert, in words."""
    return f"re-aligned: {recovered:.0%} of distance recovered"


def lineage_lines(lineage: Lineage) -> list[str]:
    """The table of ``compare-weights``."""
    rows = [
        (
            role,
            f"{one.parameters:,}",
            f"{one.cosine:.4f}",
            f"{one.distance:.4f}",
            f"{2**one.octaves:.3f}",
        )
        for role, one in lineage.roles.items()
    ]
    verdict = lineage.kind + (f": {lineage.finding}" if lineage.finding else "")
    apart = (
        [f"apart     {len(lineage.apart)} matrices are unrelated: {', '.join(lineage.apart[:3])}"]
        if lineage.apart
        else []
    )
    return [
        f"base      {lineage.base[1]}",
        f"expert    {lineage.expert[1]}",
        f"verdict   {verdict}",
        *(
            []
            if lineage.recovered is None
            else [f"heads     {realigned_clause(lineage.recovered)}"]
        ),
        *apart,
        *([f"broken    NaN or infinity in {listed(lineage.broken)}"] if lineage.broken else []),
        f"read      {lineage.size / 1e6:.1f} MB of both, {lineage.tensors} tensors",
        "",
        *_aligned([("role", "parameters", "cosine", "distance", "scale"), *rows]),
        *_product_lines(lineage.heads),
    ]


def _product_lines(heads: Sequence[HeadAgreement]) -> list[str]:
    rows = [
        (
            pair,
            f"{len(of_pair)}",
            f"{_median(head.elements for head in of_pair):.4f}",
            f"{_median(head.product.cosine for head in of_pair):.4f}",
        )
        for pair, of_pair in _by_pair(heads).items()
    ]
    return ["", *_aligned([("product", "heads", "elements", "product"), *rows])] if rows else []


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with the first column to the left, and the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]


def _by_pair(heads: Sequence[HeadAgreement]) -> dict[Pair, list[HeadAgreement]]:
    pairs = {pair: [head for head in heads if head.pair == pair] for pair in SIDES}
    return {pair: of_pair for pair, of_pair in pairs.items() if of_pair}


def _figures(agreement: Agreement) -> dict[str, float | None]:
    return {
        "cosine": _number(agreement.cosine),
        "distance": _number(agreement.distance),
        "scale": _number(2**agreement.octaves),
    }


def _median(numbers: Iterable[float]) -> float:
    return float(np.median(list(numbers)))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
