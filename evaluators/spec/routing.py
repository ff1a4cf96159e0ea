"""The key ``routing`` of evaluators of language models: a merge for each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field as Key
from pydantic import model_validator

from mergesearch.evaluators.spec.section import Section

DESCRIPTION = (
    "Merge anew for each prompt instead of once for all; the study then searches the parameters of "
    "that."
)
#: Method -> the keys that it has beside ``per``.
OWN: Mapping[str, tuple[str, ...]] = {
    "t3": ("centred",),
    "twin_merging": ("router_width", "router_steps", "router_seed"),
}


class RoutingSpec(Section):
    """How texts are merged for: by what decides about their prompts."""

    method: Literal["t3", "twin_merging"] = Key(
        description="t3: base and one expert, by their disagreement about the prompt's tokens. "
        "twin_merging: a shared merge and vectors of experts, by a router that reads the prompt.",
    )
    per: Literal["item", "batch"] = Key(
        default="item", description="Merge for every item, or once for a batch."
    )
    centred: bool = Key(
        default=False, description="Of t3: 2 sigmoid - 1 instead of the published sigmoid."
    )
    router_width: int = Key(
        default=64, ge=1, description="Of twin_merging: hidden width of the router."
    )
    router_steps: int = Key(
        default=100,
        ge=1,
        le=10000,
        description="Of twin_merging: training steps, on all search items at once.",
    )
    router_seed: int = Key(
        default=0, ge=0, description="Of twin_merging: seed of the router's first weights."
    )

    @model_validator(mode="after")
    def _of_the_method(self) -> Self:
        for method, keys in OWN.items():
            for key in keys if method != self.method else ():
                value = getattr(self, key)
                if value != type(self).model_fields[key].default:
                    raise ValueError(
                        f"{key}: expected method: {method} beside it, received {self.method} and "
                        f"{value}; leave it out"
                    )
        return self

    @property
    def rules(self) -> dict[str, Any]:
        """Arguments of the evaluator that merges for each prompt."""
        return self.model_dump(include={"per", *OWN[self.method]})


def no_routing(routing: Any) -> bool:
    """Whether a section has no such key: it then reads, and hashes, as those of older studies."""
    return routing is None
