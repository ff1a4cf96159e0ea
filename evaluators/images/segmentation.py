"""Dice, intersection over union and cross-entropy of a model that predicts masks, item by item.

Promptable models (SAM and its kin) take boxes or points beside the image and answer with one mask
for each prompt: a pixel belongs to the object if it does for any prompt. Other models give logits
for every class and pixel. Either way answers are resized to the mask's size before they are
compared, which therefore must show the same part of the image.

An item's Dice (or IoU) is the mean over the classes that occur in its mask or in the answer,
without the background; 1 where none occurs in either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mergesearch.evaluators.by_item import ByItem, wide
from mergesearch.evaluators.model_items import ModelItems, read_items, run_model
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch

#: Arguments that say which object is meant.
PROMPTS = frozenset({"input_boxes", "input_points", "input_masks"})


class Segmentation(ByItem):
    """Scores a promptable or a semantic segmentation model.

    Args:
        model_class: The ``transformers`` auto class of the model; None chooses it by the inputs.
        background: Class number that does not count, or None; for promptable models all others are
            the object.
        ignored: Class number of pixels that count nowhere, or None.
        multimask: Let a promptable model propose several masks, and take the one that it rates
            best.
        **by_item: Arguments of :class:`ByItem`; the column ``mask`` holds class numbers
            ``(height, width)``.
    """

    deterministic = True
    smooth: ClassVar[frozenset[str]] = frozenset({"cross_entropy"})

    def __init__(
        self,
        model_class: str | None = None,
        *,
        background: int | None = 0,
        ignored: int | None = None,
        multimask: bool = False,
        **by_item: Any,
    ) -> None:
        super().__init__(**by_item)
        prompted = bool(PROMPTS & set(self._columns))
        default = "AutoModelForMaskGeneration" if prompted else "AutoModelForSemanticSegmentation"
        self.model_class = model_class or default
        self._background = background
        self._ignored = ignored
        self._options = {"multimask_output": multimask} if prompted else {}

    def _read(self, columns: Mapping[str, Any]) -> ModelItems:
        items = read_items(columns, self._where)
        inputs = dict(items.inputs)
        masks = inputs.pop("mask")
        if isinstance(masks, list) or masks.ndim != 3:
            received = "rows" if isinstance(masks, list) else f"shape {tuple(masks.shape[1:])}"
            raise InputError(
                f"{self._where}.mask: expected masks (height, width) of one size, received "
                f"{received}"
            )
        if self._options:
            masks = _binary(masks, self._background or 0, self._ignored)
        return ModelItems(inputs, items.domains, {"mask": masks})

    def _scores(self, model: Any, items: ModelItems) -> dict[str, torch.Tensor]:
        import torch

        output, _ = run_model(model, items, **self._options)
        masks = items.extra["mask"]
        assert isinstance(masks, torch.Tensor)
        logits = resized(wide(object_logits(output) if self._options else output.logits), masks)
        counted = (
            torch.ones_like(masks, dtype=torch.bool)
            if self._ignored is None
            else masks != self._ignored
        )
        self._check_classes(masks[counted], logits.shape[1])
        masks = masks.to(logits.device)
        counted = counted.to(logits.device)
        # A pixel of NaN has an argmax too; it must not count as an answer.
        finite = torch.isfinite(logits).flatten(1).all(dim=1)
        background = 0 if self._options and self._background is not None else self._background
        overlaps = overlap_scores(logits.argmax(dim=1), masks, counted, logits.shape[1], background)
        scores = {name: torch.where(finite, values, torch.nan) for name, values in overlaps.items()}
        return scores | {"cross_entropy": pixel_cross_entropy(logits, masks, counted)}

    def _check_classes(self, numbers: torch.Tensor, classes: int) -> None:
        """Refuse class numbers of masks that the model has no class for."""
        odd = numbers[(numbers < 0) | (numbers >= classes)]
        if odd.numel():
            raise InputError(
                f"{self._where}.mask: expected class numbers 0 to {classes - 1}, as the model has "
                f"classes, received {int(odd[0])}; name the number of pixels that do not count in "
                f"{self._where}.ignored"
            )


def object_logits(output: Any) -> torch.Tensor:
    """Logits of "not the object", which are 0, and of the object ``(items, 2, height, width)``.

    Args:
        output: The output of a promptable model: ``pred_masks``
            ``(items, prompts, masks, height, width)``, and ``iou_scores``
            ``(items, prompts, masks)``, by which one mask is taken for each prompt.
    """
    import torch

    masks = output.pred_masks
    best = output.iou_scores.argmax(dim=2, keepdim=True)[..., None, None].expand(
        -1, -1, -1, *masks.shape[3:]
    )
    logits = masks.gather(2, best)[:, :, 0].amax(dim=1)
    return torch.stack([torch.zeros_like(logits), logits], dim=1)


def resized(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Resize logits bilinearly to the size of masks.

    Args:
        logits: ``(items, classes, h, w)``.
        masks: ``(items, height, width)``.
    """
    from torch.nn.functional import interpolate

    if logits.shape[2:] == masks.shape[1:]:
        return logits
    return interpolate(logits, size=tuple(masks.shape[1:]), mode="bilinear", align_corners=False)


def overlap_scores(
    answers: torch.Tensor,
    masks: torch.Tensor,
    counted: torch.Tensor,
    classes: int,
    background: int | None,
) -> dict[str, torch.Tensor]:
    """Compute ``dice`` and ``iou`` of each item ``(items,)``.

    Args:
        answers, masks: Class numbers ``(items, height, width)``.
        counted: Which pixels count ``(items, height, width)``.
        classes: Number of classes.
        background: Class number that does not count.
    """
    import torch

    answered, present = (_pixels(numbers, counted, classes) for numbers in (answers, masks))
    shared = _pixels(masks, counted & (answers == masks), classes)
    total = answered + present
    if background is not None:
        total[:, background] = 0
    occurs = total > 0
    ratios = {"dice": 2 * shared / total, "iou": shared / (total - shared)}
    number = occurs.sum(dim=1)
    return {
        name: torch.where(
            number > 0, torch.where(occurs, ratio, 0).sum(dim=1) / number.clamp(min=1), 1.0
        )
        for name, ratio in ratios.items()
    }


def pixel_cross_entropy(
    logits: torch.Tensor, masks: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """Mean over the pixels of each item that count ``(items,)``, in nats; 0 where none does."""
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(logits, masks.masked_fill(~counted, 0), reduction="none") * counted
    return losses.flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1).clamp(min=1)


def _pixels(numbers: torch.Tensor, counted: torch.Tensor, classes: int) -> torch.Tensor:
    """Number of counted pixels of each class ``(items, classes)``, in fp64, which is exact."""
    import torch

    items = torch.arange(len(numbers), device=numbers.device)[:, None, None]
    bins = (items * classes + numbers)[counted]
    return torch.bincount(bins, minlength=len(numbers) * classes).reshape(-1, classes).double()


def _binary(masks: torch.Tensor, background: int, ignored: int | None) -> torch.Tensor:
    """Masks with 1 for the object and 0 elsewhere; ignored pixels keep their number."""
    binary = (masks != background).long()
    return binary if ignored is None else binary.masked_fill(masks == ignored, ignored)
