"""Items as keyword arguments of any model.

They are arrays of one shape, or sequences of tokens that are padded in a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mergesearch.evaluators.by_item import domain_names
from mergesearch.evaluators.transfer import to_device
from mergesearch.merging import InputError

if TYPE_CHECKING:
    import torch

#: Columns that are not arguments of the model.
ROLES = ("label", "domain", "id")


@dataclass(frozen=True, eq=False)
class ModelItems:
    """A split in memory.

    Attributes:
        inputs: Argument of the model -> a tensor ``(items, ...)``, or a tensor ``(tokens,)`` for
            each item.
        domains: Domain of each item ``(items,)``.
        extra: Further data of each item, ``(items, ...)`` or a list with one of each; the model
            does not get them.
    """

    inputs: Mapping[str, torch.Tensor | list[torch.Tensor]]
    domains: npt.NDArray[np.str_]
    extra: Mapping[str, torch.Tensor | list[Any]]

    def rows(self, indices: npt.NDArray[np.intp] | slice) -> ModelItems:
        """The items at some indices."""
        numbers = np.arange(len(self.domains))[indices].tolist()
        inputs = {name: _picked(values, numbers) for name, values in self.inputs.items()}
        extra = {name: _picked(values, numbers) for name, values in self.extra.items()}
        return ModelItems(inputs, self.domains[numbers], extra)

    def arguments(self, model: Any) -> dict[str, torch.Tensor]:
        """Keyword arguments ``(items, ...)`` for the model, on its device and in its dtype.

        Integers keep their dtype. Sequences are padded; those of different lengths get an
        ``attention_mask``, unless the items bring one. Ids are padded with the model's own padding
        token, by which some models find where a sequence ends.
        """
        import torch

        like = next(model.parameters())
        padding = getattr(model.config, "pad_token_id", None) or 0
        lengths = {
            len(row)
            for values in self.inputs.values()
            if isinstance(values, list)
            for row in values
        }
        batch = {
            n: padded(values, padding if n == "input_ids" else 0)
            for n, values in self.inputs.items()
        }
        if len(lengths) > 1 and "attention_mask" not in batch:
            ragged = next(values for values in self.inputs.values() if isinstance(values, list))
            batch["attention_mask"] = padded(
                [torch.ones(len(row), dtype=torch.int64) for row in ragged]
            )
        return {
            name: to_device(
                tensor.to(like.dtype) if tensor.is_floating_point() else tensor, like.device
            )
            for name, tensor in batch.items()
        }


def run_model(model: Any, items: ModelItems, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Run the model on a batch, without a cache of keys and values.

    Returns:
        Its output, and the arguments that it was given.

    Raises:
        InputError: If the model fails at more tokens than it has positions for.
    """
    settings = getattr(getattr(model, "config", None), "get_text_config", None)
    if settings is not None:
        settings().use_cache = False
    batch = items.arguments(model)
    try:
        return model(**batch, **options), batch
    except (IndexError, RuntimeError):
        _refuse_length(batch, settings)
        raise


def _refuse_length(batch: Mapping[str, torch.Tensor], settings: Any) -> None:
    """Say so where a model failed at texts that are longer than it reads.

    On a card the failure is an error of the device, which is told as such.
    """
    tokens = batch.get("input_ids")
    places = getattr(settings(), "max_position_embeddings", None) if settings else None
    if tokens is None or places is None or tokens.device.type != "cpu":
        return
    if tokens.shape[-1] > places:
        raise InputError(
            f"expected texts of at most {places} tokens, as many as the model has positions, "
            f"received {tokens.shape[-1]}; cut them with max_length, or set the tokenizer's "
            "model_max_length"
        ) from None


def generated(
    model: Any, arguments: Mapping[str, torch.Tensor], max_new_tokens: int
) -> torch.Tensor:
    """Tokens that a model writes for a batch ``(items, tokens)``, the likeliest each time."""
    import torch

    # A length of the model's own, as Whisper's, is warned of in every batch.
    with torch.inference_mode(), _only_errors("transformers.generation.utils"):
        tokens: torch.Tensor = model.generate(
            **arguments, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
        )
    return tokens


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    """Keep a logger's warnings back."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_items(columns: Mapping[str, Any], where: str) -> ModelItems:
    """Make items from columns by role.

    Every role but label, domain and id is an argument of the model.
    """
    inputs = {
        name: _as_input(name, values, where)
        for name, values in columns.items()
        if name not in ROLES
    }
    count = len(next(iter(inputs.values())))
    return ModelItems(inputs, domain_names(columns.get("domain"), count), {})


def read_labelled(columns: Mapping[str, Any], where: str) -> ModelItems:
    """Make items from columns by role, with their class numbers as the extra ``label``."""
    import torch

    labels = torch.from_numpy(np.ascontiguousarray(columns["label"], dtype=np.int64))
    return replace(read_items(columns, where), extra={"label": labels})


def padded(values: torch.Tensor | list[torch.Tensor], value: float = 0) -> torch.Tensor:
    """Make one tensor ``(items, ...)``; shorter rows are padded at their end with ``value``."""
    import torch

    if isinstance(values, torch.Tensor):
        return values
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)


def token_mask(batch: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Mask of the answers ``(items, tokens)`` that count, in the dtype of ``like``.

    All count where the batch has no mask.
    """
    import torch

    mask = batch.get("attention_mask")
    return torch.ones_like(like) if mask is None else mask.to(like.device, like.dtype)


def item_means(values: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the tokens that count ``(items,)``.

    Args:
        values: One value per token ``(items, tokens)``, or per item ``(items,)``, which stay.
        batch: Arguments of the model, with or without a mask.
    """
    if values.ndim == 1:
        return values
    mask = token_mask(batch, values)
    return (values * mask).sum(dim=1) / mask.sum(dim=1)


def _picked(values: torch.Tensor | list[Any], numbers: list[int]) -> torch.Tensor | list[Any]:
    return [values[number] for number in numbers] if isinstance(values, list) else values[numbers]


def _as_input(name: str, values: Any, where: str) -> torch.Tensor | list[torch.Tensor]:
    """Make a tensor of arrays of one shape, or a list of tensors of sequences."""
    import torch

    if isinstance(values, np.ndarray) and values.dtype == object:
        # Frames of recordings come in different numbers too.
        axes = (1, 2) if name == "input_features" else (1,)
        if any(np.ndim(row) not in axes or not len(row) for row in values):
            raise InputError(
                f"{where}: column of {name}: expected arrays of one shape, or sequences that are "
                "not empty"
            )
        kind = np.float32 if any(np.asarray(row).dtype.kind == "f" for row in values) else np.int64
        return [torch.from_numpy(np.array(row, kind)) for row in values]
    array = np.asarray(values)
    if 0 in array.shape:
        raise InputError(
            f"{where}: column of {name}: expected items that are not empty, received shape "
            f"{array.shape}"
        )
    if array.dtype.kind == "f" or name == "pixel_values":
        tensor = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        # (items, height, width): the channel axis is implied
        return tensor[:, None] if name == "pixel_values" and tensor.ndim == 3 else tensor
    return torch.from_numpy(np.ascontiguousarray(array, np.int64))
