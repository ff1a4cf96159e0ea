"""A merge as one adapter of its base, which peft loads.

A weighted sum of LoRA task vectors is itself a product of two factors: those of all experts side by
side, whose rank is the sum of theirs. Any other change of a matrix is cut to the rank that is asked
for, by the best approximation in the Frobenius norm; what that loses is reported for each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.errors import InputError
from mergesearch.merging.export.adapter_format.card import render_adapter_card
from mergesearch.merging.export.adapter_format.changes import MergeChanges
from mergesearch.merging.export.adapter_format.files import Adapter, write_adapter
from mergesearch.merging.export.adapter_format.modules import ModelModules
from mergesearch.merging.export.folder import check_fit, stamped_recipe
from mergesearch.merging.export.head_folders import family_to_write
from mergesearch.merging.export.new_folder import check_target, new_folder
from mergesearch.merging.family.aligned import stored_source
from mergesearch.merging.family.family import ModelFamily, open_family
from mergesearch.merging.family.messages import listed
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.in_memory import prepared_merge
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.recipe_file import save_recipe


@dataclass(frozen=True)
class AdapterExport:
    """A merge that was written as an adapter.

    Attributes:
        folder: Where it is.
        rank: The greatest rank of a module.
        errors: Tensor -> what is missing of its change, as a share of the change's Frobenius norm,
            for all that the adapter changes by factors; 0 where it is exact.
        whole: Modules that are stored whole.
        lost: Tensor that an adapter cannot change -> the norm of the change that is left out, as a
            share of the base's norm.
    """

    folder: Path
    rank: int
    errors: Mapping[str, float]
    whole: tuple[str, ...] = ()
    lost: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean_error(self) -> float:
        """Mean of :attr:`errors`."""
        return sum(self.errors.values()) / max(len(self.errors), 1)

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor with the greatest error, and that; an empty name where there is none."""
        return max(self.errors.items(), key=lambda item: item[1], default=("", 0.0))

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "out": str(self.folder),
            "rank": self.rank,
            "exact": not self.lost and self.worst[1] == 0,
            "mean_error": self.mean_error,
            "worst_error": self.worst[1],
            "worst_tensor": self.worst[0] or None,
            "errors": dict(self.errors),
            "whole": list(self.whole),
            "lost": dict(self.lost),
        }

    def lines(self) -> list[str]:
        """For people: what the adapter holds, what is missing, and what it cannot hold."""
        name, error = self.worst
        of = f"{len(self.errors)} tensors at rank {self.rank} or less"
        loss = "exact within rounding"
        if error:
            loss = (
                f"relative error {self.mean_error:.3g} in the mean and {error:.3g} at worst "
                f"({name})"
            )
        lines = [f"adapter of {of}, {loss}"]
        if self.whole:
            lines.append(f"stored whole: {', '.join(self.whole)}")
        if self.lost:
            greatest = max(self.lost, key=lambda one: self.lost[one])
            lines.append(
                f"left out, as an adapter cannot hold them: {len(self.lost)} tensors "
                f"({listed(self.lost)}); the greatest relative change is "
                f"{self.lost[greatest]:.3g} ({greatest})"
            )
        return lines


def export_adapter(
    recipe: Recipe,
    out: Path,
    *,
    rank: int | None = None,
    lossy: bool = False,
    facts: Mapping[str, str] | None = None,
    overwrite: bool = False,
    threads: int = 1,
    head: str | None = None,
) -> AdapterExport:
    """Write the merge of ``recipe`` as an adapter of its base, as peft saves them.

    Heads are stored whole, and so are the modules that the experts' adapters store whole.

    Args:
        recipe: The merge.
        out: Folder to create; may exist if it is empty.
        rank: Greatest rank of a module; None: what it takes to lose nothing.
        lossy: Leave out changes that an adapter cannot hold, those of norms for example.
        facts: Lines for the card, for example scores.
        overwrite: Replace a folder that is not empty.
        threads: Tensors that are worked on at once.
        head: Name of the expert (or ``base``) whose head the adapter gets, where they keep their
            own.

    Raises:
        CheckpointError: If a source is missing, damaged, or does not fit the base.
        RecipeError: If the recipe does not fit its sources.
        InputError: If the merge is no adapter without a loss that was not agreed to, or ``out``
            cannot be written.
    """
    family = open_family(recipe)
    _check_kind(recipe, family, head)
    written = family_to_write(family, head)
    check_fit(recipe, family)
    check_target(resolved(out), family.sources, overwrite)
    stamped = stamped_recipe(recipe, family)
    merge = prepared_merge(
        family.base,
        family.experts,
        recipe.operator,
        recipe.options,
        recipe.field,
        family.layout,
        family.special,
        threads,
    )
    changes = MergeChanges(family, written, merge, _modules(family, written), rank)
    held = changes.held(lossy, threads)
    top = max((change.rank for change in held.adapter.changes.values()), default=0)
    exported = AdapterExport(out, top, held.errors, held.adapter.saved, held.lost)
    _write(resolved(out), exported, held.adapter, stamped, written, facts or {})
    return exported


def _check_kind(recipe: Recipe, family: ModelFamily, head: str | None) -> None:
    """Refuse merges that are no change of one stored model."""
    received = None
    if recipe.routing:
        received = f"{dict(recipe.routing).get('method')!r}, which is merged for each input"
    elif recipe.mixture:
        received = "a mixture with fewer experts, which has another shape"
    elif recipe.bits:
        received = "one whose layers are rounded to bits of their own"
    elif isinstance(stored_source(family.base), AdaptedCheckpoint):
        received = "a base with an adapter of its own; merge that with peft first"
    elif family.calibration is not None:
        received = "running statistics that are computed after the merge"
    elif family.alignment is not None:
        received = "a vocabulary that the merge changes"
    elif family.base.denoiser:
        received = "a part of a pipeline"
    if received is not None:
        raise InputError(
            f"adapter: expected the merge of one model, received {received}; export it with --out"
        )
    if family.heads is not None and head is None:
        names = ", ".join(family.heads.of)
        raise InputError(
            f"adapter: expected the head that it gets, received none where experts keep their own; "
            f"give --head, one of {names}"
        )


def _modules(family: ModelFamily, written: ModelFamily) -> ModelModules:
    saved = set[str]()
    for expert in family.experts:
        source = stored_source(expert)
        if isinstance(source, AdaptedCheckpoint):
            saved |= {*source.adapter.saved}
    return ModelModules.of(written.base, written.stored_as, saved)


def _write(
    target: Path,
    exported: AdapterExport,
    adapter: Adapter,
    recipe: Recipe,
    family: ModelFamily,
    facts: Mapping[str, str],
) -> None:
    try:
        with new_folder(target) as part:
            write_adapter(part, adapter, recipe.base.path, family.base.config)
            save_recipe(recipe, part / "recipe.yaml")
            loss = {"adapter": "; ".join(exported.lines())}
            card = render_adapter_card(
                recipe, family, {**facts, **loss}, exported.errors, exported.lost
            )
            (part / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{target}: expected a place to write an adapter, received: {error.strerror or error}"
        ) from error
