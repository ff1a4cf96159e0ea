"""The complete, frozen description of a merge; the only thing that travels to workers.

A recipe is pure data: sources, operator with hyperparameters, coefficient field. ``digest``
identifies it. Reading the shorthand that people write by hand (``coefficients: 0.3``) needs the
layout of the base and lives in :mod:`mergesearch.merging.recipe_file`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mergesearch.merging.errors import RecipeError
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import shown
from mergesearch.merging.models.layer_bits import WIDTHS
from mergesearch.merging.tensors.field import Field

FORMAT = 1

#: Key of a recipe on disk with what an export knows of the weights that it wrote; no part of the
#: merge.
EXPORTED = "exported"


@dataclass(frozen=True)
class Source:
    """A checkpoint by name and location.

    Attributes:
        name: Short name used in tables, for example ``rotated``.
        path: Local folder, ``.safetensors`` file, or ``org/name@revision``.
        fingerprint: SHA-256 of the weights once they have been read, else empty.
    """

    name: str
    path: str
    fingerprint: str = ""

    @property
    def identity(self) -> str:
        """What counts for equality of merges: the content if it is known, else the location."""
        return self.fingerprint or self.path


@dataclass(frozen=True)
class Recipe:
    """``merged = base + Σ_k field[k] · T_k(expert_k − base)`` with the operator's T_k.

    Attributes:
        base: The common base.
        experts: Experts in order; their number need not equal ``field.directions`` for fused
            operators.
        operator: Name in :data:`mergesearch.merging.operators.OPERATORS`.
        hyperparameters: The operator's keyword arguments, sorted ``(name, value)`` pairs.
        field: Coefficients over the flat index.
        layout: Digest of the layout the field speaks of (empty for analytic problems without
            weights).
        special: Policies for special tensors (:class:`mergesearch.merging.policies.TensorPolicies`)
            where they are not the default, sorted ``(name, value)`` pairs.
        routing: Of a merge that depends on its input: the method and its parameters, sorted
            ``(name, value)`` pairs; empty for a checkpoint.
        bits: Of a merge that is rounded: tensor and its number of bits
            (:mod:`mergesearch.merging.models.layer_bits`), sorted pairs; empty for one that is not.
        mixture: Of a base without experts whose own experts become fewer: the operator on them
            (:mod:`mergesearch.merging.mixture`) and its hyperparameters, sorted ``(name, value)``
            pairs; empty for any other merge.
    """

    base: Source
    experts: tuple[Source, ...]
    operator: str
    field: Field
    hyperparameters: tuple[tuple[str, Any], ...] = ()
    layout: str = ""
    special: tuple[tuple[str, Any], ...] = ()
    routing: tuple[tuple[str, Any], ...] = ()
    bits: tuple[tuple[str, int], ...] = ()
    mixture: tuple[tuple[str, Any], ...] = ()

    def with_field(self, field: Field) -> Recipe:
        """The same merge with other coefficients."""
        return replace(self, field=field)

    @property
    def options(self) -> dict[str, Any]:
        """Hyperparameters as keyword arguments."""
        return dict(self.hyperparameters)

    @property
    def basis_key(self) -> str:
        """Identity of the prepared basis: everything but the coefficients.

        Names of experts count only where masks are drawn, an order declared, items given, or
        policies chosen, by name.
        """
        from mergesearch.merging.operators import OPERATORS

        operator = OPERATORS.get(self.operator)
        by_name = operator is not None and bool(
            operator.stochastic or operator.order_sensitive or operator.needs or operator.by_name
        )
        by_name = by_name or any(name in ("align", "unlock") for name, _ in self.special)
        data = [self.base.identity, [e.identity for e in self.experts], self.operator]
        names = [[e.name for e in self.experts]] if by_name else []
        special = [["special", sorted(self.special)]] if self.special else []
        if operator is not None and operator.revision:
            special.append(["revision", operator.revision])
        return _digest([*data, *names, sorted(self.hyperparameters), self.layout, *special])

    @cached_property
    def digest(self) -> str:
        """Identity of the merged model."""
        field = self.field.compact()
        data = (
            self.basis_key.encode()
            + field.boundaries.astype("<i8").tobytes()
            + field.values.astype("<f8").tobytes()
        )
        if self.routing:
            data += _digest(["routing", sorted(self.routing)]).encode()
        if self.bits:
            data += _digest(["bits", sorted(self.bits)]).encode()
        if self.mixture:
            data += _digest(["mixture", sorted(self.mixture)]).encode()
        return hashlib.sha256(data).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "format": FORMAT,
            "base": _source_dict(self.base),
            "experts": [_source_dict(expert) for expert in self.experts],
            "operator": self.operator,
            "hyperparameters": dict(self.hyperparameters),
            "layout": self.layout,
            **({"special": dict(self.special)} if self.special else {}),
            **({"routing": dict(self.routing)} if self.routing else {}),
            **({"bits": dict(self.bits)} if self.bits else {}),
            **({"mixture": dict(self.mixture)} if self.mixture else {}),
            "field": self.field.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`.

        Raises:
            RecipeError: If a key is missing or unknown, or the format is newer than this version.
        """
        from mergesearch.merging.policies import parse_policies

        expected = {"format", "base", "experts", "operator", "hyperparameters", "layout", "field"}
        keys = set(data) - {"special", "routing", "bits", "mixture", EXPORTED}
        if keys != expected:
            odd = ", ".join(shown(key) for key in sorted(map(str, keys ^ expected))[:8])
            raise RecipeError(
                f"recipe: expected keys {sorted(expected)}, missing or unknown: {odd}"
            )
        if data["format"] != FORMAT:
            raise RecipeError(f"recipe: expected format {FORMAT}, received {shown(data['format'])}")
        whole = Node(data, "recipe", RecipeError)
        experts = whole.at("experts").elements()
        if not experts and data["experts"]:
            raise whole.at("experts").wrong("a list of sources")
        return cls(
            base=_source(whole.at("base")),
            experts=tuple(_source(expert) for expert in experts),
            operator=whole.at("operator").text(),
            field=_field(whole.at("field"), mixture=bool(data.get("mixture"))),
            hyperparameters=tuple(sorted(whole.at("hyperparameters").mapping().items())),
            layout=whole.at("layout").text(),
            special=parse_policies(data.get("special")).choices,
            routing=tuple(sorted(whole.get("routing", {}).mapping().items())),
            bits=_bits(whole.get("bits", {})),
            mixture=tuple(sorted(whole.get("mixture", {}).mapping().items())),
        )


def _field(node: Node, *, mixture: bool) -> Field:
    """Coefficients; inside a mixture there are none, and their lists do not tell the segments."""
    sizes = node.at("boundaries").elements() if mixture else []
    return Field.constant(sizes[-1].integer(), []) if sizes else Field.from_dict(node.mapping())


def _bits(node: Node) -> tuple[tuple[str, int], ...]:
    """Tensor -> bits, as :meth:`Recipe.to_dict` writes it."""
    for _, each in node.members():
        if each.integer() not in WIDTHS:
            raise each.wrong(f"one of {list(WIDTHS)}")
    return tuple(sorted((name, each.integer()) for name, each in node.members()))


def _source(node: Node) -> Source:
    """A source as :func:`_source_dict` writes it."""
    odd = set(node.mapping()) ^ {"name", "path", "fingerprint"}
    if odd - {"fingerprint"}:
        raise node.wrong("the keys name, path and fingerprint")
    return Source(**{key: each.text() for key, each in node.members()})


def _source_dict(source: Source) -> dict[str, str]:
    return {"name": source.name, "path": source.path, "fingerprint": source.fingerprint}


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
