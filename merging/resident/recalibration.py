"""Running statistics recomputed on data after a merge, in a search and in an export alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.checkpoints.safetensors_writer import write_tensor
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.family.special_tensors import running_statistics
from mergesearch.merging.models.calibration_spec import DEFAULTS, CalibrationSpec
from mergesearch.merging.models.expert_runner import ExpertRunner

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, eq=False)
class Recalibration:
    """Items on which the statistics of merged models are recomputed.

    Where experts keep heads of their own, statistics of the shared part are those of all models:
    nothing before a head depends on it, so that any of them may be run.

    Attributes:
        batches: Keyword arguments of the model, batch by batch.
        model_class: The ``transformers`` auto class that loads the model.
        kept: Stored names of statistics that heads have for themselves.
    """

    batches: tuple[Mapping[str, torch.Tensor], ...]
    model_class: str
    kept: frozenset[str] = frozenset()

    def apply(self, model: nn.Module) -> None:
        """Recompute the running statistics of ``model`` that are merged.

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
        kept = self._kept_modules(model)
        run_single_threaded(lambda: recalibrate(model, batches, kept))

    def apply_to_folder(
        self,
        folder: str,
        written: Mapping[str, TensorInfo],
        statistics: frozenset[str],
        renamed: Mapping[str, str],
    ) -> None:
        """Recompute the statistics of an exported model and write them to its files.

        Args:
            folder: Of the model that is run.
            written: Name of a tensor -> where it is written.
            statistics: Names of the statistics.
            renamed: Name -> the name in ``folder``, where that is another.
        """
        from mergesearch.merging.models.loading import load_model
        from mergesearch.merging.models.parameter_views import name_in_class, parameter_views

        model = load_model(folder, self.model_class)
        self.apply(model)
        views = parameter_views(model)
        tensors = model.state_dict()
        for name in sorted(statistics):
            view = views[name_in_class(model, views, renamed.get(name, name))]
            tensor = view.of(tensors[view.parameter])
            write_tensor(written[name], tensor.to(_dtype_of(written[name])))

    def _kept_modules(self, model: nn.Module) -> set[str]:
        """Modules of a head that have statistics."""
        from mergesearch.merging.models.parameter_views import parameter_views

        if not self.kept:
            return set()
        views = parameter_views(model)
        buffers = (views[name].parameter for name in self.kept if name in views)
        return {buffer.rpartition(".")[0] for buffer in buffers}


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
    # One folder for all experts is read once, unless it says which items are whose.
    apart = isinstance(given["data"], Mapping) or "domain" in given
    names = [expert.name for expert in (family.experts if apart else family.experts[:1])]
    batches = tuple(items.inputs for name in names for items in runner.items(name))
    own = frozenset[str]() if family.heads is None else family.heads.names
    return Recalibration(batches, spec["model_class"], frozenset(running_statistics(own)))
