"""What a merge changes, sorted by how an adapter of its base can hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergesearch.merging.errors import InputError
from mergesearch.merging.export.adapter_format.files import Adapter
from mergesearch.merging.export.adapter_format.low_rank import (
    LowRankChange,
    approximated,
    cut,
    joined,
)
from mergesearch.merging.export.adapter_format.modules import AdaptedModule, ModelModules
from mergesearch.merging.family.aligned import Aligned, stored_behind
from mergesearch.merging.family.family import ModelFamily
from mergesearch.merging.family.messages import listed
from mergesearch.merging.in_memory import PreparedMerge, merge_tensor, merge_wide
from mergesearch.merging.kernels.lowrank import matrix_shape
from mergesearch.merging.tensors.layout import TensorSpec
from mergesearch.merging.tensors.parallel import parallel_map

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class HeldChanges:
    """A merge as an adapter, and what that lacks.

    Attributes:
        adapter: What can be held.
        errors: Tensor that is changed by factors -> share of its change that is missing.
        lost: Tensor that cannot be held -> size of its change relative to the base.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    lost: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class MergeChanges:
    """The changes of a merge, tensor by tensor.

    Attributes:
        family: Base and experts.
        written: The same with the head that the model gets.
        merge: What merges a tensor.
        modules: Of the model.
        rank: Greatest rank of a change; None where nothing may be lost.
    """

    family: ModelFamily
    written: ModelFamily
    merge: PreparedMerge
    modules: ModelModules
    rank: int | None

    def held(self, lossy: bool, threads: int) -> HeldChanges:
        """What an adapter can hold.

        What it cannot is looked at first, so that a refusal comes before the work.

        Raises:
            InputError: If there is a change that it cannot hold, unless ``lossy``.
        """
        specs = [spec for spec in self.family.layout.tensors if spec.size]
        saved = self._saved_modules(specs)
        whole = {name for module in saved for name in self.modules.tensors_of(module)}
        places = {
            spec.name: self.modules.adapted(spec.name, spec.shape)
            for spec in specs
            if spec.name not in whole
        }
        unheld = [spec for spec in specs if spec.name in places and places[spec.name] is None]
        lost = self._sizes(unheld)
        _refuse_loss(lost, lossy)
        changes = self._changes(specs, places, threads)
        embedded = [s for s in specs if s.name in changes and changes[s.name] is None]
        lost |= self._sizes(embedded)
        _refuse_loss(lost, lossy)
        kept = {name: change for name, change in changes.items() if change is not None}
        tensors = {self.modules.in_memory[name].name: self._merged(name) for name in sorted(whole)}
        adapter = Adapter(
            {place: kept[name] for name, place in places.items() if place and name in kept},
            {place.name: self.written.base.shape(n) for n, place in places.items() if place},
            tensors,
            tuple(sorted(saved)),
            self.modules.mixes_orders,
        )
        return HeldChanges(adapter, {name: change.error for name, change in kept.items()}, lost)

    def _changes(
        self, specs: Iterable[TensorSpec], places: Mapping[str, AdaptedModule | None], threads: int
    ) -> dict[str, LowRankChange | None]:
        """Tensor that changes -> its change; None where no factors can hold it after all."""

        def work(spec: TensorSpec) -> tuple[str, LowRankChange | None, bool]:
            place = places[spec.name]
            assert place is not None
            return spec.name, *self._change(spec, place)

        matrices = [spec for spec in specs if places.get(spec.name) is not None]
        found = parallel_map(work, matrices, threads)
        return {name: change for name, change, changed in found if changed}

    def _saved_modules(self, specs: Iterable[TensorSpec]) -> set[str]:
        """Modules to store whole: what the base does not store, and changed heads."""
        by_name = {spec.name: spec for spec in specs}
        saved = set()
        for name in self.written.base.tensors:
            if name in self.written.base.aliases:
                continue
            module = self.modules.saved_module(name)
            added = _is_added(self.written, name)
            if added and module is None:
                raise InputError(
                    f"adapter: expected a merge that keeps the base's tensors, received {name!r}, "
                    "which the policies change or add; export the whole model with --out"
                )
            changed = module is not None and name in by_name and self._relative(by_name[name]) > 0
            if module is not None and (added or changed):
                saved.add(module)
        return saved

    def _sizes(self, specs: Iterable[TensorSpec]) -> dict[str, float]:
        """Tensor -> size of its change, where there is one."""
        sizes = {spec.name: self._relative(spec) for spec in specs}
        return {name: size for name, size in sizes.items() if size > 0}

    def _change(self, spec: TensorSpec, place: AdaptedModule) -> tuple[LowRankChange | None, bool]:
        """The change of a matrix, and whether there is one; without the first it is not held.

        Raises:
            InputError: If it can only be approximated, and no rank was given.
        """
        exact = self._exact_change(spec)
        if exact is not None:
            kept = exact if self.rank is None else cut(exact, self.rank)
            return kept, kept.rank > 0
        delta = self._delta(spec)
        if not bool(delta.any()):
            return None, False
        if place.kind == "embedding":
            return None, True
        if self.rank is None:
            raise InputError(
                f"adapter: expected a weighted sum of LoRA task vectors, received a change of "
                f"{spec.name!r} that is none; give the rank to cut it to, for example "
                "--adapter-rank 16"
            )
        return approximated(delta.reshape(matrix_shape(spec.shape)), self.rank), True

    def _exact_change(self, spec: TensorSpec) -> LowRankChange | None:
        """The change of a matrix as the factors of all experts side by side, if it is that."""
        basis = self.merge.basis
        whole = spec.name in self.merge.special.postprocessed
        if basis.factors is None or basis.form != "delta" or whole:
            return None
        factors = basis.factors(spec.name)
        if factors is None:
            return None
        return joined(factors, self.merge.field.restrict(spec.start, spec.stop))

    def _delta(self, spec: TensorSpec) -> torch.Tensor:
        merged = merge_wide(self.merge, spec)
        return merged - self.family.base.read(spec.name).to(merged.device, merged.dtype)

    def _relative(self, spec: TensorSpec) -> float:
        """Norm of the change of a tensor as a share of the base's."""
        from torch import float64
        from torch.linalg import vector_norm

        whole = vector_norm(self.family.base.read(spec.name), dtype=float64)
        return float(vector_norm(self._delta(spec), dtype=float64) / whole.clamp_min(1e-30))

    def _merged(self, name: str) -> torch.Tensor:
        """A tensor of the merged model, in the dtype that it is stored in."""
        spec = self.family.layout.by_name.get(name)
        if spec is None:
            return self.written.base.read(name).clone()
        return merge_tensor(self.merge, spec, spec.dtype)[0]


def _is_added(family: ModelFamily, name: str) -> bool:
    """Whether the base's files do not have a tensor as the merge has it."""
    base = family.base
    if not isinstance(base, Aligned):
        return False
    stored = stored_behind(base, name)
    return stored is None or name not in stored.tensors


def _refuse_loss(lost: Mapping[str, float], lossy: bool) -> None:
    if lost and not lossy:
        raise InputError(
            f"adapter: expected changes of matrices alone, received changes of {len(lost)} tensors "
            f"that an adapter cannot hold: {listed(lost)}; leave them out with --lossy, or export "
            "the whole model with --out"
        )
