"""The matrices inside a model's tensors, and a basis that follows one formula on each of them.

A spectral operator is a formula on K matrices ``(out, in)``. :func:`rows_by_matrix` applies it to
every matrix of a model: plain ones, transposed ones (GPT-2 stores ``(in, out)``), convolution
kernels on request, the thirds of a fused query-key-value projection, which are three matrices
stored as one, and those of stacks (:mod:`mergesearch.merging.tensors.stacks`): experts, fused
gates, grouped queries. Other tensors get a plain row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mergesearch.merging.operators.parts.decomposition import is_large, precise_sum
from mergesearch.merging.operators.parts.matrix_part import MatrixPart
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.tensors.fused_heads import Config, Rows, is_fused
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.place import Place, place_of
from mergesearch.merging.tensors.roles import roles_of
from mergesearch.merging.tensors.source import shapes_of
from mergesearch.merging.tensors.stacks import StackLayout, config_of, stack_layouts

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.tensors.source import Options, TensorSource

Matrices = Annotated[
    Literal["all", "blocks"],
    Field(
        description="2-D tensors that are treated as matrices: all, or those inside residual blocks"
    ),
]
Convolutions = Annotated[
    Literal["others", "reshape"],
    Field(
        description="convolution kernels: as other tensors, or reshaped to matrices (out, in x "
        "height x width)"
    ),
]
Fused = Annotated[
    Literal["split", "whole"],
    Field(
        description="fused weights (query-key-value, gate and up projection): the matrices that "
        "they hold, or one; a stack of experts is always one for each"
    ),
]
Decompositions = Annotated[
    Literal["precise", "fast"],
    Field(
        description="how matrices are decomposed: precise, or fast, in about half the time (far "
        "less for adapters), with rows exact to 1e-4 of their size"
    ),
]
Others = Annotated[
    Literal["mean", "sum", "base"],
    Field(
        description="tensors that are not matrices: mean or sum of the task vectors, or the base's"
    ),
]

#: Weights that are query, key and value one below the other, so named in PyTorch, timm, OpenCLIP,
#: Qwen-VL, MPT, ModernBERT, Phi-3, GPT-2. Grouped queries, and all that go by head or by group, are
#: stacks.
FUSED = re.compile(
    r"(?:^|[._])in_proj_weight$|(?:^|\.)(?:qkv|Wqkv)\.weight$"
    r"|(?:^|\.)self_attn\.qkv_proj\.weight$|\.c_attn\.weight$"
)

#: Weights that GPT-2 and its kin store as (in, out). Qwen and GPT-BigCode have linear layers of the
#: same names.
_CONV1D = re.compile(r"\.(?:c_attn|q_attn|c_proj|c_fc)\.weight$")


@dataclass(frozen=True)
class Selection:
    """Which tensors of a model are matrices, and what becomes of the others.

    Attributes:
        matrices: See :data:`Matrices`; ``blocks`` in a model without blocks means all but
            embeddings and heads.
        conv: See :data:`Convolutions`.
        fused: See :data:`Fused`.
        others: See :data:`Others`.
        inner: Names of the tensors that lie inside: in residual blocks, or, in a model without any,
            outside embeddings and heads.
        conv1d: Whether its linear layers are stored as (in, out).
        stacks: Layouts of the tensors that hold several matrices or vectors, but equal thirds.
    """

    matrices: Literal["all", "blocks"]
    conv: Literal["others", "reshape"]
    fused: Literal["split", "whole"]
    others: Literal["mean", "sum", "base"]
    inner: frozenset[str]
    conv1d: bool
    stacks: Mapping[str, StackLayout]

    @classmethod
    def of(
        cls,
        source: TensorSource | Layout | Mapping[str, tuple[int, ...]],
        *,
        matrices: Literal["all", "blocks"] = "all",
        conv: Literal["others", "reshape"] = "others",
        fused: Literal["split", "whole"] = "split",
        others: Literal["mean", "sum", "base"] = "mean",
        config: Config | None = None,
    ) -> Selection:
        """The selection for a model with tensors of these shapes.

        How fused heads are divided is known from the source's configuration, or ``config``.
        """
        shapes = source if isinstance(source, Mapping) else shapes_of(source)
        stacks = stack_layouts(shapes, config_of(source) if config is None else config)
        inner = _inner(shapes)
        return cls(matrices, conv, fused, others, inner, _stores_transposed(shapes), stacks)

    @classmethod
    def chosen(
        cls, source: TensorSource | Layout, options: Options, config: Config | None = None
    ) -> Selection:
        """The selection by the hyperparameters of an operator; those of other things are passed."""
        names = ("matrices", "conv", "fused", "others")
        own = {name: options[name] for name in names if name in options}
        return cls.of(source, **own, config=config)


#: A part and its K matrices ``(m, n)`` -> the rows of that part, one per direction.
Formula = Callable[[MatrixPart, list["torch.Tensor"]], Sequence["torch.Tensor"]]


def is_matrix(name: str, shape: Sequence[int], selection: Selection) -> bool:
    """Whether a spectral operator treats the tensor as one or several matrices."""
    stack = selection.stacks.get(name)
    if stack is not None:
        matrices = bool(stack.parts) and min(stack.shape) > 1
    else:
        reshaped = selection.conv == "reshape" and len(shape) == 4
        matrices = (len(shape) == 2 or reshaped) and shape[0] > 1 and _columns(shape) > 1
    return matrices and (selection.matrices == "all" or name in selection.inner)


def matrices_in(name: str, shape: Sequence[int], selection: Selection) -> tuple[MatrixPart, ...]:
    """The matrices inside a tensor, none if it is not treated as one."""
    if not is_matrix(name, shape, selection):
        return ()
    if name in selection.stacks:
        return _stacked(name, selection.stacks[name], selection.fused)
    transposed = selection.conv1d and len(shape) == 2 and _CONV1D.search(name) is not None
    out, inner = (shape[1], shape[0]) if transposed else (shape[0], _columns(shape))
    thirds = FUSED.search(name) is not None and out == 3 * inner and len(shape) == 2
    # Without a configuration, Qwen's c_attn is not told from GPT-BigCode's, which goes by head.
    ambiguous = name.endswith("c_attn.weight") and not transposed
    if selection.fused == "whole" or not thirds or ambiguous:
        return (MatrixPart(name, (out, inner), 0, transposed),)
    return tuple(MatrixPart(name, (inner, inner), third * inner, transposed) for third in range(3))


def is_undivided(name: str, shape: Sequence[int], selection: Selection) -> bool:
    """Whether a fused projection is one matrix because nothing says how it is divided."""
    if selection.fused == "whole" or not is_fused(name):
        return False
    return len(matrices_in(name, shape, selection)) == 1


def _stacked(
    name: str, layout: StackLayout, fused: Literal["split", "whole"]
) -> tuple[MatrixPart, ...]:
    """The matrices of a stack, member after member."""
    out, inner = layout.shape
    parts = layout.parts if fused == "split" else (Rows(0, out),)
    return tuple(
        MatrixPart(
            name,
            (rows.count, inner),
            rows.start,
            layout.transposed,
            member,
            rows.step,
            rows.width,
        )
        for member in (range(layout.members) if layout.members else (None,))
        for rows in parts
    )


def spectral_refuse(
    layout: Layout, options: Options, objection: Callable[[tuple[int, int]], str | None]
) -> str | None:
    """The first objection to a matrix of a model, or None.

    Args:
        layout: Tensors of the model.
        options: Complete hyperparameters, of which those that select matrices are read.
        objection: Shape ``(out, in)`` of a matrix -> what is wrong with it, or None.

    Returns:
        The objection, with the tensor's name before it.
    """
    selection = Selection.chosen(layout, options)
    for spec in layout.tensors:
        for part in matrices_in(spec.name, spec.shape, selection):
            reason = objection(part.shape)
            if reason is not None:
                return f"tensor {spec.name!r}: {reason}"
    return None


def rows_by_matrix(
    base: TensorSource,
    experts: Sequence[TensorSource],
    selection: Selection,
    formula: Formula,
    *,
    one_row: bool = False,
) -> Callable[[str], list[torch.Tensor]]:
    """The rows of a basis whose matrices follow ``formula``.

    The rows raise :class:`mergesearch.merging.errors.CheckpointError` where a task vector holds NaN
    or infinity.

    Args:
        base: The common base.
        experts: The K experts.
        selection: Which tensors are matrices.
        formula: From the task vectors of one part to its rows, in any floating dtype; must not
            modify them.
        one_row: Whether ``formula`` gives one row for all experts instead of one for each.
    """
    return partial(_rows, base, experts, selection, formula, one_row)


def _rows(
    base: TensorSource,
    experts: Sequence[TensorSource],
    selection: Selection,
    formula: Formula,
    one_row: bool,
    name: str,
) -> list[torch.Tensor]:
    deltas = _of_one_dtype(finite_task_vectors(base, experts, name))
    matrices = matrices_in(name, base.shape(name), selection)
    if not matrices:
        return _other_rows(deltas, selection, one_row)
    rows = [deltas[0].new_empty(base.shape(name)) for _ in range(1 if one_row else len(deltas))]
    for part in matrices:
        results = _followed(place_of(base), formula, part, [part.view(delta) for delta in deltas])
        for row in reversed(rows):  # frees results one by one
            part.put(results.pop(), row)
    return rows


def _followed(
    place: Place, formula: Formula, part: MatrixPart, deltas: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The results of a formula, worked out on an accelerator if it is large and fits.

    Where it does not fit, decompositions alone go there, in pieces. A small matrix stays in main
    memory, for the same bits everywhere.
    """
    needed = working_copies(len(deltas)) * deltas[0].nbytes
    if place.is_host or not is_large(deltas[0]) or not place.fits(needed):
        return list(formula(part, deltas))
    with place.turn:
        return list(formula(part, [delta.to(place.device) for delta in deltas]))


def working_copies(experts: int) -> int:
    """How many matrices as large as a task vector the formula that holds most has at once."""
    return 10 * experts + 20


def _of_one_dtype(deltas: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The task vectors in fp64 if one of them is, else in fp32."""
    import torch

    double = any(delta.dtype == torch.float64 for delta in deltas)
    return [delta.to(torch.float64 if double else torch.float32) for delta in deltas]


def _inner(names: Iterable[str]) -> frozenset[str]:
    """Tensors in residual blocks; in a model without any, those of no embedding and no head."""
    roles = roles_of(names)
    inside = frozenset(name for name, role in roles.items() if role.block is not None)
    return inside or frozenset(
        name for name, role in roles.items() if role.module not in ("embedding", "head")
    )


def _columns(shape: Sequence[int]) -> int:
    """Columns of a tensor seen as a matrix."""
    columns = 1
    for size in shape[1:]:
        columns *= size
    return columns


def _stores_transposed(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a fused projection is wide where a linear layer's would be tall."""
    fused = [
        shape
        for name, shape in shapes.items()
        if name.endswith(".c_attn.weight") and len(shape) == 2
    ]
    return any(inner < out and out % inner == 0 for inner, out in fused)


def _other_rows(
    deltas: list[torch.Tensor], selection: Selection, one_row: bool
) -> list[torch.Tensor]:
    """Rows of a tensor that is no matrix: shares of the mean, of the sum, or of nothing."""
    scale = {"mean": 1 / len(deltas), "sum": 1.0, "base": 0.0}[selection.others]
    rows = (
        [delta * scale for delta in deltas]
        if scale
        else [delta.new_zeros(delta.shape) for delta in deltas]
    )
    return [precise_sum(rows).to(rows[0].dtype)] if one_row else rows
