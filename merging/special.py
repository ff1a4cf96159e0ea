"""Special tensors: what happens to them is decided once, before any operator sees them.

Vocabularies, running statistics, logarithmic scalars, new heads and ties are no task vectors like others. Each has a
policy here; the defaults refuse what has no obvious meaning. Which tensors of given checkpoints a policy concerns is
worked out in :mod:`merging.family`; how the concerned ones are combined is the :class:`Treatment` of a merge.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merging.calibration import CalibrationSpec
from merging.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from merging.memo import Memo
    from merging.operators import Basis, Operator, Options, TensorSource

Choices = tuple[tuple[str, Any], ...]


class Special(BaseModel):
    """The ``special`` section of recipes and study files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocabulary: Literal["same", "base", "union", "common"] = Field(
        "same",
        description="rows of embeddings and heads: same refuses different vocabularies; the others align rows by token "
        "and keep the tokens of the base, of all sources, or those that all have",
    )
    batch_norm: Literal["refuse", "base", "merge", "recalibrate"] = Field(
        "refuse",
        description="running statistics of BatchNorm: copied from the base, merged linearly whatever the operator, or "
        "recomputed after every merge on the items of calibration",
    )
    calibration: CalibrationSpec | None = Field(
        None, description="for batch_norm recalibrate: a datasets folder, the model's auto class and its inputs"
    )
    scalars: Literal["merge", "log", "base"] = Field(
        "merge",
        description="tensors without dimensions: merged as any other, as logarithms (positive ones that are not stored "
        "as logarithms already), or copied from the base",
    )
    absent: Literal["refuse", "base_zero", "average"] = Field(
        "refuse",
        description="tensors of all experts that the base lacks: the base's are zero, or the average of the experts "
        "whatever the coefficients; tensors that experts lack are then kept from the base",
    )
    tied: Literal["refuse", "untie"] = Field(
        "refuse", description="output heads that some sources tie to the embedding and others do not: untie all"
    )

    @model_validator(mode="after")
    def _check_calibration(self) -> Self:
        if (self.batch_norm == "recalibrate") != (self.calibration is not None):
            raise ValueError("expected calibration with batch_norm: recalibrate, and only there")
        return self

    @property
    def choices(self) -> Choices:
        """What differs from the defaults, as sorted ``(name, value)`` pairs: the form in which recipes hold it."""
        return tuple(sorted(self.model_dump(exclude_defaults=True).items()))


def located_special(special: Special, absolute: Callable[[str], str]) -> Special:
    """The policies with the paths of their data in full."""
    if special.calibration is None:
        return special
    data = special.calibration["data"]
    found = absolute(data) if isinstance(data, str) else {name: absolute(path) for name, path in data.items()}
    return special.model_copy(update={"calibration": {**special.calibration, "data": found}})


def parse_special(value: Special | Mapping[str, Any] | Choices | None) -> Special:
    """The policies from the form in which a recipe or a caller gives them; what is not given has its default.

    Raises:
        RecipeError: If a key is unknown, or a value is not one of its choices.
    """
    if isinstance(value, Special):
        return value
    try:
        return Special.model_validate({} if value is None else dict(value))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"special: {_explained(error)}") from None


def _explained(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"expected a mapping with some of {', '.join(Special.model_fields)}, received something else"
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; known keys are {', '.join(Special.model_fields)}"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, received {first['input']!r}"


@dataclass(frozen=True)
class Treatment:
    """Tensors of a layout that are combined otherwise than an operator would.

    Attributes:
        statistics: Running statistics: their rows are plain task vectors, whatever the operator.
        variances: Those of them that must not become negative.
        logs: Scalars that are summed as logarithms.
    """

    statistics: frozenset[str] = frozenset()
    variances: frozenset[str] = frozenset()
    logs: frozenset[str] = frozenset()

    @property
    def finished(self) -> frozenset[str]:
        """Tensors whose weighted sum still has to go through :func:`finish`."""
        return self.variances | self.logs


#: Every tensor as its operator has it.
PLAIN = Treatment()


def running_statistics(names: Collection[str]) -> tuple[str, ...]:
    """Those of ``names`` that are running statistics: a ``running_mean`` with its ``running_var``."""
    known = {*names}

    def is_one(name: str) -> bool:
        prefix, _, last = name.rpartition("running_")
        return last in ("mean", "var") and {f"{prefix}running_mean", f"{prefix}running_var"} <= known

    return tuple(name for name in names if is_one(name))


def statistics_treatment(names: Sequence[str]) -> Treatment:
    """How running statistics are merged linearly."""
    return Treatment(frozenset(names), frozenset(name for name in names if name.endswith("running_var")))


def is_logarithm(name: str) -> bool:
    """Whether a scalar of this name is stored as a logarithm, as CLIP's temperature is."""
    return name.rpartition(".")[2] == "logit_scale" or name.rpartition(".")[2].startswith("log_")


def in_log_space(tensor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``b (1 + log(e / b))`` for a scalar ``e`` of an expert and ``b`` of the base, in fp32 (fp64 if either is).

    Its task vector is ``b log(e / b)``, so that :func:`finish` finds ``b Π (e_k / b)^c_k`` from a weighted sum.
    """
    import torch

    wide = torch.float64 if torch.float64 in (tensor.dtype, base.dtype) else torch.float32
    origin = base.to(wide)
    return origin + origin * torch.log(tensor.to(origin.device, wide) / origin)


def finish(treatment: Treatment, name: str, total: torch.Tensor, base: torch.Tensor, dtype: str) -> torch.Tensor:
    """What the weighted sum ``total`` of a tensor stands for; the same bits in an arena and in a stream.

    Args:
        treatment: Of the merge.
        name: Of the tensor.
        total: The weighted sum, in the accumulation dtype.
        base: The base's tensor in the same dtype and shape.
        dtype: In which the merged tensor is stored.
    """
    import torch

    if name in treatment.logs:
        return base * torch.exp((total - base) / base)
    if name in treatment.variances:
        below = total < 0
        if bool(below.any()):
            warnings.warn(
                f"merged {name!r}: variances became negative and are set to a tiny positive number; "
                "smaller coefficients keep the statistics in range",
                stacklevel=2,
            )
            return torch.where(below, torch.full_like(total, torch.finfo(getattr(torch, dtype)).tiny), total)
    return total


def finish_slope(treatment: Treatment, name: str, total: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Derivative of :func:`finish` with respect to ``total``; that of variances, which may jump, is never asked for."""
    import torch

    if name in treatment.logs:
        return torch.exp((total - base) / base)
    return torch.ones_like(total)


def prepare_basis(
    operator: Operator,
    base: TensorSource,
    experts: Sequence[TensorSource],
    options: Options,
    treatment: Treatment,
) -> Basis:
    """The operator's basis, with rows of plain task vectors for running statistics.

    An operator of the linear family makes them itself. Any other does not get to see running statistics, unless it
    runs the experts: trimming them, or counting them among the parameters, has no meaning. Where a direction is no
    single expert, it carries the average of the experts' statistics.
    """
    names = treatment.statistics & {*base.names}
    if not names:
        return operator.prepare(base, experts, **options)
    if operator.family == "linear":
        basis = operator.prepare(base, experts, **options)
        if basis.form in ("delta", "interpolation"):
            return basis
    views = [source if operator.needs else Without(source, names) for source in (base, *experts)]
    basis = operator.prepare(views[0], views[1:], **options)

    def rows(name: str) -> list[torch.Tensor]:
        return _plain_rows(basis, base, experts, name) if name in names else basis.rows(name)

    angles, factors, direct = basis.angles, basis.factors, basis.direct
    return replace(
        basis,
        rows=rows,
        angles=None if angles is None else lambda name: 0.0 if name in names else angles(name),
        factors=None if factors is None else lambda name: None if name in names else factors(name),
        direct=None if direct is None else lambda name, *rest: None if name in names else direct(name, *rest),
    )


def _plain_rows(basis: Basis, base: TensorSource, experts: Sequence[TensorSource], name: str) -> list[torch.Tensor]:
    from merging.operators.task_vectors import difference

    origin = base.read(name)
    # Rows of an arc or an interpolation are models, all others are differences.
    model = basis.form in ("interpolation", "slerp")
    vectors = [difference(expert.read(name), origin * 0 if model else origin) for expert in experts]
    if basis.directions == len(vectors):
        return vectors
    mean = sum(vectors[1:], vectors[0]) / len(vectors)
    return [mean if model else mean / basis.directions] * basis.directions


@dataclass(frozen=True)
class Without:
    """A tensor source without some of its tensors."""

    origin: TensorSource
    left_out: frozenset[str]

    @property
    def name(self) -> str:
        """Short name of the source."""
        return self.origin.name

    @property
    def names(self) -> Sequence[str]:
        """Names of the tensors that are left."""
        return [name for name in self.origin.names if name not in self.left_out]

    @property
    def memo(self) -> Memo | None:
        """Of the source."""
        return self.origin.memo

    @property
    def identity(self) -> str:
        """Of what is left."""
        if not self.origin.identity:
            return ""
        return hashlib.sha256(" ".join([self.origin.identity, *sorted(self.left_out)]).encode()).hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.origin.shape(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor."""
        return self.origin.read(name)
