"""The matrices inside a model's tensors, and a basis that follows one formula on each of them.

A spectral operator is a formula on K matrices ``(out, in)``. :func:`rows_by_matrix` applies it to
every matrix of a model: plain ones, transposed ones (GPT-2 stores ``(in, out)``), convolution
kernels on request, and the thirds of a fused query-key-value projection, which are three matrices
stored as one. Other tensors get a plain row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mergesearch.merging.operators.parts.decomposition import is_large, precise_sum
from mergesearch.merging.operators.parts.task_vectors import finite_task_vectors
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.place import Place, place_of
from mergesearch.merging.tensors.roles import classify

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
    Field(description="fused query-key-value weights: three matrices, or one"),
]
Others = Annotated[
    Literal["mean", "sum", "base"],
    Field(
        description="tensors that are not matrices: mean or sum of the task vectors, or the base's"
    ),
]

#: Weights that are query, key and value one below the other, so named in PyTorch, timm, OpenCLIP,
#: Qwen-VL, MPT, ModernBERT, Phi-3, GPT-2. Left whole: ``query_key_value`` (GPT-NeoX, BLOOM, Falcon)
#: and CodeGen's ``attn.qkv_proj``, which go by head, and whatever is not made of equal thirds
#: (grouped queries).
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
        has_blocks: Whether the model shows residual blocks.
        conv1d: Whether its linear layers are stored as (in, out).
    """

    matrices: Literal["all", "blocks"]
    conv: Literal["others", "reshape"]
    fused: Literal["split", "whole"]
    others: Literal["mean", "sum", "base"]
    has_blocks: bool
    conv1d: bool

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        matrices: Literal["all", "blocks"] = "all",
        conv: Literal["others", "reshape"] = "others",
        fused: Literal["split", "whole"] = "split",
        others: Literal["mean", "sum", "base"] = "mean",
    ) -> Selection:
        """The selection for a model with tensors of these shapes."""
        has_blocks = any(classify(name).block is not None for name in shapes)
        return cls(matrices, conv, fused, others, has_blocks, _stores_transposed(shapes))


@dataclass(frozen=True)
class MatrixPart:
    """A matrix inside a tensor.

    Attributes:
        name: Of the tensor.
        shape: ``(out, in)`` of the matrix.
        start: Its first row, where it is one of several in the tensor.
        transposed: Whether the tensor holds ``(in, out)``.
    """

    name: str
    shape: tuple[int, int]
    start: int = 0
    transposed: bool = False

    @property
    def key(self) -> list[Any]:
        """What the matrix is remembered by."""
        return [self.name, *self.shape, self.start, self.transposed]

    def draws(self) -> torch.Generator:
        """A new random generator, whose draws depend on which matrix this is alone."""
        import torch

        digest = hashlib.sha256(json.dumps(self.key).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix as a view into a contiguous tensor."""
        matrix = tensor.reshape(tensor.shape[0], -1)
        return (matrix.T if self.transposed else matrix)[self.start : self.start + self.shape[0]]


#: A part and its K matrices ``(m, n)`` -> the rows of that part, one per direction.
Formula = Callable[[MatrixPart, list["torch.Tensor"]], Sequence["torch.Tensor"]]


def shapes_of(source: TensorSource | Layout) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all merged tensors."""
    if isinstance(source, Layout):
        return {spec.name: spec.shape for spec in source.tensors}
    return {name: source.shape(name) for name in source.names}


def is_matrix(name: str, shape: Sequence[int], selection: Selection) -> bool:
    """Whether a spectral operator treats the tensor as one or several matrices."""
    reshaped = selection.conv == "reshape" and len(shape) == 4
    if not (len(shape) == 2 or reshaped) or shape[0] < 2 or _columns(shape) < 2:
        return False
    if selection.matrices == "all":
        return True
    role = classify(name)
    return (
        role.block is not None if selection.has_blocks else role.module not in ("embedding", "head")
    )


def matrices_in(name: str, shape: Sequence[int], selection: Selection) -> tuple[MatrixPart, ...]:
    """The matrices inside a tensor, none if it is not treated as one."""
    if not is_matrix(name, shape, selection):
        return ()
    transposed = selection.conv1d and len(shape) == 2 and _CONV1D.search(name) is not None
    out, inner = (shape[1], shape[0]) if transposed else (shape[0], _columns(shape))
    thirds = FUSED.search(name) is not None and out == 3 * inner and len(shape) == 2
    # Qwen's c_attn has q, k and v one below the other, GPT-BigCode's goes by head: left whole.
    ambiguous = name.endswith("c_attn.weight") and not transposed
    if selection.fused == "whole" or not thirds or ambiguous:
        return (MatrixPart(name, (out, inner), 0, transposed),)
    return tuple(MatrixPart(name, (inner, inner), third * inner, transposed) for third in range(3))


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
    chosen = {
        name: options[name] for name in ("matrices", "conv", "fused", "others") if name in options
    }
    selection = Selection.of(shapes_of(layout), **chosen)
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
            part.view(row).copy_(results.pop())
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
