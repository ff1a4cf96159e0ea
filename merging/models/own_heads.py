"""Models of experts that have heads of their own, around one set of shared weights.

What reads the answers of experts (operators with calibration items) runs each task's items through
the model of its expert. All models have the same parameters outside their heads, so that a weight
that is written, or a gradient that is added up, is that of all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.models.loading import widest_dtype
from mergesearch.merging.models.parameter_views import StoredTensors, parameter_views
from mergesearch.merging.models.task_heads import Logits, OwnHead, Tasks
from mergesearch.merging.models.whole_model import WholeModel, below

#: id of a tensor of a model -> what takes its place.
Tensors = dict[int, torch.Tensor]


class OwnHeads:
    """Answers by the models of experts, each on the items of its task.

    Args:
        models: Expert -> its model; all have one memory outside their heads.

    Attributes:
        private: Names of the tensors of heads.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.models = models
        self.private = _private(models.values())

    def answer(self, model: Any, inputs: Mapping[str, torch.Tensor], tasks: Tasks) -> Any:
        """The output of the model of the expert whose task it is, or the logits of several.

        Raises:
            InputError: If there is no such expert.
        """
        named = [] if tasks is None else [tasks] if isinstance(tasks, str) else [*tasks]
        odd = next((name for name in named if name not in self.models), None)
        if odd is not None or not named:
            raise InputError(
                f"tasks: expected one of {', '.join(self.models)} for the items, or one for each, "
                f"received {'none' if odd is None else repr(odd)}"
            )
        if len({*named}) == 1:
            return self.models[named[0]](**inputs)
        return Logits(self._by_task(inputs, np.array(named)))

    def _by_task(self, inputs: Mapping[str, torch.Tensor], tasks: Any) -> torch.Tensor:
        """Logits of the items of several tasks; minus infinity for classes that a task lacks."""
        parts = []
        for name in np.unique(tasks).tolist():
            rows = torch.from_numpy(np.flatnonzero(tasks == name))
            own = {key: value[rows.to(value.device)] for key, value in inputs.items()}
            parts.append((rows, self.models[name](**own).logits))
        most = max(part.shape[1] for _, part in parts)
        first = parts[0][1]
        logits: torch.Tensor = first.new_full((len(tasks), most), float("-inf"))
        for rows, part in parts:
            logits[rows.to(logits.device), : part.shape[1]] = part
        return logits

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move or cast all models but the first, to which that was done; they share it again."""
        first, *others = self.models.values()
        kept = first.state_dict(keep_vars=True)
        for model in others:
            model._apply(change)  # type: ignore[no-untyped-call]
            own = model.state_dict(keep_vars=True)
            _replace(model, {id(own[n]): kept[n] for n in own if n not in self.private})

    def features(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a model without its head makes of every item."""
        return OwnHead().features(model, inputs)


def _private(models: Collection[nn.Module]) -> frozenset[str]:
    """Names of the parameters and buffers that are not those of every model."""
    states = [
        {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} for model in models
    ]
    names = {name for state in states for name in state}
    return frozenset(name for name in names if len({state.get(name) for state in states}) > 1)


def models_around(
    base: object,
    wholes: Mapping[str, WholeModel],
    load: Callable[[str, str], nn.Module],
    names: Collection[str],
) -> dict[str, nn.Module]:
    """The models of experts, which have the parameters of the first outside their heads.

    Everything that is neither merged nor of a head is the base's. Heads ask for no gradient.

    Args:
        base: As operators see it.
        wholes: Of the experts.
        load: Gives the model of a path in a dtype, where it is to run.
        names: Shared tensors that are merged.

    Raises:
        CheckpointError: If a model cannot be loaded, or keeps a shared tensor in another layout.
    """
    carried = below(base, "carried") or ()
    merged = below(base, "merged") or {}
    dtype = str(widest_dtype(own for _, own in merged.values())).removeprefix("torch.")
    models: dict[str, nn.Module] = {}
    for expert, whole in wholes.items():
        model = load(whole.path, dtype).requires_grad_(False)
        take_carried(model, base, carried, whole)
        if models:
            first = next(iter(models))
            _share(models[first], wholes[first], model, whole, names)
        models[expert] = model
    return models


def take_carried(model: nn.Module, base: Any, carried: Iterable[str], whole: WholeModel) -> None:
    """Copy what a merge takes from the base into a model that was loaded from an expert."""
    stored = StoredTensors.of(model).by_name
    with torch.no_grad():
        for name in carried:
            target = None if name in whole.names else stored.get(whole.stored_name(name))
            if target is not None and tuple(target.shape) == base.shape(name):
                target.copy_(base.read(name))


def _share(
    first: nn.Module,
    one: WholeModel,
    model: nn.Module,
    whole: WholeModel,
    names: Collection[str],
) -> None:
    """Put the first model's parameters and buffers in the place of another's."""
    views = parameter_views(first)
    others = parameter_views(model)
    kept = first.state_dict(keep_vars=True)
    replaced = model.state_dict(keep_vars=True)
    shared: Tensors = {}
    for name in names:
        ours = views.get(one.stored_name(name))
        theirs = others.get(whole.stored_name(name))
        if ours is None or theirs is None:
            continue  # refused where the first model is asked for it, or an empty tensor
        if (ours.shape, ours.stride, ours.offset) != (theirs.shape, theirs.stride, theirs.offset):
            raise CheckpointError(
                f"{whole.path}: tensor {name!r}: expected it to lie in {type(model).__name__} as "
                f"in {type(first).__name__}, received another layout; give both one architecture"
            )
        shared[id(replaced[theirs.parameter])] = kept[ours.parameter]
    _replace(model, shared)


def share_alike(first: nn.Module, model: nn.Module, own: Collection[str]) -> None:
    """Put the first model's tensors in the place of another's of the same class.

    Args:
        first: Keeps all of its own.
        model: Keeps its head.
        own: Stored names of the tensors of that.
    """
    views = parameter_views(model)
    private = {views[name].parameter for name in own if name in views}
    kept = first.state_dict(keep_vars=True)
    replaced = model.state_dict(keep_vars=True)
    names = [name for name in replaced if name not in private and name in kept]
    _replace(model, {id(replaced[name]): kept[name] for name in names})


def _replace(model: nn.Module, shared: Tensors) -> None:
    """Replace parameters and buffers, wherever they stand in a model."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None and id(tensor) in shared:
                    store[key] = shared[id(tensor)]  # type: ignore[assignment]
