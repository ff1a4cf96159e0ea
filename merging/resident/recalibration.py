"""Running statistics recomputed on data after a merge, in a search and in an export alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.checkpoints.safetensors_writer import write_tensor
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.models.calibration_spec import DEFAULTS, CalibrationSpec
from mergesearch.merging.models.expert_runner import ExpertRunner

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, eq=False)
class Recalibration:
    """Items on which the statistics of merged models are recomputed.

    Attributes:
        batches: Keyword arguments of the model, batch by batch.
        model_class: The ``transformers`` auto class that loads the model.
    """

    batches: tuple[Mapping[str, torch.Tensor], ...]
    model_class: str

    def apply(self, model: nn.Module) -> None:
        """Recompute all running statistics of ``model``.

        On one thread, for the same bits in a search and in an export.
        """
        from mergesearch.merging.models.batch_norm import recalibrate
        from mergesearch.merging.tensors.parallel import run_single_threaded

        like = next(model.parameters())
        batches = (
            {
                n: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype)
                for n, t in batch.items()
            }
            for batch in self.batches
        )
        run_single_threaded(lambda: recalibrate(model, batches))

    def apply_to_folder(
        self, folder: Path, written: Mapping[str, TensorInfo], statistics: frozenset[str]
    ) -> None:
        """Recompute the statistics of an exported model and write them to its files."""
        from mergesearch.merging.models.loading import load_model
        from mergesearch.merging.models.parameter_views import parameter_views

        model = load_model(str(folder), self.model_class)
        self.apply(model)
        views = parameter_views(model)
        tensors = model.state_dict()
        for name in sorted(statistics):
            tensor = views[name].of(tensors[views[name].parameter])
            write_tensor(written[name], tensor.to(_dtype_of(written[name])))


def _dtype_of(info: TensorInfo) -> torch.dtype:
    """The dtype in which a tensor is stored."""
    import torch

    dtype: torch.dtype = getattr(torch, info.dtype)
    return dtype


def open_recalibration(family: ModelFamily) -> Recalibration | None:
    """The items of a family's policy, if it has one: those of all experts, one after the other.

    Raises:
        InputError: If they cannot be read.
    """
    given = family.calibration
    if given is None:
        return None
    spec: CalibrationSpec = {**DEFAULTS, **given}  # type: ignore[typeddict-item]
    runner = ExpertRunner(spec, family.base)
    # One folder for all experts is read once.
    names = (
        [e.name for e in family.experts]
        if isinstance(given["data"], Mapping)
        else [family.experts[0].name]
    )
    batches = tuple(items.inputs for name in names for items in runner.items(name))
    return Recalibration(batches, spec["model_class"])
