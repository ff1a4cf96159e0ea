"""Sections of evaluators of images: classification, merges for each input, segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field as Key
from pydantic import field_validator, model_validator

from mergesearch.evaluators.base import Evaluator
from mergesearch.evaluators.spec.base import BoundSpec, ItemSpec, ScoreSpec, metrics_of
from mergesearch.evaluators.spec.data import DESCRIPTION, DataSpec, domain_column, item_files_of
from mergesearch.evaluators.spec.section import ModelSection


class MetricSpec(ScoreSpec):
    """One objective of a classification evaluator."""

    metric: Literal["accuracy", "cross_entropy"] = "accuracy"


class MetricBoundSpec(BoundSpec, MetricSpec):
    """One bound of a classification evaluator."""


class ClassificationSpec(ModelSection):
    """Classification of images, which are arrays of pixels or pictures."""

    kind: Literal["classification"]
    data: str | DataSpec = Key(description=DESCRIPTION)
    splits: dict[Literal["search", "validation", "test"], str] = Key(
        default_factory=dict,
        description="Names of the three splits in the folder, where they differ.",
    )
    input: str = Key(default="pixels", description="Column of the images.")
    label: str = Key(default="label", description="Column of the class numbers, or their names.")
    domain: str | None = Key(
        default=None, description="Column that says which domain an item belongs to."
    )
    id: str | None = Key(
        default=None, description="Column of stable ids; by default a hash of the image."
    )
    batch_size: int = Key(default=256, ge=1, description="Items of a forward pass.")
    max_items: int | None = Key(
        default=None, ge=1, description="Use at most this many search items."
    )
    objectives: list[MetricSpec] = Key(default_factory=lambda: [MetricSpec()])
    constraints: list[MetricBoundSpec] = Key(
        default_factory=list, description="Bounds that merges must keep."
    )
    experts: dict[str, str] | None = Key(
        default=None, description="Domain -> expert; by default of the same name."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.images.classification import Classification

        return Classification(**_as_classification(self, folder, where))


class RoutedSpec(ClassificationSpec):
    """Keys that merges for each input share: they classify images, or compare them with prompts."""

    prompts: list[str] | dict[str, list[str]] | None = Key(
        default=None,
        min_length=1,
        # Sections without it read, and hash, as those of older studies.
        exclude_if=lambda prompts: prompts is None,
        description="For CLIP and its kin, as in zero_shot: texts with {} for the name of a class, "
        "for all domains or for each.",
    )
    tokenizer: str | None = Key(
        default=None,
        exclude_if=lambda tokenizer: tokenizer is None,
        description="Folder of the tokenizer of prompts; by default the base's.",
    )

    @model_validator(mode="after")
    def _prompted(self) -> Self:
        if self.prompts is None and self.tokenizer is not None:
            raise ValueError("tokenizer: expected none without prompts")
        return self

    def _items(self, folder: Path, where: str) -> dict[str, Any]:
        """Arguments of the evaluator that scores checkpoints."""
        options = _as_classification(self, folder, where)
        if self.prompts is None:
            return options
        columns = options["columns"]
        prompts = self.prompts if isinstance(self.prompts, dict) else {"": self.prompts}
        return options | {
            "columns": {"pixel_values": columns.pop("input"), **columns},
            "data": item_files_of(self.data, folder, named=True),
            "tokenizer": self.tokenizer,
            "prompts": prompts,
        }


class T3Spec(RoutedSpec):
    """Images by base and one expert, merged for each input by their disagreement."""

    kind: Literal["t3"]  # type: ignore[assignment]
    per: Literal["item", "batch"] = Key(
        default="item", description="Merge for every item, or once for a batch."
    )
    centred: bool = Key(
        default=False, description="2 sigmoid - 1 instead of the published sigmoid."
    )

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.routing.t3 import T3, PromptedT3

        made = T3 if self.prompts is None else PromptedT3
        return made(per=self.per, centred=self.centred, **self._items(folder, where))


class TwinMergingSpec(RoutedSpec):
    """Images by a shared merge and expert vectors, weighted by a router."""

    kind: Literal["twin_merging"]  # type: ignore[assignment]
    per: Literal["item", "batch"] = Key(
        default="item", description="Merge for every item, or once for a batch."
    )
    router_width: int = Key(default=64, ge=1, description="Hidden width of the router.")
    router_steps: int = Key(
        default=100, ge=1, le=10000, description="Training steps, on all search items at once."
    )
    router_seed: int = Key(default=0, ge=0, description="Seed of the router's first weights.")

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.routing.twin_merging import PromptedTwinMerging, TwinMerging

        made = TwinMerging if self.prompts is None else PromptedTwinMerging
        own = self.model_dump(include={"per", "router_width", "router_steps", "router_seed"})
        return made(**own, **self._items(folder, where))


def _as_classification(spec: ClassificationSpec, folder: Path, where: str) -> dict[str, Any]:
    """Arguments that every evaluator of image classification is built with."""
    return {
        "data": item_files_of(spec.data, folder),
        "metrics": metrics_of([*spec.objectives, *spec.constraints]),
        "splits": spec.splits,
        "columns": {
            "input": spec.input,
            "label": spec.label,
            "domain": domain_column(spec.data, spec.domain),
            "id": spec.id,
        },
        "batch_size": spec.batch_size,
        "max_items": spec.max_items,
        "experts": spec.experts,
        "where": where,
    }


class SegmentationMetricSpec(ScoreSpec):
    """One objective of a segmentation evaluator."""

    metric: Literal["dice", "iou", "cross_entropy"] = "dice"


class SegmentationBoundSpec(BoundSpec, SegmentationMetricSpec):
    """One bound of a segmentation evaluator."""


class SegmentationSpec(ItemSpec):
    """Masks by a promptable model (SAM and its kin) or a semantic segmentation model."""

    kind: Literal["segmentation"]
    inputs: dict[str, str] = Key(
        default_factory=lambda: {"pixel_values": "pixels", "input_boxes": "boxes"},
        min_length=1,
        description="Argument of the model -> column.",
    )
    mask: str = Key(
        default="mask", description="Column of the masks: class numbers (height, width)."
    )
    model_class: str | None = Key(
        default=None,
        description="transformers auto class; by default AutoModelForMaskGeneration where there "
        "are boxes, points or masks among the inputs, else AutoModelForSemanticSegmentation.",
    )
    background: int | None = Key(
        default=0, ge=0, description="Class number that does not count; null: all count."
    )
    ignored: int | None = Key(
        default=None, ge=0, description="Class number of pixels that count nowhere."
    )
    multimask: bool = Key(
        default=False,
        description="Let a promptable model propose several masks, and take what it expects most "
        "of.",
    )
    batch_size: int = Key(default=32, ge=1, description="Items of a forward pass.")
    objectives: list[SegmentationMetricSpec] = Key(  # type: ignore[assignment]
        default_factory=lambda: [SegmentationMetricSpec()]
    )
    constraints: list[SegmentationBoundSpec] = Key(  # type: ignore[assignment]
        default_factory=list, description="Bounds that merges must keep."
    )

    @field_validator("inputs")
    @classmethod
    def _no_roles(cls, inputs: dict[str, str]) -> dict[str, str]:
        odd = sorted(set(inputs) & {"mask", "label", "domain", "id"})
        if odd:
            raise ValueError(
                f"expected arguments of a model but mask, label, domain, id, received {odd[0]}"
            )
        return inputs

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.ignored is not None and self.ignored == self.background:
            raise ValueError(
                f"expected ignored and background to differ, received {self.ignored} for both"
            )
        return self

    def build(self, folder: Path, where: str) -> Evaluator:
        """Build the evaluator."""
        from mergesearch.evaluators.images.segmentation import Segmentation

        own = self.model_dump(include={"background", "ignored", "multimask"})
        return Segmentation(
            self.model_class,
            **own,
            **self._options(folder, where, None, self.inputs | {"mask": self.mask}),
        )
