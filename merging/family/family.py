"""Base and experts as operators see them: special tensors brought into one shape, by the policies
of the recipe.

:func:`align_family` opens no weights. Where a policy changes a tensor, the source is wrapped as an
:class:`Aligned` checkpoint that makes it when it is read, so that layouts, arenas, operators and
exports need not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.errors import CheckpointError, RecipeError
from mergesearch.merging.family.aligned import Aligned, Make, unstored, with_tensors
from mergesearch.merging.family.basis import prepare_basis
from mergesearch.merging.family.missing_tensors import completed, untied
from mergesearch.merging.family.preflight import check_family, layout_of, listed
from mergesearch.merging.family.special_tensors import (
    SpecialTensors,
    in_log_space,
    is_logarithm,
    running_statistics,
    statistics_treatment,
)
from mergesearch.merging.family.tokenizer_files import renumbered
from mergesearch.merging.family.vocabulary import (
    Alignment,
    align_vocabularies,
    aligned_base,
    aligned_expert,
    check_same_tokens,
    with_vocabulary_size,
)
from mergesearch.merging.models.calibration_spec import (
    DEFAULTS,
    CalibrationSpec,
    refuse_calibration,
)
from mergesearch.merging.policies import TensorPolicies, parse_policies
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.tensors.layout import FLOATING, Layout, natural_key
from mergesearch.merging.tensors.memo import Memo

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.operators import Basis, Operator, Options


@dataclass(frozen=True, eq=False)
class ModelFamily:
    """Base and experts, ready to be merged.

    Attributes:
        base: The common base.
        experts: Its experts.
        layout: Of every arena.
        treatment: Tensors that are not combined as the operator would.
        alignment: How vocabularies go together, where they differ.
        rebuilt: Whether the base has tensors or settings that its files do not hold.
        calibration: Items that running statistics are recomputed on after every merge, if they are.
    """

    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    layout: Layout
    treatment: SpecialTensors = field(default_factory=SpecialTensors)
    alignment: Alignment | None = None
    rebuilt: bool = False
    calibration: CalibrationSpec | None = None

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """Base and experts."""
        return (self.base, *self.experts)

    @property
    def copied(self) -> tuple[str, ...]:
        """Floating tensors that the merged model has from the base, whatever the coefficients."""
        return tuple(n for n in self.base.carried if self.base.tensors[n].dtype in FLOATING)

    def prepare(self, operator: Operator, options: Options) -> Basis:
        """The basis of an operator on this family."""
        self.check(operator)
        return prepare_basis(operator, self.base, self.experts, options, self.treatment)

    def check(self, operator: Operator) -> None:
        """Refuse an operator that would run sources which are not models of the stored base as they
        are seen here.

        Raises:
            RecipeError: If it needs more than weights.
        """
        if operator.needs and (self.rebuilt or self.treatment.logs):
            raise RecipeError(
                f"operator {operator.name}: expected sources that can be run as they are stored, "
                "received special "
                "policies that change their tensors; leave vocabulary, absent, tied and scalars at "
                "their defaults, or "
                "choose an operator that needs weights alone"
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
    base: Checkpoint, experts: Sequence[Checkpoint], special: TensorPolicies
) -> ModelFamily:
    """Bring base and experts into one shape and check that they fit; reads headers, tokenizers and
    scalars only.

    Raises:
        CheckpointError: If an expert does not fit the base, or tensors need a policy that was not
            chosen.
    """
    sources: list[Checkpoint] = [base, *experts]
    _check_calibration(special, base, len(experts))
    if special.tied == "untie":
        sources = untied(sources)
    copied: set[str] = set()
    if special.absent != "refuse":
        sources, copied = completed(sources, special.absent)
    alignment = (
        None if special.vocabulary == "same" else align_vocabularies(sources, special.vocabulary)
    )
    if alignment is not None:
        sources = _with_common_rows(sources, alignment)
    check_family(sources[0], sources[1:])
    if special.vocabulary == "same":
        warn(check_same_tokens(sources))
    treatment, more = _treatment(sources[0], special)
    copied |= more
    if special.scalars == "log":
        sources, logs = _with_logarithms(sources)
        treatment = SpecialTensors(treatment.statistics, treatment.variances, logs)
    if copied:
        sources = [with_tensors(source, {}, copied=frozenset(copied)) for source in sources]
    first = sources[0]
    rebuilt = first.config != base.config or (isinstance(first, Aligned) and bool(first.made))
    return ModelFamily(
        first,
        tuple(sources[1:]),
        layout_of(first),
        treatment,
        alignment,
        rebuilt,
        special.calibration,
    )


def _check_calibration(special: TensorPolicies, base: Checkpoint, experts: int) -> None:
    if special.calibration is not None:
        reason = refuse_calibration(
            layout_of(base), experts, {"calibration": {**DEFAULTS, **special.calibration}}
        )
        if reason is not None:
            raise RecipeError(f"special.{reason}")


def warn(message: str | None) -> None:
    """Warn in one line, if there is anything to say."""
    if message:
        warnings.warn(message, stacklevel=3)


# --- vocabularies
# ----------------------------------------------------------------------------


def _with_common_rows(sources: Sequence[Checkpoint], alignment: Alignment) -> list[Checkpoint]:
    base = sources[0]
    experts = sources[1:]
    done = f"vocabulary {alignment.digest}"
    made: dict[str, tuple[TensorInfo, Make]] = {}
    if alignment.moves_base:
        for name in alignment.names:
            info = _with_rows(base, name, alignment.size, base.merged[name][1])
            made |= _and_copies(
                base, name, (info, partial(aligned_base, alignment, name, base, experts))
            )
    settings = with_vocabulary_size(base.config, alignment.sizes[0], alignment.size)
    settings = renumbered(settings, alignment.renumbered, f"{base.path}/config.json")
    aligned = [
        with_tensors(base, made, config=settings, done=done, beside=experts) if made else base
    ]
    for place, expert in enumerate(experts):
        made = {}
        for name in alignment.names:
            dtype = _wider(expert.merged[name][1], base.merged[name][1])
            info = _with_rows(expert, name, alignment.size, dtype)
            made |= _and_copies(
                expert, name, (info, partial(aligned_expert, alignment, name, place, base, experts))
            )
        config = with_vocabulary_size(expert.config, alignment.sizes[1 + place], alignment.size)
        aligned.append(with_tensors(expert, made, config=config, done=done, beside=sources))
    return aligned


def _with_rows(source: Checkpoint, name: str, rows: int, dtype: str) -> TensorInfo:
    return unstored(source, (rows, *source.merged[name][0][1:]), dtype)


def _and_copies(
    source: Checkpoint, name: str, made: tuple[TensorInfo, Make]
) -> dict[str, tuple[TensorInfo, Make]]:
    """The tensor under its name and under those of its stored copies."""
    return {name: made, **{alias: made for alias, kept in source.aliases.items() if kept == name}}


def _wider(one: str, other: str) -> str:
    """The dtype that holds both; two halves of different kind fit fp32."""
    if one == other:
        return one
    return "float64" if "float64" in (one, other) else "float32"


# --- running statistics and scalars
# ----------------------------------------------------------------------------


def _treatment(base: Checkpoint, special: TensorPolicies) -> tuple[SpecialTensors, frozenset[str]]:
    """How running statistics are merged, and what the policies copy from the base."""
    copied = frozenset(
        name for name, (shape, _) in base.merged.items() if not shape and special.scalars == "base"
    )
    names = running_statistics([*base.merged])
    check_statistics(names, special, f"base {base.name!r} ({base.path})")
    if special.batch_norm == "base":
        return SpecialTensors(), copied | {*names}
    treatment = statistics_treatment(names)
    # What is recomputed need not be in range before.
    return (
        replace(treatment, variances=frozenset())
        if special.batch_norm == "recalibrate"
        else treatment
    ), copied


def check_statistics(names: Collection[str], special: TensorPolicies, where: str) -> None:
    """Refuse running statistics for which no policy was chosen.

    Raises:
        CheckpointError: Naming them and the choices.
    """
    if names and special.batch_norm == "refuse":
        raise CheckpointError(
            f"{where}: expected a policy for the running statistics of BatchNorm "
            f"({listed(names)}), received none; "
            "averages of statistics are not the statistics of the average: choose special: "
            "{batch_norm: base | merge | "
            "recalibrate}"
        )


def _with_logarithms(sources: Sequence[Checkpoint]) -> tuple[list[Checkpoint], frozenset[str]]:
    """Experts whose positive scalars are given in log space, and the names of those; reads the
    scalars.
    """
    base = sources[0]
    scalars = [n for n, (shape, _) in base.merged.items() if not shape and not is_logarithm(n)]
    logs = frozenset(log_scalars({n: [source.read(n) for source in sources] for n in scalars}))
    wide = {
        n: "float64" if any(s.merged[n][1] == "float64" for s in sources) else "float32"
        for n in logs
    }
    made = [
        {n: (unstored(e, (), wide[n]), _logarithm(e, base, n)) for n in logs} for e in sources[1:]
    ]
    experts = [
        with_tensors(e, m, done="log", beside=[base])
        for e, m in zip(sources[1:], made, strict=True)
    ]
    return [base, *experts], logs


def log_scalars(values: Mapping[str, Sequence[torch.Tensor]]) -> list[str]:
    """Names of the scalars that are positive in every source; others have no logarithm, which is
    warned of.
    """
    positive = [
        name for name, tensors in values.items() if all(bool(tensor > 0) for tensor in tensors)
    ]
    others = sorted(set(values) - set(positive), key=natural_key)
    warn(
        f"scalars: {listed(others)} are not positive everywhere and are merged as they are"
        if others
        else None
    )
    return positive


def _logarithm(expert: Checkpoint, base: Checkpoint, name: str) -> Make:
    return lambda: in_log_space(expert.read(name), base.read(name))


# --- integers
# ----------------------------------------------------------------------------


def warn_of_integers(family: ModelFamily) -> None:
    """Warn of integer tensors, which are copied from the base, where an expert has others; reads
    them.
    """
    base = family.base
    names = [name for name in base.carried if base.tensors[name].dtype not in FLOATING]
    odd = [
        n
        for n in names
        if any(n in e.tensors and differs(base.read(n), e.read(n)) for e in family.experts)
    ]
    warn(integers_warning(odd))


def integers_warning(names: Collection[str]) -> str | None:
    """What to say of integer tensors that differ."""
    return (
        f"integer tensors differ and are copied from the base: {listed(names)}" if names else None
    )


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold other values; a comparison across dtypes and devices."""
    return one.shape != other.shape or bool((one != other.to(one.device)).any())
