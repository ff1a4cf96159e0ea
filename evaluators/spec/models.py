"""Sections of evaluators that run a model on arrays or token ids, and have gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field as Key
from pydantic import field_validator, model_validator

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.spec.base import ItemSpec
from mergesearch.evaluators.spec.routing import DESCRIPTION, RoutingSpec, no_routing


class _UnlabelledSpec(ItemSpec):
    """Items without labels, for any model."""

    model_class: str = Key(
        default="AutoModelForImageClassification",
        description="transformers auto class of the model.",
    )
    inputs: dict[str, str] = Key(
        default_factory=lambda: {"pixel_values": "pixels"},
        min_length=1,
        description="Argument of the model -> column.",
    )

    @field_validator("inputs")
    @classmethod
    def _no_roles(cls, inputs: dict[str, str]) -> dict[str, str]:
        from mergesearch.evaluators.model_items import ROLES

        odd = sorted(set(inputs) & set(ROLES))
        if odd:
            raise ValueError(
                f"expected arguments of a model but {', '.join(ROLES)}, received {odd[0]}"
            )
        return inputs

    transductive: bool = Key(
        default=False,
        description="Search on the test items themselves, without their labels, as some papers do.",
    )


class EntropySpec(_UnlabelledSpec):
    """How sure the model is of its answers, on items without labels."""

    kind: Literal["entropy"]

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.entropy import Entropy

        options = self._options(folder, where, "entropy", self.inputs)
        return Entropy(self.model_class, transductive=self.transductive, **options)


class AlignmentSpec(_UnlabelledSpec):
    """Distance of the model's answers from those of each domain's expert, without labels."""

    kind: Literal["alignment"]
    teachers: dict[str, str] | None = Key(
        default=None,
        description="Domain -> expert of the study, or path of a checkpoint; by default the expert "
        "of the same name.",
    )
    temperature: float = Key(default=1.0, gt=0, description="Of the answers that are compared.")
    hidden_weight: float = Key(
        default=1.0, ge=0, description="Weight of the difference of hidden states."
    )
    layers: list[int] = Key(
        default_factory=list,
        description="Hidden states to compare, 0 the embeddings; by default none.",
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.alignment import Alignment
        from mergesearch.merging.checkpoints.locations import absolute_path

        own = self.model_dump(include={"temperature", "hidden_weight", "layers", "transductive"})
        options = self._options(folder, where, "alignment", self.inputs)
        teachers = {
            domain: absolute_path(path, folder) for domain, path in (self.teachers or {}).items()
        }
        return Alignment(self.model_class, teachers, **own, **options)


class LanguageModelSpec(ItemSpec):
    """Next-token cross-entropy of a causal language model on token ids."""

    kind: Literal["language_model"]
    input: str = Key(default="input_ids", description="Column of token ids.")
    labels: str | None = Key(
        default=None,
        description="Column of the ids to predict, -100 where a token does not count; by default "
        "all do.",
    )
    routing: RoutingSpec | None = Key(default=None, exclude_if=no_routing, description=DESCRIPTION)

    @model_validator(mode="after")
    def _prompted(self) -> Self:
        if self.routing is not None and self.labels is None:
            raise ValueError(
                "labels: required key is missing: with routing the tokens before the first that "
                "counts are the prompt, and without labels all count"
            )
        return self

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.text.language_model import LanguageModel

        inputs = {"input_ids": self.input} | (
            {} if self.labels is None else {"labels": self.labels}
        )
        options = self._options(folder, where, "cross_entropy", inputs)
        if self.routing is None:
            return LanguageModel(**options)
        from mergesearch.evaluators.routing.texts import SCORED

        return SCORED[self.routing.method](**self.routing.rules, **options)
