"""The model that data operators run: experts take turns in it, on some items of their tasks.

In recipes it is plain data (:class:`CalibrationSpec`): a ``datasets`` folder, the auto class of the
model, and which columns the model is called with. Users of the library may hand over a model and
batches (:class:`Calibration`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any, cast

from mergesearch.merging.errors import CheckpointError, InputError, RecipeError
from mergesearch.merging.models.calibration_items import (
    Items,
    items_digest,
    items_of,
    read_items,
)
from mergesearch.merging.models.calibration_prompts import KEYS, class_names, heads_of
from mergesearch.merging.models.calibration_spec import Calibration, CalibrationSpec
from mergesearch.merging.models.prompt_heads import reads_text, same_tensors
from mergesearch.merging.models.task_heads import OwnHead, TaskHead
from mergesearch.merging.models.whole_model import WholeModel, whole_models
from mergesearch.merging.tensors.owned import has_owners

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.models.parameter_views import ParameterView
    from mergesearch.merging.tensors.source import TensorSource


@dataclass(frozen=True, eq=False)
class ExpertRunner:
    """A model in which experts take turns, and the items that it is run on.

    Both are loaded when they are first needed.

    Attributes:
        calibration: As in the recipe, or in memory.
        origin: The base as the operator sees it.
        experts: All experts that are merged: where all have the base's text tower, heads of class
            prompts are fixed.
        own_heads: Whether experts that have heads of their own answer by these; else the base's
            model is run, which is enough where answers are not read.
    """

    calibration: CalibrationSpec | Calibration
    origin: TensorSource
    experts: Sequence[TensorSource] = ()
    own_heads: bool = False

    @cached_property
    def base(self) -> TensorSource:
        """The base with all its tensors: running statistics, too, are needed to run a model."""
        from mergesearch.merging.tensors.source import FilteredSource

        return self.origin.origin if isinstance(self.origin, FilteredSource) else self.origin

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode, without a cache of keys and values.

        Raises:
            InputError: If it cannot be loaded, or lacks a tensor of the base.
        """
        return self._model_and_head[0]

    @cached_property
    def _model_and_head(self) -> tuple[nn.Module, TaskHead]:
        """The model, and what answers by it.

        Fixed heads are made here, from the base: hooks of a later run must not see their texts.
        """
        import copy

        if isinstance(self.calibration, Calibration):
            model = copy.deepcopy(self.calibration.model).eval()
            head = self.calibration.head or OwnHead()
        elif self._wholes:
            model, head = self._expert_models(self.calibration)
        else:
            model = _loaded(self.calibration, self.base)
            head = OwnHead()
            if "prompts" in self.calibration:
                heads = heads_of(self.calibration, self.base, model)
                head = heads.fixed_by(model) if self.has_fixed_texts else heads
        _switch_cache_off(model)
        return model.requires_grad_(), head

    @cached_property
    def _wholes(self) -> Mapping[str, WholeModel]:
        """Expert -> the model with the head by which it answers, where that is its own."""
        return whole_models(self.experts) if self.own_heads else {}

    def _expert_models(self, spec: CalibrationSpec) -> tuple[nn.Module, TaskHead]:
        """The first expert's model, and all of them, which share its parameters."""
        from mergesearch.merging.models.loading import load_model
        from mergesearch.merging.models.own_heads import OwnHeads, models_around

        def load(path: str, dtype: str) -> nn.Module:
            return _moved(load_model(path, spec["model_class"], dtype), spec["device"])

        models = models_around(self.base, self._wholes, load, self.base.names)
        for model in models.values():
            _switch_cache_off(model)
        return next(iter(models.values())), OwnHeads(models)

    @cached_property
    def has_fixed_texts(self) -> bool:
        """Whether all experts have the base's text tower, bit for bit."""
        names = [name for name in self.base.names if reads_text(name)]
        return bool(self.experts) and same_tensors(self.base, self.experts, names)

    @cached_property
    def views(self) -> Mapping[str, ParameterView]:
        """Where the merged tensors lie in the model; empty ones are left out.

        Raises:
            CheckpointError: If one is not there.
        """
        from mergesearch.merging.models.parameter_views import parameter_views

        found = parameter_views(self.model, as_saved=not isinstance(self.calibration, Calibration))
        first = next(iter(self._wholes.values()), None)
        own = {} if first is None else first.renamed
        views = {n: found[own.get(n, n)] for n in self.base.names if own.get(n, n) in found}
        for name in self.base.names:
            shape = self.base.shape(name)
            if 0 not in shape and (name not in views or views[name].shape != shape):
                raise CheckpointError(
                    f"calibration: tensor {name!r}: expected a parameter of "
                    f"{type(self.model).__name__} of shape {list(shape)}, found none; give the "
                    "model that the checkpoints were trained with"
                )
        return views

    def load_all(self, source: TensorSource, names: Iterable[str] | None = None) -> None:
        """Copy tensors of ``source`` into the model, by default all."""
        for name in self.views if names is None else names:
            self.load_one(name, source.read(name))

    def load_one(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one tensor into the model, rounded to its dtype."""
        import torch

        view = self.views[name]
        with torch.no_grad():
            view.of(self.tensors[view.parameter]).copy_(tensor)

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Parameters and buffers of the model by name."""
        return dict(self.model.state_dict(keep_vars=True))

    def run(self, items: Items) -> Any:
        """The output of the model, which may be of any type, or the logits of its head."""
        like = next(self.model.parameters())
        inputs = {
            name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in items.inputs.items()
        }
        return self._model_and_head[1].answer(self.model, inputs, items.task)

    def items(self, expert: str) -> list[Items]:
        """The batches of an expert, which are of the task of its name.

        Raises:
            InputError: If there are none, or they cannot be stacked.
        """
        return [replace(items, task=expert) for items in self._of_expert(expert)]

    def _of_expert(self, expert: str) -> list[Items]:
        if not isinstance(self.calibration, Calibration):
            # Experts share a folder, unless it says which items are whose.
            own = expert if "domain" in self.calibration else ""
            return self._read(_of_expert(self.calibration["data"], expert), own)
        batches = _of_expert(self.calibration.batches, expert)
        if not batches:
            raise InputError(f"calibration: expected batches for expert {expert!r}, received none")
        return [items_of(batch, self.calibration.label) for batch in batches]

    def key(self, what: Sequence[Any], experts: Iterable[str]) -> list[Any] | None:
        """A memo key: ``what``, and all else that results depend on besides weights.

        None for a model in memory, which has no identity.
        """
        if isinstance(self.calibration, Calibration):
            return None
        digests = [items_digest(self._of_expert(expert)) for expert in experts]
        return [*what, self._settings(self.calibration), digests]

    def _settings(self, given: CalibrationSpec) -> dict[str, Any]:
        """What results depend on besides weights and items; keys of prompts only if there are."""
        spec = cast(Mapping[str, Any], given)
        settings = {key: spec[key] for key in ("model_class", "batch_size", "device")}
        if "prompts" not in spec:
            return settings
        texts = {key: spec[key] for key in KEYS if key in spec}
        fixed = {"classes": class_names(spec), "fixed": self.has_fixed_texts}
        return settings | texts | fixed

    @cached_property
    def _read(self) -> Callable[[str, str], list[Items]]:
        return cache(partial(read_items, cast(CalibrationSpec, self.calibration)))


def unpadded(tensor: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The vectors of ``tensor`` ``(items, ..., n)`` as ``(vectors, n)``, without padding.

    Padding is what ``attention_mask``, if it is among the inputs, says.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and tensor.ndim == 3 and tensor.shape[:2] == mask.shape:
        return tensor[mask.to(tensor.device).bool()]
    return tensor.reshape(-1, tensor.shape[-1])


def answers(output: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a model's output as ``(answers, classes)``, in fp32 or wider.

    There is an answer for each item, or for each token that is not padding.

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
            f"{received}; choose a model that classifies"
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
    from mergesearch.merging.models.loading import load_model, model_of

    path = getattr(base, "path", None)
    if has_owners(base):
        return _moved(model_of(cast(Any, base), spec["model_class"]), spec["device"])
    if not isinstance(path, str):
        raise RecipeError(
            "calibration: expected a Calibration with a model for weights in memory, received the "
            "plain form, which loads the base from its folder"
        )
    return _moved(load_model(path, spec["model_class"]), spec["device"])


def _moved(model: nn.Module, device: str) -> nn.Module:
    """The model on a device.

    Raises:
        InputError: If this host has no such device.
    """
    import torch

    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch raises either for a missing device
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"calibration.device: expected a device of this host, received: {reason}"
        ) from error


def _switch_cache_off(model: nn.Module) -> None:
    settings = getattr(getattr(model, "config", None), "get_text_config", None)
    if settings is not None:
        settings().use_cache = False
