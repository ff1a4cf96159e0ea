"""The ``space`` section of a study file: its keys, and what they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic import Field as Key

from mergesearch.merging.foreign.sizes import sized
from mergesearch.merging.models.calibration_spec import CalibrationSpec

#: Coordinates and what is made of them: spaces of more would exhaust the memory.
_MOST = dict.fromkeys(("dim", "segments", "layers", "size", "most", "total"), 10_000)
# Strict, so that `true` and "0.3" are refused; whole numbers are accepted.
_Number = Annotated[float, Key(strict=True, allow_inf_nan=False)]


class _Section(BaseModel):
    """Frozen, no unknown keys, finite numbers of a size that memory holds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    @field_validator("*")
    @classmethod
    def _sized(cls, value: Any, info: ValidationInfo) -> Any:
        return sized(value, info.field_name, _MOST)


class DepthSpec(_Section):
    """The ``space.depth`` section: coefficients along curves over the blocks."""

    basis: Literal["linear", "dct", "bspline"] = Key(
        description="linear: values at the first and the last block; dct: cosines; bspline: "
        "control points."
    )
    size: int | None = Key(
        default=None,
        strict=True,
        description="Numbers per curve; by default 2 for linear, else 4 (or all blocks).",
    )
    modules: bool = Key(
        default=False, strict=True, description="Separate curves for attention and MLP."
    )
    ends: Literal["own", "curve"] = Key(
        default="own",
        description="Embeddings, final norm and head: coefficients of their own, or the end values "
        "of the curve.",
    )
    clip: bool = Key(
        default=False,
        strict=True,
        description="Clip the coefficients of the curve into the bounds; only cosines can leave "
        "them.",
    )


class ChunkSpec(_Section):
    """The ``space.chunks`` section: into how many chunks each tensor is cut."""

    total: float = Key(default=1.1, gt=0, strict=True, description="Chunks in all, per tensor.")
    concentration: float = Key(
        default=1.0,
        ge=0,
        strict=True,
        description="0: as many everywhere; above 1: more where much changes.",
    )
    most: int | None = Key(
        default=None, ge=1, strict=True, description="Chunks of one tensor at most."
    )
    remainder: bool = Key(
        default=False,
        strict=True,
        description="Hand out what rounding down leaves over, largest fractions first.",
    )


class BitsSpec(_Section):
    """The ``space.bits`` section: matrices of the blocks rounded, layer by layer."""

    mean: _Number = Key(
        description="Most bits of an element in the mean over all layers that are rounded; scales "
        "and zeros are not counted."
    )
    choices: list[Annotated[int, Key(strict=True)]] = Key(
        default=[2, 3, 4, 8], description="Bits that a layer may have."
    )
    prior: Literal["zd", "lim"] | list[_Number] | None = Key(
        default=None,
        description="Which layers the search begins to give more bits: zd (few weights far above "
        "the mean), lim (output unlike input, on items), or a number for each layer; by default "
        "all alike.",
    )
    calibration: CalibrationSpec | None = Key(
        default=None, description="Items for prior lim; keys as for operators that run experts."
    )
    only: bool = Key(
        default=False,
        strict=True,
        description="Search bits alone; the coefficients stay at start.",
    )


class MixtureSpec(_Section):
    """The ``space.mixture`` section: experts that each block of one mixture keeps."""

    mean: _Number | None = Key(
        default=None, description="Most different experts of a block in the mean over all blocks."
    )
    total: int | None = Key(
        default=None,
        strict=True,
        ge=1,
        description="Most different experts of all blocks together, instead of mean.",
    )
    choices: list[Annotated[int, Key(strict=True, ge=1)]] | None = Key(
        default=None,
        min_length=1,
        description="Numbers of experts that a block may keep; by default from one to all that it "
        "has. With a single number only weights are searched.",
    )
    prior: Literal["usage"] | list[_Number] | None = Key(
        default=None,
        description="Which blocks the search begins to give more experts: usage (those whose "
        "experts are among the most used of the model), or a number for each block; by default all "
        "alike.",
    )
    weights: bool = Key(
        default=False,
        strict=True,
        description="Also search the weights of experts in their groups, one for each expert of "
        "each block, within space.bounds (by default [-0.5, 1]), beside their shares by usage.",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> MixtureSpec:
        if (self.mean is None) == (self.total is None):
            raise ValueError("expected either mean or total")
        return self


class WidthsSpec(_Section):
    """The ``space.widths`` section: shares of units that ``align: pleas`` keeps apart."""

    choices: list[_Number] = Key(
        default=[0.0, 0.25, 0.5, 1.0],
        description="Shares of units that a width may keep apart, from 0 to 1; align.fraction, "
        "where the search begins, is one of them.",
    )
    mean: _Number | None = Key(
        default=None,
        ge=0,
        le=1,
        description="Most units kept apart in all widths together, as a share of all; by default "
        "no limit.",
    )
    only: bool = Key(
        default=False,
        strict=True,
        description="Search widths alone; the coefficients stay at start.",
    )


class SpaceSpec(_Section):
    """The ``space`` section: which merges the search may propose."""

    granularity: (
        Literal["global", "task", "module", "block", "block_module", "tensor", "chunk"] | None
    ) = Key(
        default=None,
        description="How finely coefficients vary: global (one, shared by all experts), task (one "
        "per expert), module, block, block_module (block x {attention, mlp}), tensor, chunk (parts "
        "of tensors, more where experts change them most). By default block, or task with a depth "
        "curve.",
    )
    chunks: ChunkSpec | None = Key(
        default=None, description="How many chunks, for granularity chunk only."
    )
    depth: DepthSpec | None = Key(
        default=None,
        description="Curves over depth, shared by all experts with granularity global, else per "
        "expert (task).",
    )
    bits: BitsSpec | None = Key(
        default=None,
        description="Bits of each layer under a budget, searched beside the coefficients; trials "
        "and exports have the rounded weights.",
    )
    mixture: MixtureSpec | None = Key(
        default=None,
        # Studies without it read, and hash, as they did before.
        exclude_if=lambda section: section is None,
        description="Experts of each block under a budget, for operators that give one mixture of "
        "experts fewer of them.",
    )
    widths: WidthsSpec | None = Key(
        default=None,
        exclude_if=lambda section: section is None,
        description="Widths of layers, for experts under align: pleas: how many units of each "
        "model are kept apart, searched beside the coefficients.",
    )
    bounds: tuple[_Number, _Number] | None = Key(
        default=None, description="[low, high] of every coefficient; by default the operator's."
    )
    start: _Number | list[_Number] | None = Key(
        default=None,
        description="Where the search begins: one coefficient, a list with one per expert, or a "
        "list with one per coordinate; by default the operator's.",
    )
    exclude: list[str] = Key(
        default_factory=list,
        description="Regular expressions; tensors whose name contains a match stay at the base, "
        "with coefficient 0.",
    )
    groups: dict[str, str] | None = Key(
        default=None,
        description="Groups with a coefficient of their own for each expert, NAME: PATTERN; a "
        "pattern is a regular expression or a glob that matches whole names of tensors. What no "
        "pattern matches follows granularity.",
    )
    dim: int | None = Key(
        default=None,
        strict=True,
        description="Number of coordinates, for analytic problems without weights only.",
    )
    segments: int | None = Key(
        default=None,
        strict=True,
        ge=2,
        description="Most segments of a merge, for strategies that move split points.",
    )
    layers: int | None = Key(
        default=None,
        strict=True,
        ge=1,
        description="Blocks in a layer group, for strategies that choose operators.",
    )
    kind: str | None = Key(
        default=None, description="A kind of space that a plug-in adds, instead of those above."
    )
    options: dict[str, Any] | None = Key(
        default=None, description="Options of that kind, as its package says."
    )
