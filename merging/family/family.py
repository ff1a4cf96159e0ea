"""Base and experts as operators see them, brought into one shape by the policies of a recipe.

:func:`align_family` opens no weights. Where a policy changes a tensor, the source is wrapped as an
:class:`Aligned` checkpoint that makes it when it is read, so that layouts, arenas, operators and
exports need not know.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.errors import CheckpointError, InputError, RecipeError
from mergesearch.merging.family.aligned import Aligned, with_tensors
from mergesearch.merging.family.base_names import with_base_names
from mergesearch.merging.family.basis import prepare_basis
from mergesearch.merging.family.common_rows import with_common_rows
from mergesearch.merging.family.heads import (
    Heads,
    own_heads,
    shared_parts,
    silent_heads,
    with_average_heads,
    with_base_heads,
)
from mergesearch.merging.family.log_scalars import with_logarithms
from mergesearch.merging.family.messages import listed, warn
from mergesearch.merging.family.missing_tensors import completed, untied
from mergesearch.merging.family.placing.coordinates import in_base_coordinates
from mergesearch.merging.family.preflight import check_family, layout_of
from mergesearch.merging.family.special_tensors import SpecialTensors, running_statistics
from mergesearch.merging.family.unlocked import unlocked
from mergesearch.merging.family.vocabulary import (
    Alignment,
    align_vocabularies,
    check_same_tokens,
)
from mergesearch.merging.models.calibration_experts import check_model
from mergesearch.merging.models.calibration_spec import (
    DEFAULTS,
    CalibrationSpec,
    refuse_calibration,
)
from mergesearch.merging.policies import TensorPolicies, parse_policies
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.tensors.layout import FLOATING, Layout
from mergesearch.merging.tensors.memo import Memo
from mergesearch.merging.tensors.owned import has_owners
from mergesearch.merging.tensors.place import HOST, Place

if TYPE_CHECKING:
    from mergesearch.merging.operators import Basis, Operator, Options


#: Operators that look at what experts answer, each with its own head where they have some.
_READ_ANSWERS = frozenset({"concrete", "fisher"})
#: Operators that know which units a source has, where layers hold units of several models.
_READ_OWNERS = frozenset({"pleas"})


@dataclass(frozen=True, eq=False)
class ModelFamily:
    """Base and experts, ready to be merged.

    Attributes:
        base: The common base.
        experts: Its experts.
        layout: Of every arena.
        special: Tensors that are not combined as the operator would.
        alignment: How vocabularies go together, where they differ.
        rebuilt: Whether the base has tensors or settings that its files do not hold.
        calibration: Items that running statistics are recomputed on after every merge, if they are.
        heads: What the sources keep for themselves; None where everything is shared.
        stored_as: Name of a tensor -> the name under which the model is written, where that is
            another.
        moved: Expert -> how it is brought into the coordinates of the base, for those that are.
        widened: Whether layers hold units of several models, and nothing else was rebuilt.
    """

    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    layout: Layout
    special: SpecialTensors = field(default_factory=SpecialTensors)
    alignment: Alignment | None = None
    rebuilt: bool = False
    calibration: CalibrationSpec | None = None
    heads: Heads | None = None
    stored_as: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)
    widened: bool = False

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """Base and experts."""
        return (self.base, *self.experts)

    @property
    def copied(self) -> tuple[str, ...]:
        """Floating tensors that the merged model has from the base, whatever the coefficients."""
        return tuple(n for n in self.base.carried if self.base.tensors[n].dtype in FLOATING)

    def prepare(self, operator: Operator, options: Options, place: Place = HOST) -> Basis:
        """The basis of an operator on this family, with heavy work done at a place."""
        self.check(operator)
        return prepare_basis(operator, self.base, self.experts, options, self.special, place)

    def check(self, operator: Operator) -> None:
        """Refuse an operator that would run sources whose tensors the policies change.

        Raises:
            RecipeError: If it needs more than weights.
        """
        turned = any(isinstance(expert, Aligned) and expert.realigned for expert in self.experts)
        rebuilt = self.rebuilt and not (self.widened and operator.name in _READ_OWNERS)
        if operator.needs and (rebuilt or self.special.logs or turned):
            raise RecipeError(
                f"operator {operator.name}: expected sources that can be run as they are stored, "
                "received special policies that change their tensors; leave vocabulary, absent, "
                "tied, scalars and unlock at their defaults, or choose an operator that needs "
                f"weights alone{', or pleas' if self.widened else ''}"
            )
        without = [] if self.heads is None else self.heads.without_head(self.experts)
        if without and operator.name in _READ_ANSWERS:
            raise RecipeError(
                f"operator {operator.name}: expected a head in every expert, whose answers it "
                f"reads, received none in {listed(without)}; choose another operator, such as "
                "regmean"
            )


def open_family(recipe: Recipe, memo: Memo | None = None) -> ModelFamily:
    """The sources of a recipe, opened and aligned by its policies.

    Raises:
        CheckpointError: If one is missing, damaged, or does not fit the base.
        RecipeError: If a policy is not one of its choices.
    """
    sources = [
        open_checkpoint(source.path, source.name, memo) for source in (recipe.base, *recipe.experts)
    ]
    return align_family(sources[0], sources[1:], parse_policies(recipe.special))


def align_family(
    base: Checkpoint, experts: Sequence[Checkpoint], policies: TensorPolicies
) -> ModelFamily:
    """Bring base and experts into one shape and check that they fit.

    Reads headers, tokenizers and scalars only.

    Raises:
        CheckpointError: If an expert does not fit the base, or tensors need a policy that was not
            chosen.
    """
    _check_calibration(policies, base, len(experts))
    experts = unlocked(base, experts, policies.unlock)
    placed = in_base_coordinates([base, *experts], policies.align)
    sources, copied, heads = _with_same_tensors(placed, policies)
    alignment = None
    if policies.vocabulary != "same":
        alignment = align_vocabularies(sources, policies.vocabulary)
    if alignment is not None:
        sources = with_common_rows(sources, alignment)
    check_family(sources[0], sources[1:], policies)
    warn(silent_heads(sources, policies))
    if policies.vocabulary == "same":
        warn(check_same_tokens(sources))
    special, more = _statistics_and_copied(sources[0], policies)
    copied |= more
    if policies.scalars == "log":
        sources, logs = with_logarithms(sources)
        special = replace(special, logs=logs)
    if copied:
        sources = [with_tensors(source, {}, copied=frozenset(copied)) for source in sources]
    first = sources[0]
    return ModelFamily(
        first,
        tuple(sources[1:]),
        layout_of(first),
        special,
        alignment,
        rebuilt=first.config != base.config or (isinstance(first, Aligned) and bool(first.made)),
        calibration=policies.calibration,
        heads=heads,
        moved={name: spec.method for name, spec in policies.align.items()},
        widened=has_owners(first) and alignment is None and first.config == placed[0].config,
    )


def _with_same_tensors(
    sources: list[Checkpoint], policies: TensorPolicies
) -> tuple[list[Checkpoint], set[str], Heads | None]:
    """Sources with the same tensors, those that no coefficient acts on, and what each keeps."""
    names: list[Mapping[str, str]] = [{} for _ in sources]
    if policies.heads != "refuse" or policies.keeps_own:
        sources, names = with_base_names(sources)
    if policies.tied == "untie":
        sources = untied(sources)
    heads = own_heads(sources, policies, names) if policies.keeps_own else None
    if heads is not None:
        sources = shared_parts(sources, heads)
    if policies.heads == "base":
        sources = with_base_heads(sources)
    elif policies.heads == "average":
        sources = with_average_heads(sources)
    if policies.absent == "refuse":
        return sources, set(), heads
    return *completed(sources, policies.absent), heads


def _check_calibration(policies: TensorPolicies, base: Checkpoint, experts: int) -> None:
    if policies.calibration is None:
        return
    calibration = {**DEFAULTS, **policies.calibration}
    reason = refuse_calibration(layout_of(base), experts, {"calibration": calibration})
    if reason is not None:
        raise RecipeError(f"special.{reason}")
    try:
        check_model({"calibration": calibration}, base)
    except InputError as error:
        raise RecipeError(f"special.{error}") from None


def _statistics_and_copied(
    base: Checkpoint, policies: TensorPolicies
) -> tuple[SpecialTensors, frozenset[str]]:
    """How running statistics are merged, and the tensors that the policies copy from the base."""
    copied = frozenset(
        name for name, (shape, _) in base.merged.items() if not shape and policies.scalars == "base"
    )
    names = running_statistics([*base.merged])
    check_statistics(names, policies, f"base {base.name!r} ({base.path})")
    if policies.batch_norm == "base":
        return SpecialTensors(), copied | {*names}
    special = SpecialTensors.of_statistics(names)
    if policies.batch_norm == "recalibrate":
        # What is recomputed need not be in range before.
        special = replace(special, variances=frozenset())
    return special, copied


def check_statistics(names: Collection[str], policies: TensorPolicies, where: str) -> None:
    """Refuse running statistics for which no policy was chosen.

    Raises:
        CheckpointError: Naming them and the choices.
    """
    if names and policies.batch_norm == "refuse":
        raise CheckpointError(
            f"{where}: expected a policy for the running statistics of BatchNorm "
            f"({listed(names)}), received none; averages of statistics are not the statistics of "
            "the average: choose special: {batch_norm: base | merge | recalibrate}"
        )
