"""The model whose units are moved: loaded once, and run with the weights of base and expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from mergesearch.merging.alignment.groups import Groups, groups_of
from mergesearch.merging.alignment.junctions import Weights, flows_of, input_places
from mergesearch.merging.alignment.kept_groups import FORMAT, from_tensors, to_tensors
from mergesearch.merging.alignment.moving import Moves, moved
from mergesearch.merging.alignment.probing import Prober, proven
from mergesearch.merging.alignment.tracing import FeatureReader, Place, answers, trace
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.errors import CheckpointError
from mergesearch.merging.foreign.shown import path_shown
from mergesearch.merging.models.calibration_items import read_items
from mergesearch.merging.models.calibration_spec import DEFAULTS, CalibrationSpec, file_versions
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.models.model_classes import auto_classes
from mergesearch.merging.models.parameter_views import ParameterView, parameter_views

Inputs = Mapping[str, torch.Tensor]
#: Items and tokens of the inputs that groups are found with.
ITEMS = 2
TOKENS = 7


@dataclass(frozen=True, eq=False)
class Subject:
    """A base and the model that runs its weights, and those of experts, in single precision.

    Attributes:
        base: The base as it is stored.
        calibration: Items to compare activations on, if there are any.
        seed: Of the moves by which groups are tried.
    """

    base: Checkpoint
    calibration: Mapping[str, Any] | None = None
    seed: int = 0

    @cached_property
    def model(self) -> nn.Module:
        """The model of the base, whose attention is made of single operations.

        Raises:
            CheckpointError: If it cannot be loaded.
        """
        from transformers import PreTrainedModel

        name = (
            auto_classes(self.base.config)[0]
            if self.calibration is None
            else self.calibration["model_class"]
        )
        model = load_model(self.base.path, name, "float32")
        if isinstance(model, PreTrainedModel):
            model.set_attn_implementation("eager")
        text = getattr(getattr(model, "config", None), "get_text_config", None)
        if text is not None:
            text().use_cache = False
        return model.requires_grad_(False)

    def release(self) -> None:
        """Let go of the model; what was found with it stays."""
        for name in ("model", "views", "parameters"):
            self.__dict__.pop(name, None)

    @cached_property
    def views(self) -> Mapping[str, ParameterView]:
        """Where stored tensors lie in the model."""
        return parameter_views(self.model)

    @cached_property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        """Parameters and buffers of the model by name."""
        return dict(self.model.state_dict(keep_vars=True))

    @cached_property
    def groups(self) -> Groups:
        """The groups of the model, tried on it, or as they were found before."""
        memo = self.base.memo
        if memo is None:
            return self._found()
        import transformers

        key = [
            "groups",
            FORMAT,
            torch.__version__,
            transformers.__version__,
            self.base.identity,
            self.calibration,
            file_versions({"calibration": {**DEFAULTS, **(self.calibration or {})}})
            if self.calibration
            else [],
            self.seed,
        ]
        return from_tensors(memo.get(key, lambda: to_tensors(self._found())))

    def _found(self) -> Groups:
        traced = trace(self.model, self.inputs)
        candidates, to_leaves = groups_of(traced, self._whole)
        inputs = input_places(self.model, self._whole)
        stored = {own: name for name, own in self._whole.items()}
        weights = Weights(stored, candidates.tensors, inputs)
        flows = flows_of(traced, candidates, to_leaves, weights)
        candidates = replace(candidates, flows=flows, inputs=inputs)
        self.load(self.base)
        expected = self.answer()
        prober = Prober(self._answer_moved, expected, np.random.default_rng(self.seed))
        found = proven(candidates, prober)
        self.load(self.base)
        return found

    @cached_property
    def _whole(self) -> dict[str, str]:
        """Stored name -> parameter, where a stored tensor is all of one."""
        return {
            name: view.parameter
            for name, view in self.views.items()
            if name in self.base.tensors
            and view.shape == tuple(self.parameters[view.parameter].shape)
            and self.base.tensors[name].shape == view.shape
        }

    def load(self, source: Any, groups: Groups | None = None, moves: Moves | None = None) -> None:
        """Copy the weights of a source into the model, moved if moves are given."""
        for name, view in self.views.items():
            if name not in source.tensors:
                continue
            tensor = source.read(name)
            if groups is not None and moves is not None and name in groups.tensors:
                tensor = moved(tensor, groups.tensors[name], groups, moves, name)
            place = view.of(self.parameters[view.parameter])
            if place.shape == tensor.shape:
                place.copy_(tensor)

    def answer(self, inputs: Inputs | None = None) -> list[torch.Tensor]:
        """What the model answers."""
        with torch.no_grad():
            return answers(self.model(**(inputs or self.inputs)))

    def _answer_moved(self, groups: Groups, moves: Moves) -> list[torch.Tensor]:
        self.load(self.base, groups, moves)
        return self.answer()

    def features(
        self, source: Any, places: Sequence[Place], batches: Sequence[Inputs]
    ) -> Iterator[dict[Place, torch.Tensor]]:
        """Activations of a source at some places, batch by batch."""
        self.load(source)
        for inputs in batches:
            taken: dict[Place, torch.Tensor] = {}
            with FeatureReader(places, taken.__setitem__):
                self.answer(inputs)
            yield taken

    def batches(self, expert: str) -> list[Inputs]:
        """The items on which base and expert are compared, those of all folders.

        Args:
            expert: Its name, which is that of its domain where the calibration has some.

        Raises:
            CheckpointError: If there are none.
        """
        if self.calibration is None:
            raise CheckpointError(
                f"{path_shown(self.base.path)}: expected calibration items, received none"
            )
        spec = cast(CalibrationSpec, {**DEFAULTS, **self.calibration})
        data = spec["data"]
        folders = [data] if isinstance(data, str) else [data[key] for key in sorted(data)]
        own = expert if "domain" in spec else ""
        return [
            items.inputs
            for folder in dict.fromkeys(folders)
            for items in read_items(spec, folder, own)
        ]

    @cached_property
    def inputs(self) -> Inputs:
        """A few made-up items, or the first of the calibration."""
        if self.calibration is None or "domain" in self.calibration:
            return made_up(self.model, self.seed)
        return {name: tensor[:ITEMS] for name, tensor in self.batches("")[0].items()}


def made_up(model: nn.Module, seed: int, count: int = ITEMS) -> Inputs:
    """Random items that a model of transformers accepts.

    Args:
        model: What they are for.
        seed: Of the generator.
        count: Number of items.

    Raises:
        CheckpointError: If it takes neither tokens nor images.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    names = {*signature(model.forward).parameters}
    found: dict[str, torch.Tensor] = {}
    if "pixel_values" in names:
        vision = getattr(config, "vision_config", config)
        channels = getattr(vision, "num_channels", 3)
        size = getattr(vision, "image_size", 64)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        found["pixel_values"] = torch.randn(count, channels, *sides, generator=generator)
    if "input_ids" in names:
        text = config.get_text_config()
        high = min(text.vocab_size, 1000)
        found["input_ids"] = torch.randint(high // 2, high, (count, TOKENS), generator=generator)
        if getattr(config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = found["input_ids"].flip(1)
    if not found:
        raise CheckpointError(
            f"alignment: expected a model of tokens or images, received {type(model).__name__}; "
            "give it items in align.calibration"
        )
    return found
