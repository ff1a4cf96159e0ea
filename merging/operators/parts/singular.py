"""What operators on singular values share: which tensors are matrices, and their singular value
decompositions.

A spectral operator is a formula on K matrices ``(out, in)``. :func:`rows_by_matrix` applies it to
every matrix of a model: plain ones, transposed ones (GPT-2 stores ``(in, out)``), convolution
kernels on request, and the thirds of a fused query-key-value projection, which are three matrices
stored as one. Other tensors get a plain row.

Singular vectors have no sign and, where singular values repeat, no direction: formulas use them in
pairs only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.roles import classify
from mergesearch.merging.tensors.source import remembered

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
        description="tensors that are no matrices: mean or sum of the task vectors, or the base's"
    ),
]

#: Weights that are query, key and value one below the other, so named in PyTorch, timm, OpenCLIP,
#: Qwen-VL, MPT, ModernBERT, Phi-3, GPT-2. Left whole: ``query_key_value`` (GPT-NeoX, BLOOM, Falcon)
#: and CodeGen's ``attn.qkv_proj``, which go by head, and whatever is not made of equal thirds
#: (grouped queries).
FUSED = re.compile(
    r"(?:^|[._])in_proj_weight$|(?:^|\.)(?:qkv|Wqkv)\.weight$|(?:^|\.)self_attn\.qkv_proj\.weight$|\.c_attn\.weight$"
)

#: Weights that GPT-2 and its kin store as (in, out). Qwen and GPT-BigCode have linear layers of the
#: same names.
_CONV1D = re.compile(r"\.(?:c_attn|q_attn|c_proj|c_fc)\.weight$")

#: Matrices of up to this many elements are decomposed in fp64. It takes 1.8 times as long as fp32,
#: under a second at this size, and singular vectors of close singular values come out as exact as
#: the weights are. Larger ones would take minutes more in all; theirs are off by about 1e-5 of the
#: largest singular value.
PRECISE_UP_TO = 1 << 20


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
class SingularPart:
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
        """Identifies the matrix, for :func:`mergesearch.merging.tensors.source.remembered`."""
        return [self.name, *self.shape, self.start, self.transposed]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix as a view into a contiguous tensor."""
        matrix = tensor.reshape(tensor.shape[0], -1)
        return (matrix.T if self.transposed else matrix)[self.start : self.start + self.shape[0]]


@dataclass(frozen=True, eq=False)
class Svd:
    """Singular values, decreasing, with their vectors; ``left @ diag(values) @ right`` is the
    matrix.

    Attributes:
        left: ``(m, r)``.
        values: ``(r,)``.
        right: ``(r, n)``.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def top(self, rank: int) -> Svd:
        """The ``rank`` largest, copied so that the rest can be freed."""
        if rank >= len(self.values):
            return self
        return Svd(
            self.left[:, :rank].clone(), self.values[:rank].clone(), self.right[:rank].clone()
        )


#: A part and its K matrices ``(m, n)`` -> the rows of that part, one per direction.
Formula = Callable[[SingularPart, list["torch.Tensor"]], Sequence["torch.Tensor"]]


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
    place = classify(name)
    return (
        place.block is not None
        if selection.has_blocks
        else place.module not in ("embedding", "head")
    )


def parts(name: str, shape: Sequence[int], selection: Selection) -> tuple[SingularPart, ...]:
    """The matrices inside a tensor, none if it is not treated as one."""
    if not is_matrix(name, shape, selection):
        return ()
    transposed = selection.conv1d and len(shape) == 2 and _CONV1D.search(name) is not None
    out, inner = (shape[1], shape[0]) if transposed else (shape[0], _columns(shape))
    if (
        selection.fused == "whole"
        or FUSED.search(name) is None
        or out != 3 * inner
        or len(shape) != 2
    ):
        return (SingularPart(name, (out, inner), 0, transposed),)
    if name.endswith("c_attn.weight") and not transposed:
        return (
            SingularPart(name, (out, inner)),
        )  # Qwen puts q, k, v one below the other, GPT-BigCode goes by head
    return tuple(
        SingularPart(name, (inner, inner), third * inner, transposed) for third in range(3)
    )


def spectral_refuse(
    layout: Layout, options: Options, objection: Callable[[tuple[int, int]], str | None]
) -> str | None:
    """The first objection to the shape ``(out, in)`` of a matrix, with the tensor's name before it,
    or None.
    """
    chosen = {
        name: options[name] for name in ("matrices", "conv", "fused", "others") if name in options
    }
    selection = Selection.of(shapes_of(layout), **chosen)
    for spec in layout.tensors:
        for part in parts(spec.name, spec.shape, selection):
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
    fused: bool = False,
) -> Callable[[str], list[torch.Tensor]]:
    """The rows of a basis whose matrices follow ``formula``, for
    :class:`mergesearch.merging.operators.base.Basis`.

    Args:
        base: The common base.
        experts: The K experts.
        selection: Which tensors are matrices.
        formula: From the task vectors of one part to its rows, in any floating dtype; must not
            modify them.
        fused: Whether ``formula`` gives one row for all experts instead of one for each.

    The rows raise :class:`mergesearch.merging.errors.CheckpointError` where a task vector holds NaN
    or infinity.
    """

    def rows(name: str) -> list[torch.Tensor]:
        import torch

        from mergesearch.merging.operators.parts.election import finite_task_vectors

        found = parts(name, base.shape(name), selection)
        deltas = finite_task_vectors(base, experts, name)
        wide = (
            torch.float64
            if any(delta.dtype == torch.float64 for delta in deltas)
            else torch.float32
        )
        deltas = [delta.to(wide) for delta in deltas]
        if not found:
            return _other_rows(deltas, selection, fused)
        merged = [deltas[0].new_empty(base.shape(name)) for _ in range(1 if fused else len(deltas))]
        for part in found:
            results = list(formula(part, [part.view(delta) for delta in deltas]))
            for row in reversed(merged):  # frees results one by one
                part.view(row).copy_(results.pop())
        return merged

    return rows


def singular(
    base: TensorSource,
    expert: TensorSource,
    part: SingularPart,
    matrix: torch.Tensor,
    rank: int | None = None,
) -> Svd:
    """Singular values and vectors of one expert's task vector, remembered for other operators.

    Args:
        base: The common base.
        expert: Whose task vector it is.
        part: Which matrix of it.
        matrix: The task vector's part itself.
        rank: Number of singular values that are wanted, the largest; None for all. No more than
            those are kept.
    """
    key = ["singular vectors of a task vector", *part.key, rank]
    return _remembered_svd([base, expert], key, lambda: _largest(decompose(precise(matrix)), rank))


def singular_of_sum(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: SingularPart,
    matrices: Sequence[torch.Tensor],
) -> Svd:
    """Singular values and vectors of the sum of the experts' task vectors, remembered for other
    operators.
    """
    key = ["singular vectors of the sum of task vectors", *part.key]
    return _remembered_svd([base, *experts], key, lambda: decompose(_sum(matrices)))


def singular_side_by_side(
    base: TensorSource,
    experts: Sequence[TensorSource],
    part: SingularPart,
    matrices: Sequence[torch.Tensor],
) -> Svd:
    """Left singular vectors and values of ``[τ_1 ... τ_K]``, ``(m, K n)``; ``right`` is left empty.
    Remembered.
    """
    key = ["left singular vectors of the task vectors side by side", *part.key]
    return _remembered_svd([base, *experts], key, lambda: _side_by_side(matrices))


def precise(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix in the precision in which to decompose it: fp64 up to :data:`PRECISE_UP_TO`
    elements.
    """
    import torch

    small = matrix.numel() <= PRECISE_UP_TO
    return matrix.to(torch.float64 if small or matrix.dtype == torch.float64 else torch.float32)


def decompose(matrix: torch.Tensor) -> Svd:
    """The thin singular value decomposition of finite numbers, in their dtype, fp32 or fp64."""
    import torch

    try:
        return Svd(*torch.linalg.svd(matrix, full_matrices=False))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # LAPACK's divide and conquer gives up on some matrices with many equal singular values, as
        # joined singular vectors have; in fp64, and the other way round, it has not been seen to.
        right, values, left = torch.linalg.svd(matrix.double().T, full_matrices=False)
        return Svd(*(factor.to(matrix.dtype) for factor in (left.T, values, right.T)))


def numerical_rank(
    values: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    floor: float = 0.0,
    largest: float | torch.Tensor | None = None,
) -> int:
    """How many singular values are not zero: above ``eps · max(m, n)`` of the largest.

    Args:
        values: ``(s,)``, decreasing.
        shape: Of the matrix.
        dtype: Of the numbers that the matrix was made from: it bounds what is known of it.
        floor: Values up to this fraction of the largest count as zero, too.
        largest: What the values are compared with, if not the first of them.
    """
    import torch

    if values.numel() == 0:
        return 0
    relative = max(torch.finfo(dtype).eps * max(shape), floor)
    return int((values > relative * (values[0] if largest is None else largest)).sum())


def polar(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``P Qᵀ`` of ``P Σ Qᵀ``: the nearest matrix whose non-zero singular values are 1.

    Columns that lie in the span of others share it equally; nothing is added outside the span
    (where ``P`` and ``Q`` are arbitrary). Orthonormal columns are returned as they are.

    Args:
        matrix: ``(m, n)``, possibly without columns or rows.
        dtype: Of the numbers that it was made from, for :func:`numerical_rank`.
    """
    if matrix.numel() == 0:
        return matrix
    svd = decompose(matrix)
    kept = svd.top(numerical_rank(svd.values, matrix.shape, dtype))
    return kept.left @ kept.right


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
    deltas: list[torch.Tensor], selection: Selection, fused: bool
) -> list[torch.Tensor]:
    scale = {"mean": 1 / len(deltas), "sum": 1.0, "base": 0.0}[selection.others]
    rows = (
        [delta * scale for delta in deltas]
        if scale
        else [delta.new_zeros(delta.shape) for delta in deltas]
    )
    return [_sum(rows).to(rows[0].dtype)] if fused else rows


def _sum(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """In fp64 where the decomposition is, so that the order of the experts does not matter."""
    total = precise(matrices[0]).clone()
    for matrix in matrices[1:]:
        total += matrix
    return total


def _side_by_side(matrices: Sequence[torch.Tensor]) -> Svd:
    """Through triangular factors, one expert at a time: ``[τ_1 ...] = Rᵀ Qᵀ`` has the left vectors
    of ``Rᵀ``.
    """
    import torch

    triangle = precise(matrices[0]).T[:0]
    for matrix in matrices:
        triangle = torch.linalg.qr(torch.cat([triangle, precise(matrix).T]), mode="r").R
    svd = decompose(triangle.T)
    return Svd(svd.left, svd.values, svd.right[:, :0])


def _largest(svd: Svd, rank: int | None) -> Svd:
    return svd if rank is None else svd.top(rank)


def _remembered_svd(
    sources: Sequence[TensorSource], key: list[Any], compute: Callable[[], Svd]
) -> Svd:
    def tensors() -> dict[str, torch.Tensor]:
        svd = compute()
        # As they come from disk, so that products of them have the same bits.
        return {
            "left": svd.left.contiguous(),
            "values": svd.values,
            "right": svd.right.contiguous(),
        }

    found = remembered(sources, key, tensors)
    return Svd(found["left"], found["values"], found["right"])
