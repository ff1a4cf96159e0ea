"""What data operators run: a model in which the experts take turns, and for each expert some items
of its task.

In recipes it is plain data (:class:`CalibrationSpec`): a ``datasets`` folder, the auto class of the
model, and which columns the model is called with. Users of the library may hand over a model and
batches (:class:`Calibration`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mergesearch.merging.errors import CheckpointError, InputError, RecipeError
from mergesearch.merging.models.calibration_spec import Calibration, CalibrationSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.models.parameter_views import ParameterView
    from mergesearch.merging.tensors.source import TensorSource


@dataclass(frozen=True, eq=False)
class Items:
    """A batch.

    Attributes:
        inputs: Keyword arguments of the model, each ``(items, ...)``.
        labels: Class numbers ``(items,)``, or None.
    """

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor | None = None

    def one_by_one(self) -> Iterator[Items]:
        """The same items as batches of one."""
        count = len(next(iter(self.inputs.values())))
        for place in range(count):
            part = slice(place, place + 1)
            labels = None if self.labels is None else self.labels[part]
            yield Items({name: tensor[part] for name, tensor in self.inputs.items()}, labels)


@dataclass(frozen=True, eq=False)
class ExpertRunner:
    """A model in which experts take turns, and the items that it is run on; both are loaded when
    first needed.

    Attributes:
        calibration: As in the recipe, or in memory.
        origin: The base as the operator sees it.
    """

    calibration: CalibrationSpec | Calibration
    origin: TensorSource

    @cached_property
    def base(self) -> TensorSource:
        """The base with all its tensors: running statistics, too, are needed to run a model."""
        from mergesearch.merging.tensors.source import FilteredSource

        return self.origin.origin if isinstance(self.origin, FilteredSource) else self.origin

    @cached_property
    def model(self) -> nn.Module:
        """The model, in evaluation mode, without a cache of keys and values.

        Raises:
            InputError: If it cannot be loaded, or lacks a tensor of the base.
        """
        import copy

        if isinstance(self.calibration, Calibration):
            model = copy.deepcopy(self.calibration.model).eval()
        else:
            model = _loaded(self.calibration, self.base)
        _switch_cache_off(model)
        return model.requires_grad_()

    @cached_property
    def places(self) -> Mapping[str, ParameterView]:
        """Where the merged tensors lie in the model; empty ones have no place.

        Raises:
            CheckpointError: If one is not there.
        """
        from mergesearch.merging.models.parameter_views import parameter_views

        places = parameter_views(self.model, as_saved=not isinstance(self.calibration, Calibration))
        for name in self.base.names:
            shape = self.base.shape(name)
            if 0 not in shape and (name not in places or places[name].shape != shape):
                raise CheckpointError(
                    f"calibration: tensor {name!r}: expected a parameter of "
                    f"{type(self.model).__name__} of shape "
                    f"{list(shape)}, found none; give the model that the checkpoints were trained "
                    "with"
                )
        return {name: places[name] for name in self.base.names if name in places}

    def load_all(self, source: TensorSource, names: Iterable[str] | None = None) -> None:
        """Copy tensors of ``source`` into the model, by default all."""
        for name in self.places if names is None else names:
            self.load_one(name, source.read(name))

    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one tensor into the model, rounded to its dtype."""
        import torch

        place = self.places[name]
        with torch.no_grad():
            place.of(self.tensors[place.parameter]).copy_(tensor)

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Parameters and buffers of the model by name."""
        return dict(self.model.state_dict(keep_vars=True))

    def run(self, items: Items) -> Any:
        """What the model answers."""
        like = next(self.model.parameters())
        inputs = {
            name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in items.inputs.items()
        }
        return self.model(**inputs)

    def items(self, expert: str) -> list[Items]:
        """The batches of an expert.

        Raises:
            InputError: If there are none, or they cannot be stacked.
        """
        if not isinstance(self.calibration, Calibration):
            return self._read(_of_expert(self.calibration["data"], expert))
        batches = _of_expert(self.calibration.batches, expert)
        if not batches:
            raise InputError(f"calibration: expected batches for expert {expert!r}, received none")
        return [_as_items(batch, self.calibration.label) for batch in batches]

    def key(self, what: Sequence[Any], experts: Iterable[str]) -> list[Any] | None:
        """``what`` and all else that results depend on besides weights; None for a model in memory,
        it has no name.
        """
        if isinstance(self.calibration, Calibration):
            return None
        paths = [_of_expert(self.calibration["data"], expert) for expert in experts]
        settings = {key: self.calibration[key] for key in ("model_class", "batch_size", "device")}
        return [*what, settings, [_digest(self._read(path)) for path in paths]]

    @cached_property
    def _read(self) -> Callable[[str], list[Items]]:
        return cache(partial(_read_items, cast(CalibrationSpec, self.calibration)))


def unpadded(tensor: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The vectors of ``tensor`` ``(items, ..., n)`` as ``(vectors, n)``, without those that the
    mask calls padding.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and tensor.ndim == 3 and tensor.shape[:2] == mask.shape:
        return tensor[mask.to(tensor.device).bool()]
    return tensor.reshape(-1, tensor.shape[-1])


def answers(output: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a model's output as ``(answers, classes)``, in fp32 or wider: one per item, or
    per token.

    Raises:
        InputError: If the output has none, or of another shape.
    """
    import torch

    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3):
        received = (
            f"shape {list(logits.shape)}"
            if isinstance(logits, torch.Tensor)
            else type(output).__name__
        )
        raise InputError(
            "calibration: expected logits (items, classes) or (items, tokens, classes), received "
            f"{received}; "
            "choose a model that classifies"
        )
    return unpadded(logits, inputs).to(torch.promote_types(logits.dtype, torch.float32))


def _of_expert(values: Any, expert: str) -> Any:
    """The entry of an expert, where values go by expert."""
    if not isinstance(values, Mapping):
        return values
    if expert not in values:
        raise RecipeError(
            f"calibration: expected an entry for expert {expert!r}, received {sorted(values)}"
        )
    return values[expert]


def _loaded(spec: CalibrationSpec, base: TensorSource) -> nn.Module:
    import torch

    from mergesearch.merging.models.loading import load_model

    path = getattr(base, "path", None)
    if not isinstance(path, str):
        raise RecipeError(
            "calibration: expected a Calibration with a model for weights in memory, received the "
            "plain form, "
            "which loads the base from its folder"
        )
    model = load_model(path, spec["model_class"])
    try:
        return model.to(torch.device(spec["device"]))
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # torch raises either for a device that is not there
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"calibration.device: expected a device of this host, received: {reason}"
        ) from error


def _switch_cache_off(model: nn.Module) -> None:
    settings = getattr(getattr(model, "config", None), "get_text_config", None)
    if settings is not None:
        settings().use_cache = False


def _read_items(spec: CalibrationSpec, folder: str) -> list[Items]:
    """The first ``samples`` items of a folder in the order that the seed gives."""
    import numpy as np
    from datasets import load_from_disk

    label = spec["label"]
    columns = {*spec["inputs"].values(), *([] if label is None else [label])}
    path = Path(folder).expanduser() / spec["split"]
    dataset = load_from_disk(str(path)).with_format("numpy", columns=sorted(columns))
    chosen = np.random.default_rng(spec["seed"]).permutation(len(dataset))[: spec["samples"]]
    if not len(chosen):
        raise InputError(f"calibration.data: {path}: expected items, received an empty split")
    values = dataset[chosen.tolist()]
    inputs = {
        name: _as_input(name, values[column], path) for name, column in spec["inputs"].items()
    }
    labels = None if label is None else _as_input("label", values[label], path)
    return [
        Items(
            {name: tensor[start : start + spec["batch_size"]] for name, tensor in inputs.items()},
            None if labels is None else labels[start : start + spec["batch_size"]],
        )
        for start in range(0, len(chosen), spec["batch_size"])
    ]


def _as_input(name: str, values: Any, path: Path) -> torch.Tensor:
    import numpy as np
    import torch

    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"calibration.inputs.{name}: {path}: expected arrays of numbers of one shape, received "
            f"{array.dtype}; "
            "pad or crop the items"
        )
    if name != "pixel_values" and array.dtype.kind != "f":
        return torch.from_numpy(array.astype(np.int64))
    pixels = torch.from_numpy(array.astype(np.float32))
    # (items, height, width): the channel axis is implied
    return pixels[:, None] if name == "pixel_values" and pixels.ndim == 3 else pixels


def _as_items(batch: Mapping[str, torch.Tensor], label: str | None) -> Items:
    if not isinstance(batch, Mapping) or (label is not None and label not in batch):
        wanted = (
            "keyword arguments of the model"
            if label is None
            else f"keyword arguments of the model and {label!r}"
        )
        raise InputError(
            f"calibration: expected batches of {wanted}, received {type(batch).__name__}"
        )
    inputs = {name: tensor for name, tensor in batch.items() if name != label}
    return Items(inputs, None if label is None else batch[label])


def _digest(batches: Sequence[Items]) -> str:
    digest = hashlib.sha256()
    for items in batches:
        tensors = dict(items.inputs) if items.labels is None else {**items.inputs, "": items.labels}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
